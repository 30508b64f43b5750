"""Read native checkpoints, strictly: what comes back is what was saved, or an error says why not.

Readers need the step folder alone: it may be part of a live run, a copy, or on a read-only disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from mesh_transformer.checkpoints import layout
from mesh_transformer.checkpoints.fingerprint import fingerprints
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.config import ModelConfig

_MIN_READ_GB = 16  # in flight while restoring; more only where one array alone needs it
_ADVICE = "; restore another step or copy the folder again"


def locate(path: str) -> str | None:
    """Find the checkpoint that a path means: a step folder, or the newest one of a run.

    Args:
        path: A step folder (in its run or copied elsewhere), a run's folder, or the folder
            `checkpoints` in it.

    Returns:
        The step folder; None if the path holds no complete native checkpoint.
    """
    given = layout.absolute(path)
    if layout.is_complete(given) and (given / "about").is_dir():
        return str(given)
    for folder in (given / "checkpoints", given):
        step = layout.latest(folder)
        if step is not None:
            return str(layout.step_folder(folder, step))
    return None


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
    """
    about = _read_about(folder)
    return _read_arrays(folder, "", target, about, config), about["extra"]


def restore_params(
    folder: str, target_params: Any, *, config: Mapping[str, Any] | None = None
) -> Any:
    """Read the weights alone, otherwise as `restore`: nothing else of the state is looked at."""
    return _read_arrays(folder, "params", target_params, _read_about(folder), config)


def read_extra(folder: str) -> dict[str, Any]:
    """Give back the `extra` that a checkpoint was saved with."""
    return _read_about(folder)["extra"]


def _read_about(folder: str) -> dict[str, Any]:
    """Read `about.json`, once all files are known to be there and whole."""
    path = layout.absolute(folder)
    if not layout.is_complete(path):
        raise CheckpointError(
            f"{folder} is not a complete native checkpoint: no {layout.MARKER} in it"
        )
    with _named_errors(folder):
        damaged = layout.damaged_files(path)
    if damaged:
        raise CheckpointError(f"{folder} is damaged: {', '.join(damaged)}{_ADVICE}")
    with _named_errors(folder):
        about = dict(layout.about_handler().restore(path / "about"))
    if about["format_version"] > layout.FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {about['format_version']}; this release of the library reads"
            f" formats up to {layout.FORMAT_VERSION}: install a newer one"
        )
    return about


def _read_arrays(
    folder: str,
    prefix: str,
    target: Any,
    about: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> Any:
    state_folder = layout.absolute(folder) / "state"
    wanted = layout.by_path(target, prefix)
    with _named_errors(folder):
        stored = layout.state_handler().metadata(state_folder).tree
    problems = _differences(stored, wanted, prefix)
    if problems:
        problems += _config_differences(about["extra"].get("config"), config)
        raise CheckpointError("\n  - ".join([f"{folder} does not fit:", *problems]))
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args={
            path: ocp.ArrayRestoreArgs(sharding=_sharding(it), global_shape=it.shape)
            for path, it in wanted.items()
        },
        partial_restore=True,
    )
    largest_gb = max((it.size * it.dtype.itemsize for it in wanted.values()), default=0) / 1e9
    handler = layout.state_handler(max(_MIN_READ_GB, 2 * int(largest_gb + 1)))
    with _named_errors(folder):
        restored = handler.restore(state_folder, args=args)
    arrays = {path: restored[path] for path in wanted}
    found = fingerprints(arrays)
    changed = [f"{path} (changed)" for path in wanted if found[path] != about["fingerprints"][path]]
    if changed:
        raise CheckpointError(f"{folder} is damaged: {', '.join(changed)}{_ADVICE}")
    return jax.tree.unflatten(jax.tree.structure(target), arrays.values())


def _named_errors(folder: str) -> contextlib.AbstractContextManager[None]:
    return layout.named_errors(f"{folder} cannot be read", _ADVICE)


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    within = {path for path in stored if not prefix or path.startswith(prefix + "/")}
    for path in sorted(within | wanted.keys()):
        here = _shape(stored[path]) if path in within else "nothing"
        asked = _shape(wanted[path]) if path in wanted else "nothing"
        if here != asked:
            problems.append(f"{path}: {here} in the checkpoint, {asked} asked for")
    return problems


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
