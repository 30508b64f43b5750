"""Train, evaluate, sample and serve transformers sharded over many devices, with JAX and Haiku."""

__version__ = "0.1.0"
