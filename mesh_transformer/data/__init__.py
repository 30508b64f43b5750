"""From text to batches of tokens: tokenizers, documents, packing, TFRecord files."""


class DataError(ValueError):
    """Something is wrong with a data set; the message names the file, the place and what to do."""
