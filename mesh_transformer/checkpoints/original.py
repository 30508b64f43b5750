"""Checkpoints of mesh-transformer-jax (its first model, which GPT-J-6B is), read.

    step_383500/shard_0/0.npz ... 15.npz    one folder a shard, always 16 files in each
    step_383500/shard_1/...

All arrays of the state, flattened as JAX does it, are dealt in order to the 16 files: the
optimizer's (Adam's count, first moments, second moments, the schedule's count), the weights, the
step. A slim checkpoint has weights and step alone, mostly in bfloat16. No names are stored: which
array is which follows from the configuration, so a folder is read with one and checked against it.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mesh_transformer import network_rules, storage
from mesh_transformer.checkpoints import npz, roles
from mesh_transformer.checkpoints.fitting import model_arrays
from mesh_transformer.checkpoints.layout import CheckpointError, first_of
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, TABLE, Array, Counts, Key
from mesh_transformer.config import ModelConfig

N_FILES = 16
_ROOT = "causal_transformer_shard/~/"
_READERS = 4  # shards read at a time


class Leaf(NamedTuple):
    """One array in the original's order.

    Attributes:
        name: Ours of the original's: "mu/causal_transformer_shard/~/...", "step".
        key: Our array; None for counts, and for an offset that `layernorm-nobias` never uses.
        role: What the shards hold of it; None for counts.
        param: Its own name in its module: "w", "scale".
        part: What one shard holds; of counts too.
    """

    name: str
    key: Key | None
    role: roles.Role | None
    param: str
    shape: tuple[int, ...]

    def part_shape(self, n_shards: int) -> tuple[int, ...]:
        return roles.part_shape(self.role, self.shape, n_shards) if self.role else self.shape


def weight_leaves(model: ModelConfig) -> list[Leaf]:
    """List a model's weights in the original's order: by module, as text, then by name.

    As text layer_10 comes before layer_2.
    """
    shapes = model_arrays(model)
    found = []
    for row in roles.rows_of(model):
        for layer in range(model.layers) if "{}" in row.module else (None,):
            key = Key(PARAMS, f"decoder/{row.path}", layer)
            module = _ROOT + row.module.format(layer)
            held = parts_of(key)
            if held[0] in shapes:
                shape = shapes[held[0]]
                shape = (*shape[:-1], len(held) * shape[-1]) if len(held) > 1 else shape
                leaf = Leaf("", key, row.role, row.name, shape)
            elif row.name == "offset" and model.norm == "layernorm-nobias":
                leaf = Leaf("", None, row.role, row.name, (model.d_model,))
            else:
                continue
            found.append((module, row.name, leaf))
    found.sort(key=lambda it: it[:2])
    return [leaf._replace(name=f"params/{module}/{name}") for module, name, leaf in found]


def parts_of(key: Key) -> tuple[Key, ...]:
    """List our arrays in one of theirs: of queries, keys and values, where it holds all three."""
    if roles.COMBINED not in key.path:
        return (key,)
    return tuple(key._replace(path=key.path.replace(roles.COMBINED, name)) for name in "qkv")


def leaves(model: ModelConfig, *, moments: bool) -> list[Leaf]:
    """List all arrays of a state in the original's order."""
    weights = weight_leaves(model)
    listed = list(weights)
    if moments:
        listed = [
            _count("adam count"),
            *(_of_kind(leaf, MU) for leaf in weights),
            *(_of_kind(leaf, NU) for leaf in weights),
            _count("schedule count"),
            *weights,
        ]
    return [*listed, _count("step")]


def _count(name: str) -> Leaf:
    return Leaf(name, None, None, "", ())


def _of_kind(leaf: Leaf, kind: str) -> Leaf:
    key = None if leaf.key is None else leaf.key._replace(kind=kind)
    return leaf._replace(name=kind + leaf.name.removeprefix(PARAMS), key=key)


def is_original(folder: str) -> bool:
    """Say whether a folder is a step of the original's."""
    return storage.exists(storage.join(folder, "shard_0", "0.npz"))


def check_computed(model: ModelConfig) -> None:
    """Refuse a model that the original's first one cannot be.

    Raises:
        CheckpointError: Every key that says otherwise is listed.
    """
    if problems := network_rules.unlike(network_rules.ORIGINAL, vars(model)):
        heading = "mesh-transformer-jax has no checkpoints of such a model:"
        raise CheckpointError("\n  - ".join([heading, *problems]))


def check_held(model: ModelConfig) -> None:
    """Refuse a model whose shards neither the original nor its fork has.

    Raises:
        CheckpointError: Every key that says otherwise is listed, by which of both is closer.
    """
    kinds = (network_rules.ORIGINAL, network_rules.FORK)
    if problems := min((network_rules.unlike(it, vars(model)) for it in kinds), key=len):
        heading = "mesh-transformer-jax has no checkpoints of such a model:"
        raise CheckpointError("\n  - ".join([heading, *problems]))


def n_files_of(n_leaves: int) -> list[int]:
    """Say how many arrays each of the 16 files holds: the first ones may hold one more."""
    each, more = divmod(n_leaves, N_FILES)
    return [each + 1] * more + [each] * (N_FILES - more)


class Original:
    """A step folder of the original, opened and checked against a model.

    Raises:
        CheckpointError: It is not whole, or of another model: every difference is listed, with the
            key of the configuration that would make up for it. Or it is of none that the original
            computes.
    """

    def __init__(self, folder: str, model: ModelConfig) -> None:
        self.where = folder
        self.known: Mapping[str, Any] = {}
        if network_rules.unlike(network_rules.FORK, vars(model)):
            check_computed(model)
        self._n_heads = model.n_heads
        self._readers, self._room = concurrent.futures.ThreadPoolExecutor(_READERS), npz.Room()
        self.n_shards = count_shards(folder)
        self._members = [self._open(shard) for shard in range(self.n_shards)]
        weights, full = leaves(model, moments=False), leaves(model, moments=True)
        self._leaves = full if (n_found := len(self._members[0])) == len(full) else weights
        if n_found != len(self._leaves):
            check_computed(model)  # what has other arrays is most likely not of the fork
            raise CheckpointError(_wrong_number(folder, n_found, model))
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            # Of shard 0; what others say is looked at as it is read.
            found = list(pool.map(npz.describe, self._members[0]))
        if problems := self._misfits(found, model):
            heading = f"{folder} does not fit the configuration:"
            raise CheckpointError("\n  - ".join([heading, *problems]))
        self._at = {
            key: i for i, leaf in enumerate(self._leaves) if leaf.key for key in parts_of(leaf.key)
        }
        spare = [i for i, leaf in enumerate(self._leaves) if leaf.role and not leaf.key]
        self.unused = [members[i] for members in self._members for i in spare]
        shapes = model_arrays(model)
        self.arrays: Mapping[Key, Array] = {
            key: Array(shapes[key._replace(kind=PARAMS)], found[i].dtype)
            for key, i in self._at.items()
        }
        numbers = self._counts(0)
        for shard in range(1, self.n_shards):
            if (others := self._counts(shard)) != numbers:
                told = f"shard_0 has {numbers}, shard_{shard} {others}; copy all shards of one step"
                raise CheckpointError(f"{folder} is of several checkpoints: {told}")
        self.step = numbers["step"]
        self.counts: Counts | None = None
        if self._leaves is full:
            self.counts = Counts(numbers["adam count"], numbers["schedule count"])
        dtypes = {array.dtype.name for key, array in self.arrays.items() if key.kind == PARAMS}
        what = "with" if self.counts else "without"
        self.about = (
            f"checkpoint of mesh-transformer-jax, {self.n_shards} shard(s), "
            f"{' and '.join(sorted(dtypes))}, {what} optimizer state, step {self.step}"
        )

    def _counts(self, shard: int) -> dict[str, int]:
        """Read a shard's numbers: of its step and of the optimizer's parts."""
        return {
            leaf.name: int(npz.read(self._members[shard][i]))
            for i, leaf in enumerate(self._leaves)
            if leaf.role is None
        }

    def read(self, key: Key) -> np.ndarray:
        """Read one array from all shards, and merge them."""
        leaf = self._leaves[self._at[key]]
        assert leaf.key is not None
        merged, parts = self._merged(key), parts_of(leaf.key)
        if len(parts) == 1:
            return merged
        by_head = merged.reshape(*merged.shape[:-1], self._n_heads, len(parts), -1)
        own = by_head[..., parts.index(key), :]
        return np.ascontiguousarray(own).reshape(self.arrays[key].shape)

    def _merged(self, key: Key) -> np.ndarray:
        at = self._at[key]
        leaf = self._leaves[at]
        whole = Array(leaf.shape, self.arrays[key].dtype)
        assert leaf.role is not None
        axis = roles.split_axis(leaf.role)
        if axis is None:
            copies = [self._part(at, shard) for shard in range(self.n_shards)]
            return roles.merge_copies(leaf.role, key.kind, copies, f"{key} in {self.where}")
        merged = np.empty(whole.shape, whole.dtype)
        parts = np.split(merged, self.n_shards, axis)  # views

        def fill(shard: int) -> None:
            parts[shard][...] = self._part(at, shard, self._room)

        if self.n_shards == 1:
            merged = self._part(at, 0)
        else:
            list(self._readers.map(fill, range(self.n_shards)))
        scale = roles.gathered_scale(leaf.role, key.kind, self.n_shards)
        return merged if scale == 1 else (merged * scale).astype(whole.dtype)

    def _part(self, at: int, shard: int, *room: npz.Room) -> np.ndarray:
        part = npz.read(self._members[shard][at], *room)
        leaf = self._leaves[at]
        expected = leaf.part_shape(self.n_shards)
        assert leaf.key is not None
        dtype = self.arrays[parts_of(leaf.key)[0]].dtype
        if (part.shape, part.dtype) != (expected, dtype):
            raise CheckpointError(
                f"{self._members[shard][at]} is {list(part.shape)} of {part.dtype}; {leaf.name} is "
                f"{list(expected)} of {dtype} in shard 0"
            )
        return part

    def _open(self, shard: int) -> list[npz.Member]:
        """List the arrays of a shard, in order."""
        folder = storage.join(self.where, f"shard_{shard}")
        archives = [storage.join(folder, f"{i}.npz") for i in range(N_FILES)]
        there = {storage.join(folder, name) for name in storage.children(folder)}
        missing = [path for path in archives if path not in there]
        if missing:
            raise CheckpointError(
                f"{self.where} is not whole: {', '.join(missing)} missing; copy the folder again"
            )
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            listed = list(pool.map(npz.members, archives))
        sizes, n = [len(inside) for inside in listed], sum(map(len, listed))
        if sizes != n_files_of(n):
            raise CheckpointError(
                f"{self.where}/shard_{shard} is not whole: its files hold {sizes} arrays, but "
                f"{n} are dealt as {n_files_of(n)}"
            )
        return [member for inside in listed for member in inside]

    def _misfits(self, found: list[Array], model: ModelConfig) -> list[str]:
        """List what is not as the configuration says."""
        problems = [
            f"shard_{shard} holds {len(inside)} arrays, shard_0 holds {len(found)}"
            for shard, inside in enumerate(self._members)
            if len(inside) != len(found)
        ]
        wrong = [
            (leaf, array)
            for leaf, array in zip(self._leaves, found, strict=True)
            if array.shape != leaf.part_shape(self.n_shards)
        ]
        shapes = [
            f"{leaf.name}: {list(array.shape)} in each of {self.n_shards} shard(s), "
            f"{list(leaf.part_shape(self.n_shards))} by the configuration"
            for leaf, array in wrong
        ]
        problems += first_of(shapes)
        if wrong:
            problems += _keys_to_change(found, self._leaves, model, self.n_shards)
        return problems


def count_shards(folder: str) -> int:
    """Count the shards of a step folder.

    Raises:
        CheckpointError: One between others is missing.
    """
    names = storage.children(folder)
    numbers = sorted(int(name[6:]) for name in names if name[:6] == "shard_" and name[6:].isdigit())
    missing = sorted(set(range(numbers[-1] + 1 if numbers else 1)) - set(numbers))
    if missing:
        there = ", ".join(f"shard_{n}" for n in missing)
        raise CheckpointError(f"{folder} is not whole: {there} missing; copy the folder again")
    return len(numbers)


def _wrong_number(folder: str, n_found: int, model: ModelConfig) -> str:
    """Say which number of layers a checkpoint with so many arrays has."""
    slim, full = (len(leaves(model, moments=moments)) for moments in (False, True))
    n_weights = slim - 1
    per_layer = sum(1 for leaf in weight_leaves(model) if "/layer_0/" in leaf.name)
    others = n_weights - per_layer * model.layers
    fitting = [
        (n_there - others) // per_layer
        for n_there in ([(n_found - 3) // 3] if (n_found - 3) % 3 == 0 else []) + [n_found - 1]
        if n_there > others and (n_there - others) % per_layer == 0
    ]
    advice = (
        f"set layers to {' or '.join(map(str, fitting))}"
        if fitting
        else "norm and pe decide which arrays there are: set them as in the run that wrote it"
    )
    return (
        f"{folder} holds {n_found} arrays a shard; a model with layers {model.layers}, norm "
        f"{model.norm} and pe {model.pe} has {full}, or {slim} without optimizer state: {advice}"
    )


def _keys_to_change(
    found: list[Array], listed: list[Leaf], model: ModelConfig, n_shards: int
) -> list[str]:
    """Name the keys whose values the arrays' shapes contradict."""
    by_path = {leaf.key: array.shape for leaf, array in zip(listed, found, strict=True)}
    table = by_path.get(TABLE, ())
    ff = by_path.get(Key(PARAMS, "decoder/layers/block/ff/in/b", 0), ())
    query = by_path.get(Key(PARAMS, "decoder/layers/block/attention/q/w", 0), ())
    held: dict[str, int] = {}
    if len(table) == 2:
        held |= {"n_vocab": table[0] * n_shards, "d_model": table[1]}
    if len(ff) == 1:
        held["d_ff"] = ff[0] * n_shards
    if len(query) == 2:
        held["n_heads * d_head"] = query[1] * n_shards
    positions = by_path.get(Key(PARAMS, "decoder/positions/embeddings"), ())
    if len(positions) == 2:
        held["seq"] = positions[0]
    heads = by_path.get(Key(PARAMS, "decoder/relative_positions/embeddings"), ())
    if len(heads) == 2:
        held["n_heads"] = heads[0] * n_shards
    now = vars(model) | {"n_heads * d_head": model.n_heads * model.d_head}
    wrong = [f"{key} is {now[key]}, {n} in the files" for key, n in held.items() if now[key] != n]
    missing = {now[key] / (n / n_shards) for key, n in held.items() if key != "d_model"} - {0}
    if "d_model" in held and held["d_model"] == model.d_model and len(missing) == 1:
        (needed,) = missing
        wrong.append(f"or shards are missing: there are {n_shards}, {needed:g} would fit")
    return wrong
