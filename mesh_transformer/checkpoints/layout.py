"""Where native checkpoints lie, what is in them, and what makes a folder one.

A run's checkpoints lie under `RUN/checkpoints`, a local folder or a gs:// URL. `native.Checkpoints`
owns that folder: it takes what is unfinished there for the remains of a killed run and removes it.

    RUN/checkpoints/step_300/
        about/about.json      step, format version, fingerprints of the arrays, and `extra`
        state/                the arrays by path (`params/...`, `opt_state/...`, `step`), one OCDBT
                              database of uncompressed Zarr 3 arrays that any mesh can read
        files.json            length of each file above, and the checksums of the short ones
        _CHECKPOINT_METADATA  Orbax's own notes (times, handlers)
        commit_success.txt    the marker, written last: a folder without it is not a checkpoint
    RUN/checkpoints/step_400.orbax-checkpoint-tmp/    being written; local folders only

On a local disk a checkpoint is written beside its place and then renamed; in a bucket it is written
in place and the marker comes last. Both leave the same files, so a step folder that was copied with
`cp -r`, `gsutil cp -r` or `rsync`, in either direction, is a checkpoint wherever it lands. One that
was copied in part or is damaged is refused: the files must be those that are listed, and the arrays
must have the fingerprints they were saved with. Deleting takes the marker away first, so a process
killed half-way leaves nothing that looks complete.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec  # type: ignore[import-untyped]
import jax
import orbax.checkpoint as ocp
from etils import epath

from mesh_transformer import storage
from mesh_transformer.errors import UserError

# Buckets are listed through etils, which takes TensorFlow for it where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

FORMAT_VERSION = 1
MARKER = "commit_success.txt"

_FILES = "files.json"
_CHECKSUM_BYTES = 2**20  # of files up to this length; the arrays in longer ones have fingerprints
_TMP = ".orbax-checkpoint-tmp"
_STEP_FOLDER = re.compile(r"step_(\d+)")
_OUR_FOLDER = re.compile(rf"step_\d+({re.escape(_TMP)}.*)?")


class CheckpointError(UserError):
    """A checkpoint cannot be written, or cannot be read as what is asked for."""


def absolute(path: str) -> epath.Path:
    """Make a path object of a local path or a URL; Orbax takes absolute paths only."""
    if not storage.is_remote(path):
        return epath.Path(path).absolute()
    # Other hosts write to the bucket, so it must be listed afresh each time.
    fsspec.config.conf.setdefault(path.split("://")[0], {})["use_listings_cache"] = False
    return epath.Path(path)


def step_folder(folder: epath.Path, step: int) -> epath.Path:
    """Name the folder of a step."""
    return folder / f"step_{step}"


def is_complete(folder: epath.Path) -> bool:
    """Whether a step folder is a checkpoint."""
    return _TMP not in folder.name and (folder / MARKER).exists()


def steps(folder: epath.Path) -> list[int]:
    """List the steps of the complete checkpoints in a folder, oldest first."""
    return [step for step in _candidates(folder) if is_complete(step_folder(folder, step))]


def latest(folder: epath.Path) -> int | None:
    """Give the newest complete checkpoint's step, looking no further than it; None if none."""
    newest_first = reversed(_candidates(folder))
    return next((step for step in newest_first if is_complete(step_folder(folder, step))), None)


def unfinished(folder: epath.Path) -> list[epath.Path]:
    """List the folders that a save or a deletion has begun and not ended."""
    ours = [child for child in _children(folder) if _OUR_FOLDER.fullmatch(child.name)]
    return [child for child in ours if not is_complete(child)]


def delete(folder: epath.Path) -> None:
    """Delete a step folder, the marker first."""
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmtree()


def being_written(folder: epath.Path) -> epath.Path:
    """Name the folder that holds a step until it is committed."""
    return folder if storage.is_remote(str(folder)) else folder.with_name(folder.name + _TMP)


def list_files(folder: epath.Path) -> None:
    """Write down which files there are in a step folder, for `damaged_files`."""
    names = [name for item in ("about", "state") for name in _file_names(folder, item)]
    listed = {name: _file_summary(folder / name) for name in names}
    (folder / _FILES).write_text(json.dumps(listed))


def damaged_files(folder: epath.Path) -> list[str]:
    """Name the files of a step folder that are missing or not as they were listed."""
    listed = json.loads((folder / _FILES).read_text())
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each look into a bucket takes a while
        found = list(pool.map(lambda name: _file_summary(folder / name), listed))
    return [
        f"{name} ({'changed' if summary else 'missing'})"
        for name, summary in zip(listed, found, strict=True)
        if summary != listed[name]
    ]


def by_path(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a pytree to {"params/decoder/.../w": leaf}, in the order of its leaves."""
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        path = f"{prefix}/{path}" if prefix else path
        if path in flat:
            raise CheckpointError(f"two arrays have the same path, {path}")
        flat[path] = leaf
    return flat


def state_handler(read_gb: int | None = None) -> ocp.PyTreeCheckpointHandler:
    """Make what writes and reads `state/`, with at most `read_gb` gigabytes in flight at a time."""
    # Hosts share the writing of what is repeated; one host would only cut arrays up for nothing.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        restore_concurrent_gb=read_gb,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def about_handler() -> ocp.JsonCheckpointHandler:
    """Make what writes and reads `about/about.json`."""
    return ocp.JsonCheckpointHandler(filename="about.json")


@contextlib.contextmanager
def named_errors(what: str, advice: str = "") -> Iterator[None]:
    """Say what could not be done, and what to do, when Orbax raises."""
    try:
        yield
    except Exception as error:  # Exception itself is what Orbax raises where TensorStore cannot
        raise CheckpointError(f"{what}: {reason(error)}{advice}") from error


def reason(error: BaseException) -> str:
    """Say in one line what went wrong in the first place; Orbax and TensorStore say it in many."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec=")[0] or type(error).__name__
    return text.splitlines()[0]


def _candidates(folder: epath.Path) -> list[int]:
    """List the steps that have a folder, complete or not, oldest first."""
    found = (_STEP_FOLDER.fullmatch(child.name) for child in _children(folder))
    return sorted(int(match[1]) for match in found if match)


def _children(folder: epath.Path) -> list[epath.Path]:
    """List what is in a folder: nothing if there is none, as in a bucket before the first file."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _file_names(folder: epath.Path, inside: str) -> list[str]:
    """List all files inside a folder in `folder`, as paths from `folder`."""
    names = []
    for child in sorted(_children(folder / inside), key=lambda child: child.name):
        name = f"{inside}/{child.name}"
        names += _file_names(folder, name) if child.is_dir() else [name]
    return names


def _file_summary(path: epath.Path) -> list[int | None]:
    """Give a file's length, and its checksum if it is short; nothing if there is no such file."""
    if not path.exists():
        return []
    length = path.stat().length
    return [length, zlib.crc32(path.read_bytes()) if length <= _CHECKSUM_BYTES else None]
