"""Train, evaluate and sample transformers sharded over many devices, with JAX and Haiku."""

__version__ = "0.1.0"
