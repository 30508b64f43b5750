"""From a model to people: text in, text out."""
