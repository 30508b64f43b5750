"""The model: pure functions of arrays, free of input, output and devices."""
