"""Read native checkpoints, strictly: what comes back is what was saved, or an error says why not.

Readers need the step folder alone: it may be part of a live run, a copy, or on a read-only disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mesh_transformer import storage
from mesh_transformer.checkpoints import layout, retention
from mesh_transformer.checkpoints.fingerprint import fingerprints
from mesh_transformer.checkpoints.layout import CheckpointError, Damaged
from mesh_transformer.config import ModelConfig

_READ_GB = 1.0  # in flight while restoring; more only where one array alone needs it
ADVICE = "; restore another step or copy the folder again"


def locate(path: str) -> str | None:
    """Find the checkpoint that a path means: a step folder, or the newest one of a run.

    Args:
        path: A step folder (in its run or copied elsewhere), a run's folder, or the folder
            `checkpoints` in it.

    Returns:
        The step folder; None if the path holds no complete native checkpoint.

    Raises:
        UserError: It holds one where none can be read from.
    """
    given = layout.absolute(path)
    if layout.is_complete(given) and storage.exists(str(given / "about")):
        return _kept(given)
    for folder in (given / "checkpoints", given):
        step = layout.latest(folder)
        if step is not None:
            return _kept(layout.step_folder(folder, step))
    return None


def _kept(folder: epath.Path) -> str:
    retention.check_kept(str(folder))
    return str(folder)


def restore(
    folder: str, target: Any, *, config: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Read a checkpoint as exactly the arrays of `target`, placed by its shardings.

    Args:
        folder: A step folder, as `locate` gives it.
        target: A pytree of jax.ShapeDtypeStruct with shardings, or of arrays to be like.
        config: The flat configuration that `target` follows from. If the arrays do not fit, the
            error names the keys in which the checkpoint's `extra["config"]` differs from it.

    Returns:
        The state, and the `extra` it was saved with.

    Raises:
        CheckpointError: Lists by path every array that is missing, not asked for, or of another
            shape or dtype (nothing is ever cast, padded or cut), or damaged.
        Damaged: What lies there is not what was saved.
    """
    with agreed(folder):
        about = read_about(folder)
    return _read_arrays(folder, "", target, about, config), about["extra"]


def restore_params(
    folder: str,
    target_params: Any,
    *,
    config: Mapping[str, Any] | None = None,
    cast: bool = False,
) -> Any:
    """Read the weights alone, otherwise as `restore`: nothing else of the state is looked at.

    Args:
        cast: Also read floating-point weights into a wider type, as bfloat16 into float32, which
            changes no value. What is stored is checked by its fingerprint first.
    """
    with agreed(folder):
        about = read_about(folder)
    return _read_arrays(folder, "params", target_params, about, config, cast=cast)


def read_extra(folder: str) -> dict[str, Any]:
    """Give back the `extra` that a checkpoint was saved with."""
    return read_about(folder)["extra"]


def read_about(folder: str, *, check_files: bool = True) -> dict[str, Any]:
    """Read `about.json`, once all files are known to be there and whole.

    Raises:
        Damaged: Lists the files that are missing or not as they were.
        CheckpointError: It is not a checkpoint, is of a newer format, or cannot be read.
    """
    files = damaged_files(folder)
    if files and check_files:
        raise damaged(folder, files)
    with named_errors(folder):
        about = dict(layout.about_handler().restore(layout.absolute(folder) / "about"))
    if about["format_version"] > layout.FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {about['format_version']}; this release of the library reads"
            f" formats up to {layout.FORMAT_VERSION}: install a newer one"
        )
    return about


def damaged_files(folder: str) -> list[str]:
    """Name the files of a checkpoint that are missing or not as they were when it was saved.

    Raises:
        CheckpointError: It is not a checkpoint, or cannot be read.
    """
    path = layout.absolute(folder)
    if not layout.is_complete(path):
        raise CheckpointError(
            f"{folder} is not a complete native checkpoint: no {layout.MARKER} in it"
        )
    with named_errors(folder):
        return layout.damaged_files(path)


def damaged(folder: str, what: Sequence[str]) -> Damaged:
    """Return the error that lists what is damaged, and says what to do."""
    return Damaged(f"{folder} is damaged: {', '.join(what)}{ADVICE}")


def named_errors(folder: str) -> contextlib.AbstractContextManager[None]:
    """Say which checkpoint could not be read, and what to do, when Orbax raises."""
    return layout.named_errors(f"{folder} cannot be read", ADVICE)


def _read_arrays(
    folder: str,
    prefix: str,
    target: Any,
    about: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    *,
    cast: bool = False,
) -> Any:
    state_folder = layout.absolute(folder) / "state"
    wanted = layout.by_path(target, prefix)
    with agreed(folder):
        with named_errors(folder):
            stored = layout.state_handler().metadata(state_folder).tree
        problems = _differences(stored, wanted, prefix, cast=cast)
        if problems:
            problems += _config_differences(about["extra"].get("config"), config)
            raise CheckpointError("\n  - ".join([f"{folder} does not fit:", *problems]))
        as_stored = {
            path: jax.ShapeDtypeStruct(it.shape, stored[path].dtype, sharding=_sharding(it))
            for path, it in wanted.items()
        }
        largest_gb = (
            max((it.size * it.dtype.itemsize for it in as_stored.values()), default=0) / 1e9
        )
        handler = layout.state_handler(max(_READ_GB, 1.01 * largest_gb))
        args = ocp.args.PyTreeRestore(
            item=as_stored,
            restore_args={
                path: ocp.ArrayRestoreArgs(sharding=it.sharding, global_shape=it.shape)
                for path, it in as_stored.items()
            },
            partial_restore=True,
        )
        with named_errors(folder):
            restored = handler.restore(state_folder, args=args)
    arrays = {path: restored.pop(path) for path in wanted}
    found = fingerprints(arrays)
    known = about["fingerprints"]
    changed = [f"{path} (changed)" for path in wanted if found[path] != known.get(path)]
    if changed:
        raise damaged(folder, changed)
    for path, it in wanted.items():  # one by one: the narrow and the wide need not both have room
        arrays[path] = arrays[path].astype(it.dtype)
    return jax.tree.unflatten(jax.tree.structure(target), arrays.values())


@contextlib.contextmanager
def agreed(folder: str) -> Iterator[None]:
    """Let every process fail where one does, so that none waits for those that gave up.

    All processes must come here. Damage is only what no process takes for another failure: what
    follows from it must be the same for all.
    """
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as caught:
        error = caught
    severity = 0 if error is None else 1 if isinstance(error, Damaged) else 2
    if jax.process_count() > 1:
        worst = int(multihost_utils.process_allgather(np.int32(severity)).max())
        if severity < worst:
            kind = Damaged if worst == 1 else CheckpointError
            text = f"{folder} cannot be read by another process, which says why"
            raise kind(text if error is None else str(error)) from error
    if error is not None:
        raise error


def _differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str, *, cast: bool
) -> list[str]:
    problems, castable = [], False
    within = {path for path in stored if not prefix or path.startswith(prefix + "/")}
    for path in sorted(within | wanted.keys()):
        here = _shape(stored[path]) if path in within else "nothing"
        asked = _shape(wanted[path]) if path in wanted else "nothing"
        if here == asked:
            continue
        widened = path in within and path in wanted and _is_widened(stored[path], wanted[path])
        if not (widened and cast):
            problems.append(f"{path}: {here} in the checkpoint, {asked} asked for")
            castable |= widened
    if castable and prefix == "params":
        problems.append("restore_params(..., cast=True) reads weights into a wider type")
    of_optimizer = {path for path in wanted if path.startswith("opt_state/")}
    if not prefix and of_optimizer and not any(path in within for path in of_optimizer):
        problems.append(
            "it holds weights alone, without an optimizer's moments: train on from it with fresh "
            "ones, in a run of its own (--tune-model-path PATH --fresh-opt)"
        )
    return problems


def _is_widened(stored: Any, wanted: Any) -> bool:
    """Whether an array differs from what is asked for in being of a narrower floating type."""
    floating = all(jnp.issubdtype(it.dtype, jnp.floating) for it in (stored, wanted))
    return (
        floating
        and tuple(stored.shape) == tuple(wanted.shape)
        and jnp.promote_types(stored.dtype, wanted.dtype) == wanted.dtype
    )


def _config_differences(
    stored: Mapping[str, Any] | None, current: Mapping[str, Any] | None
) -> list[str]:
    """List the keys of the model that differ, or else all that do."""
    if stored is None or current is None:
        return []
    then = {key: json.dumps(value) for key, value in stored.items()}
    now = {key: json.dumps(value) for key, value in current.items()}
    differing = {key for key in then.keys() | now.keys() if then.get(key) != now.get(key)}
    of_the_model = differing & {field.name for field in dataclasses.fields(ModelConfig)}
    return [
        f"configuration key {key}: {then.get(key, 'absent')} in the checkpoint,"
        f" {now.get(key, 'absent')} now"
        for key in sorted(of_the_model or differing)
    ]


def _shape(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _sharding(array: Any) -> jax.sharding.Sharding:
    if array.sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return array.sharding
