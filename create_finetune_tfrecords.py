#!/usr/bin/env python3
"""Turn text into a data set for training; `--help` says how."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from pathlib import Path

from mesh_transformer.data import prepare, tokenizer
from mesh_transformer.errors import run_command

DESCRIPTION = """\
Turn text into a data set for training: tokenise documents, shuffle them, cut them into sequences.

The input is a file or a folder of files: .txt, .jsonl, .jsonl.zst, .xz or .tar.gz. A text is a
document, or several with the tokenizer's end of text (<|endoftext|>) between them; a line of JSON
is a string or an object with "text"; every file in an archive is a text. Every document is ended
by an end of text, and begun as its tokenizer's files say. The names of other special tokens, such
as <s>, are ordinary text. With --encoder-seq lines of JSON are objects with "in_text" and
"out_text", and a sequence is one such pair. Writes NAME_{number of sequences}.tfrecords, a .json
file that says how it was made, and NAME.index, which train_set and val_set of a configuration name.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=layout)
    add = parser.add_argument
    add("input_path", type=Path, help="file, or folder that holds files")
    add("name", help="what to call the data set")
    add("--output-dir", type=Path, default=Path(), help="where to write (here)")
    add("--index", type=Path, help="index file to write (OUTPUT_DIR/NAME.index)")
    named = "gpt2, bytes, a tokenizer.json or its folder, a Hugging Face name"
    add("--tokenizer", default="gpt2", help=named)
    add("--seq", type=int, default=2048, help="tokens to predict per sequence (2048)")
    add("--encoder-seq", type=int, default=0, help="pairs: tokens of an input, for an encoder (0)")
    add("--pad-id", type=int, default=0, help="pairs: the token that fills them up (0)")
    add("--normalize-with-ftfy", action="store_true", help="repair broken encodings; NFKC")
    add("--normalize-with-wikitext-detokenize", action="store_true", help="mend WikiText's spaces")
    add("--min-unique-tokens", type=int, default=0, help="drop sequences with fewer; try 200 (0)")
    add("--treat-eot-as-text", action="store_true", help="an end of text inside a text is text")
    add("--n-repack-epochs", type=int, default=1, help="write all this often, packed anew (1)")
    add("--seed", type=int, default=10, help="seeds the shuffling (10)")
    add("--preserve-data-order", action="store_true", help="do not shuffle")
    add("--workers", type=int, help="processes that tokenise (one per core)")
    add("--verbose", action="store_true", help="say more, such as the text that is left out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the data set and say what was made."""
    args = parse(arguments)
    if args.verbose:
        logging.getLogger("mesh_transformer").setLevel(logging.DEBUG)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. Nothing was written."))
    names = [field.name for field in dataclasses.fields(prepare.Options)]
    options = prepare.Options(**{name: getattr(args, name) for name in names})
    chosen = tokenizer.load(args.tokenizer)
    where = {"output_dir": args.output_dir, "index": args.index, "workers": args.workers}
    print(prepare.create(args.input_path, args.name, chosen, options, **where).summary())
    return 0


if __name__ == "__main__":
    run_command(main, when_interrupted="Nothing was written.")
