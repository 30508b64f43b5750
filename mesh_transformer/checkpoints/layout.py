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
    RUN/checkpoints/damaged_step_200/   set aside by a run that could not resume from it; not a
                                        checkpoint any more, and kept until you delete it
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
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec  # type: ignore[import-untyped]
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mesh_transformer import storage
from mesh_transformer.errors import UserError

# Buckets are listed through etils, which takes TensorFlow for it where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")

FORMAT_VERSION = 1
MARKER = "commit_success.txt"

CHUNK_BYTES = 128 * 2**20  # bounds what must be fetched to read part of an array
FILE_BYTES = 2**30  # when Orbax begins another file of arrays
BY_LAYER_BYTES = 2**20  # a layer's part from which on it is stored by itself

MOMENT = re.compile(r"opt_state/(\d+)/(mu|nu)/(.+)")
COUNT = re.compile(r"opt_state/(\d+)/count")
"""Paths of an optimizer's state: the number is that of the part of it."""

_LISTED = 6  # problems of a kind that a message names
_FILES = "files.json"
_CHECKSUM_BYTES = 2**20  # of files up to this length; the arrays in longer ones have fingerprints
_DAMAGE = re.compile("DATA_LOSS")
_LOCAL_DAMAGE = re.compile("FAILED_PRECONDITION|NOT_FOUND|OUT_OF_RANGE")
_NO_DAMAGE = re.compile("PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED")
_REMOTE = re.compile(r"\b(gs|s3|https?)://|\"driver\": *\"(gcs|gcs_grpc|s3|http)\"")
_TMP = ".orbax-checkpoint-tmp"
_STEP_FOLDER = re.compile(r"step_(\d+)")
_OUR_FOLDER = re.compile(rf"step_\d+({re.escape(_TMP)}.*)?")


class CheckpointError(UserError):
    """A checkpoint cannot be written, or cannot be read as what is asked for."""


class Damaged(CheckpointError):
    """What lies on the disk is not what was saved: to try again or to log in would not help."""


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
    return _TMP not in folder.name and storage.exists(str(folder / MARKER))


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
    remove_marker(folder)
    storage.remove_folder(str(folder))


def remove_marker(folder: epath.Path) -> None:
    """Make a step folder no checkpoint any more, if it is one."""
    with contextlib.suppress(FileNotFoundError):
        storage.remove(str(folder / MARKER))


def set_aside(folder: epath.Path) -> str:
    """Make a damaged step folder no checkpoint any more, keeping it to look at where that is cheap.

    A local folder is renamed; in a bucket, which cannot rename, the marker goes, and what stays is
    removed by the next run's start.

    Returns:
        Where the folder is now.
    """
    if storage.is_remote(str(folder)):
        remove_marker(folder)
        return str(folder)
    others = (f"{folder.name}.{n}" for n in itertools.count(2))
    names = itertools.chain([folder.name], others)
    places = (folder.with_name(f"damaged_{name}") for name in names)
    return str(folder.rename(next(place for place in places if not place.exists())))


def being_written(folder: epath.Path) -> epath.Path:
    """Name the folder that holds a step until it is committed."""
    return folder if storage.is_remote(str(folder)) else folder.with_name(folder.name + _TMP)


def list_files(folder: epath.Path) -> None:
    """Write down which files there are in a step folder, for `damaged_files`."""
    inside = ((item, storage.files(str(folder / item))) for item in ("about", "state"))
    names = [f"{item}/{name}" for item, found in inside for name in found]
    listed = {name: _file_summary(folder / name) for name in names}
    write_json(folder / _FILES, listed)


def write_json(path: epath.Path, value: Any) -> None:
    """Write a file of a step folder that is not a checkpoint yet."""
    storage.write_text_atomically(str(path), json.dumps(value))


def make_folder(folder: epath.Path) -> None:
    """Make a local folder; buckets have none, and gcsfs would make a bucket that is missing."""
    if not storage.is_remote(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)


def damaged_files(folder: epath.Path) -> list[str]:
    """Name the files of a step folder that are missing or not as they were listed.

    Raises:
        CheckpointError: The folder itself is out of reach, so that nothing tells of its files.
    """
    found = _damaged_files(folder)
    if found and not is_complete(folder):  # it was, or nobody would look at its files
        raise CheckpointError(f"{folder} went away while it was read, its {MARKER} included")
    return found


def _damaged_files(folder: epath.Path) -> list[str]:
    try:
        listed = json.loads(storage.read_text(str(folder / _FILES)))
    except FileNotFoundError:
        return [f"{_FILES} (missing)"]
    except ValueError:  # not JSON, or not even text
        listed = None
    if not (isinstance(listed, dict) and listed):  # there is always about.json
        return [f"{_FILES} (changed)"]
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


def state_handler(
    read_gb: float | None = None, *handlers: tuple[Any, Any]
) -> ocp.PyTreeCheckpointHandler:
    """Make what writes and reads `state/`, with at most `read_gb` gigabytes in flight at a time.

    Args:
        handlers: Types of leaves and what writes each, if there are other than jax arrays.
    """
    # Hosts share the writing of what is repeated; one host would only cut arrays up for nothing.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    return ocp.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        restore_concurrent_gb=read_gb,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), *handlers
        ),
    )


def is_stacked(path: str) -> bool:
    """Whether the first axis of an array of a state is the layers'."""
    return "/layers/" in path


def save_args(path: str, shape: Sequence[int], dtype: Any) -> ocp.SaveArgs:
    """Say how an array is cut up on the disk.

    Stacked layers are cut apart, so that one can be read without the others; the small ones are
    not, of which a pod's hosts would make very many tiny pieces.
    """
    by_layer = is_by_layer(is_stacked(path), shape, dtype)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if by_layer else ())


def is_by_layer(stacked: bool, shape: Sequence[int], dtype: Any) -> bool:
    """Whether the layers of an array are cut apart."""
    layer_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    return stacked and len(shape) > 1 and layer_bytes >= BY_LAYER_BYTES


def make_writer(
    folder: epath.Path, on_written: Callable[[], None], *handlers: tuple[Any, Any]
) -> ocp.AsyncCheckpointer:
    """Make what writes step folders like this one.

    Args:
        folder: Only whether it is in a bucket matters.
        on_written: Called when all hosts have written and before the commit.
        handlers: Types of leaves other than jax arrays, and what writes each.
    """
    mode = ocp.options.AtomicityMode
    in_place = storage.is_remote(str(folder))
    atomicity = ocp.options.AtomicityOptions(
        mode=mode.COMMIT_FILE if in_place else mode.ATOMIC_RENAME
    )
    asynchrony = ocp.options.AsyncOptions(
        # In the foreground, so that what fails is raised at once and not after a timeout.
        create_directories_asynchronously=False,
        post_finalization_callback=on_written,
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            async_options=asynchrony, atomicity_options=atomicity
        ),
        state=state_handler(None, *handlers),
        about=about_handler(),
    )
    return ocp.AsyncCheckpointer(handler, async_options=asynchrony, atomicity_options=atomicity)


def about_handler() -> ocp.JsonCheckpointHandler:
    """Make what writes and reads `about/about.json`."""
    return ocp.JsonCheckpointHandler(filename="about.json")


def dtype_of(what: str, named: str, known: Mapping[str, np.dtype[Any]]) -> np.dtype[Any]:
    """Look a dtype up by a format's own name.

    Raises:
        CheckpointError: It is not one that weights can be read from; `what` is the array.
    """
    if named not in known:
        raise CheckpointError(
            f"{what} is {named}, which is not read here; save it as {', '.join(known)}"
        )
    return known[named]


def first_of(problems: Sequence[str]) -> list[str]:
    """Shorten a list for a message."""
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return [*problems[:_LISTED], *more]


@contextlib.contextmanager
def named_errors(what: str, advice: str = "", *, writing: bool = False) -> Iterator[None]:
    """Say what could not be done, and what to do, when Orbax raises.

    Args:
        writing: What fails then is never damage, though a disk that is full says "OUT_OF_RANGE".
    """
    try:
        yield
    except Exception as error:  # Exception itself is what Orbax raises where TensorStore cannot
        kind = Damaged if tells_of_damage(error) and not writing else CheckpointError
        raise kind(f"{what}: {reason(error)}{advice}") from error


def tells_of_damage(error: BaseException) -> bool:
    """Whether an error of Orbax or TensorStore says that bytes are lost or are not what they were.

    Outages, permissions and full disks say something else, and what fits no known saying is taken
    for one of them. A bucket also says that there is no such file, or that a condition failed,
    where a bucket or a permission is missing or somebody else writes; so there only bytes that
    are read and are wrong are damage, and files that `damaged_files` misses.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return True
    text = str(error)
    if _NO_DAMAGE.search(text):
        return False
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) and not _is_of_bucket(error)
    return bool(_DAMAGE.search(text) or (_LOCAL_DAMAGE.search(text) and not _REMOTE.search(text)))


def _is_of_bucket(error: OSError) -> bool:
    """Whether a file is missed in a bucket; the clients' errors have the path but no number."""
    return error.errno is None or bool(_REMOTE.search(f"{error} {error.filename}"))


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
    """List what is in a folder: nothing if there is none.

    What etils, or fsspec below it, is refused it takes for nothing; a run would begin anew.
    """
    return [folder / name for name in storage.children(str(folder))]


def _file_summary(path: epath.Path) -> list[int | None]:
    """Give a file's length, and its checksum if it is short; nothing if there is no such file."""
    try:
        length = storage.size(str(path))
        short = length <= _CHECKSUM_BYTES
        return [length, zlib.crc32(storage.read_bytes(str(path))) if short else None]
    except FileNotFoundError:
        return []
