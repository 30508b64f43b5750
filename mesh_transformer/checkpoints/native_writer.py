"""Write native checkpoints from any source, in memory for two arrays of one layer.

Orbax is handed a tree whose leaves are not arrays but say where their parts come from; a handler of
ours writes those, part by part, into the same files as Orbax's own handler would. All else (names,
metadata, the commit) is Orbax's and the same as for every other save.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts

from mesh_transformer import storage
from mesh_transformer.checkpoints import layout, retention
from mesh_transformer.checkpoints.fingerprint import as_digits, box_sum
from mesh_transformer.checkpoints.fitting import cast
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Array, Key, Source
from mesh_transformer.config import OptimizerConfig
from mesh_transformer.training.optimizer import make_optimizer
from mesh_transformer.training.steps import TrainState


def write(
    folder: str,
    source: Source,
    *,
    extra: Mapping[str, Any],
    dtype: np.dtype[Any] | None = None,
    moments: bool = True,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> None:
    """Write a step folder: the weights of a source and, if it has them, an optimizer's moments.

    On a local disk it is written beside its place and then renamed; in a bucket the marker comes
    last. With moments it is what a run saves at `source.step`, and a run can go on from it; without
    them it holds weights alone.

    Args:
        folder: A new step folder; `RUN/checkpoints/step_N` for it to be a run's.
        source: Read array by array, each once.
        extra: JSON-able, as for `Checkpoints.save`: the configuration is in it.
        dtype: Of the weights; None for the source's own, which moments keep.
        moments: Whether to write the moments that the source has.
        advance: Told of the bytes of each array that has been read.

    Raises:
        CheckpointError: The source is damaged, there is something at the folder, or it cannot be
            written.
    """
    retention.check_kept(folder)
    place = layout.absolute(folder)
    if storage.exists(str(place)):
        raise CheckpointError(f"{folder} is there already: write to another folder, or delete it")
    state = layout.by_path(_state(source, dtype, moments and source.counts is not None))
    handler = _PartsHandler(advance)
    about = {"step": source.step, "format_version": layout.FORMAT_VERSION, "extra": extra}
    about = json.loads(json.dumps(about))
    begun = layout.being_written(place)

    def finish() -> None:
        """Write down what only those who have written all arrays know."""
        prints = {path: handler.fingerprint(path) for path in state}
        layout.write_json(begun / "about" / "about.json", about | {"fingerprints": prints})
        layout.list_files(begun)

    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=layout.FILE_BYTES),
        about=ocp.args.JsonSave(about),
    )
    layout.make_folder(place.parent)
    writer = layout.make_writer(place, finish, (_Parts, handler))
    try:
        with (
            layout.named_errors(f"writing {folder} failed", writing=True),
            contextlib.ExitStack() as unless_finished,
        ):
            unless_finished.callback(layout.delete, begun)
            writer.save(place, args=items)
            writer.wait_until_finished()
            unless_finished.pop_all()
    finally:
        writer.close()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """An array to be written, of which nothing is read yet.

    Attributes:
        keys: Of its layers in order, or of the whole.
        read: Reads what a key means.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    keys: tuple[Key, ...]
    read: Callable[[Key], np.ndarray]

    @property
    def nbytes(self) -> int:
        return Array(self.shape, self.dtype).n_bytes

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of one layer, or of all where they are small."""
        alone = layout.is_by_layer(self.keys[0].layer is not None, self.shape, self.dtype)
        return (1, *self.shape[1:]) if alone else self.shape

    @property
    def part_bytes(self) -> int:
        return Array(self.part_shape, self.dtype).n_bytes

    @property
    def is_cut(self) -> bool:
        return self.part_shape != self.shape

    @property
    def n_parts(self) -> int:
        return len(self.keys) if self.is_cut else 1

    def part(self, i: int) -> np.ndarray:
        """Read and convert a part: of a cut array, its layer i."""
        if self.is_cut:
            return self._converted(self.keys[i])[None]
        if self.keys[0].layer is not None:
            return np.stack([self._converted(key) for key in self.keys])
        return self._converted(self.keys[0])

    def _converted(self, key: Key) -> np.ndarray:
        return np.asarray(cast(self.read(key), self.dtype, str(key)), order="C")


def _state(source: Source, dtype: np.dtype[Any] | None, moments: bool) -> Any:
    """Return the tree of what is to be written; with moments it has a train state's structure."""

    def parts(kind: str) -> dict[str, dict[str, _Parts]]:
        layers: dict[str, list[Key]] = collections.defaultdict(list)
        for key in source.arrays:
            if key.kind == kind:
                layers[key.path].append(key)
        tree: dict[str, dict[str, _Parts]] = collections.defaultdict(dict)
        for path, keys in sorted(layers.items()):
            module, _, name = path.rpartition("/")
            keys = sorted(keys, key=lambda key: key.layer or 0)
            one = source.arrays[keys[0]]
            stacked = keys[0].layer is not None
            shape = (len(keys), *one.shape) if stacked else one.shape
            tree[module][name] = _Parts(
                shape, np.dtype((kind == PARAMS and dtype) or one.dtype), tuple(keys), source.read
            )
        return dict(tree)

    def number(value: int) -> _Parts:
        return _Parts((), np.dtype(np.int32), (Key("", ""),), lambda _: np.asarray(value, np.int32))

    params = parts(PARAMS)
    if not moments or source.counts is None:
        return {"params": params}
    # Which hyperparameters it has does not matter for its state's structure.
    any_config = OptimizerConfig(warmup_steps=1, anneal_steps=1, lr=1, end_lr=1, weight_decay=1)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    opt_state = []
    for part in jax.eval_shape(make_optimizer(any_config, "layernorm").init, shapes):
        if isinstance(part, optax.ScaleByAdamState):
            part = part._replace(count=number(source.counts.adam), mu=parts(MU), nu=parts(NU))
        elif isinstance(part, optax.ScaleByScheduleState):
            part = part._replace(count=number(source.counts.schedule))
        opt_state.append(part)
    return TrainState(number(source.step), params, tuple(opt_state))  # type: ignore[arg-type]


class _PartsHandler(ocp.type_handlers.TypeHandler):
    """Writes arrays that are given part by part, so that they are read back as jax arrays."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._sums: dict[str, list[concurrent.futures.Future[int]]] = collections.defaultdict(list)

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(
        self,
        values: Sequence[_Parts],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        """Write everything before returning or raising: nothing is left to wait for."""
        under_way: list[Any] = []
        try:
            await self._write(values, infos, under_way)
        finally:  # or files would come to be in a folder that is being deleted
            await asyncio.gather(*under_way, return_exceptions=True)
        return []

    async def _write(
        self,
        values: Sequence[_Parts],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        under_way: list[Any],
    ) -> None:
        """Write, with what is being written listed in `under_way`."""
        # Of two layers, so that one is read while one is written; what is larger is alone.
        largest = max(value.part_bytes for value in values)
        budget = max((2 * value.part_bytes for value in values if value.is_cut), default=largest)
        n_bytes = 0
        with concurrent.futures.ThreadPoolExecutor(1) as adding:
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                opened = await _create(value, info)
                for first in range(value.n_parts):
                    # Many small ones are written together, into few files.
                    if n_bytes + value.part_bytes > budget:
                        await asyncio.gather(*under_way)
                        under_way.clear()
                        n_bytes = 0
                    part = value.part(first)
                    starts = [first, *[0] * (part.ndim - 1)] if part.ndim else []
                    summed = adding.submit(box_sum, part, starts, value.shape)
                    self._sums[info.name].append(summed)
                    target = opened[first : first + len(part)] if part.ndim else opened
                    written = target.write(part, can_reference_source_data_indefinitely=True)
                    under_way += [asyncio.wrap_future(summed), written]
                    n_bytes += part.nbytes
                    if value.keys[0].kind:  # not a count
                        self._advance(part.nbytes)
                    del part
            await asyncio.gather(*under_way)

    def fingerprint(self, path: str) -> str:
        """Give the fingerprint of an array that is written."""
        return as_digits(sum(summed.result() for summed in self._sums[path]))

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError


async def _create(value: _Parts, info: ocp.type_handlers.ParamInfo) -> Any:
    """Create an array, chunked as a save of ours on one device does."""
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=value.shape,
        local_shape=value.part_shape,
        dtype=value.dtype,
        process_index=jax.process_index(),
        arg=layout.save_args(info.name, value.shape, value.dtype),
    )
    return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
