"""Checkpoints: the native format of this library, and the formats of others."""
