"""Checkpoints of mesh-transformer-jax's second model (`CausalTransformerV2`), which are only read.

    step_20/meta.json               step, number of hosts, names of the arrays
    step_20/params/shard_0.npz      the weights, one file a host
    step_20/opt_state/shard_0.npz   Adam's count, first moments, second moments, schedule's count

Arrays of layers are stacked. A layer has two matrices: one makes queries, values, keys and both
halves of a gated feed-forward layer, the other takes what attention and feed-forward return back.
Their columns, and their rows, are dealt to the cores of a replica,

    [core 0: q v k in gate] [core 1: q v k in gate] ...     [core 0: attention ff] [core 1: ...] ...

so that an arrangement is of one `cores_per_replica`, which the files do not say. In memory there is
one array of one layer, if archives are stored as `np.savez` does; of a compressed one all layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import network_rules, relations, storage
from mesh_transformer.checkpoints import npz, original
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Array, Counts, Key
from mesh_transformer.config import ModelConfig

_EMBED = "/embed/embedding_shard_v2/~/linear/"
_HEAD = "/proj/projection/~/"
_LAYER = "/transformer/transformer_layer_shard_v2/~/"
_BLOCK = "layers/block/"
_INPUTS = ("attention/q", "attention/v", "attention/k", "ff/in", "ff/gate")
_OUTPUTS = ("attention/o", "ff/out")


class Place(NamedTuple):
    """Where one of our arrays is.

    Attributes:
        name: The array of theirs that holds it.
        parts: What that array is dealt to cores as, in order; () if it is ours as it is.
    """

    name: str
    parts: tuple[str, ...] = ()


PLACES = {
    "embed/b": Place(_EMBED + "b"),
    "embed/embeddings": Place(_EMBED + "w"),
    "final_norm/offset": Place(_HEAD + "layer_norm/offset"),
    "final_norm/scale": Place(_HEAD + "layer_norm/scale"),
    "unembed/b": Place(_HEAD + "linear/b"),
    "unembed/w": Place(_HEAD + "linear/w"),
    _BLOCK + "norm/offset": Place(_LAYER + "layer_norm/offset"),
    _BLOCK + "norm/scale": Place(_LAYER + "layer_norm/scale"),
    **{f"{_BLOCK}{part}/b": Place(_LAYER + "linear/b", _INPUTS) for part in _INPUTS},
    **{f"{_BLOCK}{part}/w": Place(_LAYER + "linear/w", _INPUTS) for part in _INPUTS},
    _BLOCK + "ff/out/b": Place(_LAYER + "linear_1/b"),  # one bias for the sum of both branches
    **{f"{_BLOCK}{part}/w": Place(_LAYER + "linear_1/w", _OUTPUTS) for part in _OUTPUTS},
}
"""By our path below "decoder/"."""
NAMES = tuple(dict.fromkeys(place.name for place in PLACES.values()))
"""Of their arrays, in the order of their files."""


def is_fused(folder: str) -> bool:
    """Say whether a folder is a step of the second model's, whole or not."""
    meta = storage.join(folder, "meta.json")
    if storage.exists(storage.join(folder, "params", "shard_0.npz")):
        return True
    return storage.exists(meta) and '"param_order"' in storage.read_text(meta)


class Fused:
    """A step folder of the second model, opened and checked against a model of ours.

    Args:
        cores: The `cores_per_replica` of the run that wrote it.

    Raises:
        CheckpointError: It is not whole, of several hosts, or of another model: every difference is
            listed, with the key of the configuration that would make up for it.
    """

    def __init__(self, folder: str, model: ModelConfig, cores: int | None) -> None:
        self.where = folder
        self.known: Mapping[str, Any] = {}
        meta = _read_meta(folder)
        self.step: int = meta["step"]
        weights, described = _opened(storage.join(folder, "params", "shard_0.npz"), NAMES)
        problems = [*_keys_to_change(described, model), *_misarranged(cores, model)]
        shapes = {} if problems else model_arrays(model)
        problems += _misfits(described, model, shapes) if shapes else []
        if problems:
            heading = f"{folder}, of the second model, does not fit the configuration:"
            raise CheckpointError("\n  - ".join([heading, *problems]))
        assert cores is not None
        self._cores, self._model = cores, model
        self._members = {(PARAMS, name): member for name, member in weights.items()}
        self._dtypes = {(PARAMS, name): array.dtype for name, array in described.items()}
        self.counts = self._open_moments(meta, described)
        kinds = (PARAMS, MU, NU) if self.counts else (PARAMS,)
        self.arrays: Mapping[Key, Array] = {
            key._replace(kind=kind): Array(shape, self._dtypes[kind, place(key).name])
            for kind in kinds
            for key, shape in shapes.items()
        }
        self._checked: set[npz.Member] = set()
        dtypes = sorted({array.dtype.name for array in described.values()})
        self.about = (
            f"checkpoint of mesh-transformer-jax's second model, arranged for {cores} core(s) a "
            f"replica (original_cores), {' and '.join(dtypes)}, "
            f"{'with' if self.counts else 'without'} optimizer state, step {self.step}"
        )

    def _open_moments(self, meta: Mapping[str, Any], weights: Mapping[str, Array]) -> Counts | None:
        """Find Adam's moments, by their order alone: both have the weights' names."""
        path = storage.join(self.where, "opt_state", "shard_0.npz")
        if not storage.exists(path):
            return None
        if meta["opt_order"] != ["", *NAMES, *NAMES, ""]:
            raise CheckpointError(
                f"{self.where}: opt_order of meta.json is not a count, two moments of each weight "
                "and a count, as the original's optimizer has them; move opt_state away to read "
                "the weights alone"
            )
        listed = ["adam", *(f"{kind} {name}" for kind in (MU, NU) for name in NAMES), "schedule"]
        members, described = _opened(path, listed)
        for kind in (MU, NU):
            for name, weight in weights.items():
                moment = described[f"{kind} {name}"]
                if moment.shape != weight.shape:
                    raise CheckpointError(
                        f"{path}: {kind} of {name} is {list(moment.shape)}, the weight "
                        f"{list(weight.shape)}; copy the folder again"
                    )
                self._members[kind, name] = members[f"{kind} {name}"]
                self._dtypes[kind, name] = moment.dtype
        return Counts(int(npz.read(members["adam"])), int(npz.read(members["schedule"])))

    def read(self, key: Key) -> np.ndarray:
        """Read one array of one layer, and put together what each core had of it."""
        there = place(key)
        member = self._members[key.kind, there.name]
        if key.layer is None:
            return npz.read(member)
        if member not in self._checked:  # once: its layers are read one by one
            npz.check(member)
            self._checked.add(member)
        held = npz.read_entry(member, key.layer)
        if not there.parts:
            return held
        axis = 0 if there.parts is _OUTPUTS else held.ndim - 1
        sizes = _part_sizes(there.parts, self._model)
        part = next(part for part in sizes if f"{_BLOCK}{part}/" in key.path)
        begin = 0
        for before in there.parts[: there.parts.index(part)]:
            begin += sizes[before] // self._cores
        n_each = held.shape[axis] // self._cores
        by_core = held.reshape(*held.shape[:axis], self._cores, n_each, *held.shape[axis + 1 :])
        cut = slice(begin, begin + sizes[part] // self._cores)
        of_part = by_core[(slice(None),) * (axis + 1) + (cut,)]
        return np.ascontiguousarray(of_part).reshape(self.arrays[key].shape)


def place(key: Key) -> Place:
    """Say where one of our arrays is."""
    return PLACES[key.path.removeprefix("decoder/")]


def _part_sizes(parts: tuple[str, ...], model: ModelConfig) -> dict[str, int]:
    heads = model.n_heads * model.d_head
    return {part: heads if part.startswith("attention") else model.d_ff for part in parts}


def _read_meta(folder: str) -> dict[str, Any]:
    path = storage.join(folder, "meta.json")
    if not storage.exists(path):
        if original.is_original(folder):
            raise CheckpointError(
                f"{folder} is of mesh-transformer-jax's first model, not its second"
            )
        raise CheckpointError(f"{folder} is not whole: {path} missing; copy the folder again")
    try:
        meta = json.loads(storage.read_text(path))
        kinds = {"step": int, "total_hosts": int, "param_order": list, "opt_order": list}
        wrong = [key for key, kind in kinds.items() if not isinstance(meta[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; copy the folder again") from error
    if wrong:
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)}; copy the folder again")
    if meta["total_hosts"] != 1:
        raise CheckpointError(
            f"{folder} was written by {meta['total_hosts']} hosts, each of which saved every so-"
            "many-th piece of the arrays: this library reads what one host saved. Load it with "
            "mesh-transformer-jax on one host and save it again there"
        )
    if tuple(meta["param_order"]) != NAMES:
        other = sorted(set(meta["param_order"]) ^ set(NAMES))
        raise CheckpointError(
            f"{path} does not name the arrays of the second model in their order"
            + (f"; missing or unknown are {', '.join(map(str, other))}" if other else "")
        )
    return dict(meta)


def _opened(path: str, names: Any) -> tuple[dict[str, npz.Member], dict[str, Array]]:
    """List what is in an archive, by names in its order, and describe it."""
    members = npz.members(path)
    if len(members) != len(names):
        raise CheckpointError(
            f"{path} holds {len(members)} arrays, {len(names)} by meta.json; copy the folder again"
        )
    described = [npz.describe(member) for member in members]
    return dict(zip(names, members, strict=True)), dict(zip(names, described, strict=True))


def _keys_to_change(found: Mapping[str, Array], model: ModelConfig) -> list[str]:
    """Name the keys that the model contradicts, or the shapes of its arrays do."""
    held: dict[str, int] = {}
    table, inputs = found[_EMBED + "w"].shape, found[_LAYER + "linear/w"].shape
    if len(table) == 2 and len(inputs) == 3:
        held = {"layers": inputs[0], "d_model": table[1], "n_vocab": table[0]}
        heads, odd = divmod(inputs[2] - 8 * table[1], 3)
        held |= {} if odd else {"n_heads * d_head": heads}
    now = vars(model) | {"n_heads * d_head": model.n_heads * model.d_head}
    if held and inputs[2] == 3 * now["n_heads * d_head"] + 4 * table[1]:
        return ["it is of an early revision, whose second model had no gate, and is not read here"]
    shapes = [f"{key} is {now[key]}, {n} in the files" for key, n in held.items() if now[key] != n]
    return [*network_rules.unlike(network_rules.FUSED, vars(model)), *shapes]


def _misarranged(cores: int | None, model: ModelConfig) -> list[str]:
    """Say why arrays cannot be arranged for so many cores."""
    if cores is None:
        return [
            "original_cores is missing: set it to the cores_per_replica of the run that wrote the "
            "checkpoint, by which its matrices are arranged and which its files do not say"
        ]
    return [
        f"original_cores {cores} does not divide {key} {n}; {relations.divisors(n)} would"
        for key, n in (("n_heads", model.n_heads), ("d_ff", model.d_ff))
        if n % cores
    ]


def _misfits(
    found: Mapping[str, Array], model: ModelConfig, shapes: Mapping[Key, tuple[int, ...]]
) -> list[str]:
    """List arrays that are not as the model's are, put together."""
    problems = []
    for path, there in PLACES.items():
        if there.parts and path.removeprefix(_BLOCK).rpartition("/")[0] != there.parts[0]:
            continue  # told of the first part
        stacked = path.startswith(_BLOCK)
        shape = shapes[Key(PARAMS, f"decoder/{path}", 0 if stacked else None)]
        if there.parts:
            axis = 0 if there.parts is _OUTPUTS else len(shape) - 1
            n = sum(_part_sizes(there.parts, model).values())
            shape = (*shape[:axis], n, *shape[axis + 1 :])
        shape = (model.layers, *shape) if stacked else shape
        if found[there.name].shape != shape:
            problems.append(
                f"{there.name}: {list(found[there.name].shape)} in the files, {list(shape)} by the "
                "configuration"
            )
    return problems
