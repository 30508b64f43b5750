"""Collect text that every machine has: the source files of Python's standard library.

    python examples/quickstart_data.py data/quickstart

writes `train.jsonl` and `val.jsonl` into the given folder, one file of source code per line as
`{"text": ...}`, ready for create_finetune_tfrecords.py. About one file in twenty is held out for
validation, chosen by a hash of its path, so that the same file always lands on the same side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

# Installed packages are not the standard library; tests are, but few systems ship them.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT_ONE_IN = 20


def source_files(library: Path) -> list[Path]:
    """Return the library's modules, in an order that does not depend on the file system."""
    paths = (path for path in library.rglob("*.py") if path.is_file())
    return sorted(path for path in paths if not LEFT_OUT & set(path.relative_to(library).parts))


def held_out(name: str) -> bool:
    """Tell whether the file of this name, relative to the library, is kept for validation."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def documents(library: Path) -> Iterator[tuple[str, str]]:
    """Yield the relative name and the text of each module, decoded as its first lines declare."""
    for path in source_files(library):
        with tokenize.open(path) as file:
            yield path.relative_to(library).as_posix(), file.read()


def write_split(library: Path, output: Path) -> dict[str, tuple[int, int]]:
    """Write both files; return how many documents and characters each holds."""
    output.mkdir(parents=True, exist_ok=True)
    sizes = {"train": (0, 0), "val": (0, 0)}
    with (
        open(output / "train.jsonl", "w", encoding="utf-8") as train,
        open(output / "val.jsonl", "w", encoding="utf-8") as val,
    ):
        for name, text in documents(library):
            side, file = ("val", val) if held_out(name) else ("train", train)
            file.write(json.dumps({"text": text}) + "\n")
            sizes[side] = sizes[side][0] + 1, sizes[side][1] + len(text)
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder to write train.jsonl and val.jsonl into")
    args = parser.parse_args(arguments)
    sizes = write_split(Path(sysconfig.get_path("stdlib")), args.output)
    for side, (files, characters) in sizes.items():
        print(
            f"{args.output / side}.jsonl: {files} files, {characters / 1e6:.1f} million characters"
        )


if __name__ == "__main__":
    main()
