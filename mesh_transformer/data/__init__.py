"""From text to batches of tokens: tokenizers, documents, packing, TFRecord files."""

from mesh_transformer.errors import UserError


class DataError(UserError):
    """Something is wrong with a data set; the message names the file, the place and what to do."""
