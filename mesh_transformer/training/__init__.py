"""Training: the optimizer, the compiled steps, and the loop that calls them."""
