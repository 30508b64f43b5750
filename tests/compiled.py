"""Reads compiled programs: what devices exchange, over which mesh axis, and inside which loop."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.model.sampling import Choice
from mesh_transformer.training.steps import Continuation, Steps, TrainState

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True, order=True)
class Array:
    """Type and dimensions of an array, as one device holds it."""

    dtype: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def size(self) -> int:
        return math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program's text.

    Attributes:
        outputs: The array it makes, or those of the tuple it makes.
        operands: Names of its arguments.
        attributes: What follows its arguments.
    """

    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def source(self) -> str:
        """Where in the source program it comes from: `jit(train)/while/body/...`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction where it runs.

    Attributes:
        inputs: The arrays of its arguments.
        loops: The loops around it, the outermost first.
    """

    instruction: Instruction
    inputs: tuple[Array, ...]
    loops: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What devices send each other at one place of the program.

    Attributes:
        kind: One of `COLLECTIVES`, however the compiler starts and ends it.
        axis: `dp`, `mp` or `dp mp`; "" where each device is alone.
        arrays: What is reduced or gathered, in full: before a scatter, after a gather.
        loops: The loops around it, the outermost first.
        source: Where in the source program it comes from.
    """

    kind: str
    axis: str
    arrays: tuple[Array, ...]
    loops: tuple[str, ...]
    source: str


class Program:
    """What one device runs, of a program compiled for a mesh of `dp` x `mp` devices."""

    def __init__(self, compiled: jax.stages.Compiled, dp: int, mp: int) -> None:
        self.memory: Any = compiled.memory_analysis()
        text = compiled.as_text()
        assert text is not None, "this backend does not show its programs"
        self._devices = np.arange(dp * mp).reshape(dp, mp)
        self._computations = dict(_computations(text))
        (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
        self.operations = tuple(self._run(entry, ()))

    @functools.cached_property
    def loops(self) -> collections.Counter[str]:
        """How many loops there are of each name."""
        found = (o.instruction for o in self.operations if o.instruction.opcode == "while")
        return collections.Counter(_loop_name(line.source) for line in found)

    @functools.cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        return tuple(
            self._exchange(operation)
            for operation in self.operations
            if operation.instruction.opcode.removesuffix("-start") in COLLECTIVES
        )

    @functools.cached_property
    def arrays(self) -> frozenset[Array]:
        """All arrays that instructions make, fused ones too."""
        return frozenset(a for o in self.operations for a in o.instruction.outputs)

    def exchanged(
        self, axis: str, keep: Callable[[Exchange], bool] = lambda exchange: True
    ) -> collections.Counter[str]:
        """Count the arrays exchanged over an axis by `innermost loop: kind array`; no scalars."""
        return collections.Counter(
            f"{(exchange.loops or ('step',))[-1]}: {exchange.kind} {array}"
            for exchange in self.exchanges
            if exchange.axis == axis and keep(exchange)
            for array in exchange.arrays
            if array.size > 1
        )

    def _run(self, computation: str, loops: tuple[str, ...]) -> Iterator[Operation]:
        lines = self._computations[computation]
        for line in lines.values():
            arguments = (lines[name].outputs for name in line.operands if name in lines)
            yield Operation(line, tuple(a for arrays in arguments for a in arrays), loops)
            inside = (*loops, _loop_name(line.source)) if line.opcode == "while" else loops
            for called in _called(line.attributes):
                yield from self._run(called, inside)

    def _exchange(self, operation: Operation) -> Exchange:
        line, given = operation.instruction, operation.inputs
        # What starts an exchange returns its arguments as well, before what it makes.
        made = line.outputs[-len(given) :]
        arrays = max(given, made, key=lambda arrays: sum(a.size for a in arrays))
        kind = line.opcode.removesuffix("-start")
        return Exchange(kind, self._axis(line), arrays, operation.loops, line.source)

    def _axis(self, line: Instruction) -> str:
        whole = [self._devices.ravel()]
        axes: dict[str, Any] = {"": self._devices.reshape(-1, 1), "dp mp": whole}
        axes |= {"mp": self._devices, "dp": self._devices.T}
        groups = _groups(line.attributes)
        # Where an axis has one device, others span the same groups: singles first, `dp mp` last.
        for axis in ("", "dp", "mp", "dp mp"):
            if _sets(groups) == _sets(axes[axis]):
                return axis
        raise ValueError(f"{line.source}: no axis of the mesh connects {_sets(groups)}")


def _loop_name(source: str) -> str:
    """Name a loop: one over microbatches or drawn tokens, or over layers in one direction."""
    way = "backward" if "transpose(" in source else "forward"
    if "encoder" in source:
        return f"encoder {way}"
    return f"layers {way}" if "decoder" in source else "rounds"


def _computations(text: str) -> Iterator[tuple[str, dict[str, Instruction]]]:
    name = ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines = header.group(1), {}
        elif line == "}":
            yield name, lines
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            lines[found.group(1)] = _instruction(found.group(2))


def _instruction(text: str) -> Instruction:
    """Parse `f32[2,16]{1,0} add(%a, %b), metadata={...}`."""
    found = re.search(r"(?<=[\s)}\]])([a-z][\w\-]*)\(((?:[^()]|\([^()]*\))*)\)", text)
    if found is None:
        raise ValueError(f"this is no instruction: {text[:200]}")
    operands = tuple(re.findall(r"%([\w.\-]+)", found.group(2)))
    return Instruction(
        found.group(1), _arrays(text[: found.start()]), operands, text[found.end() :]
    )


def _arrays(types: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(_numbers(dims)))
        for dtype, dims in re.findall(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]", types)
    )


def _called(attributes: str) -> list[str]:
    one = re.findall(r"\b(?:body|condition|to_apply|calls)=%?([\w.\-]+)", attributes)
    several = re.findall(r"\b(?:branch|called)_computations=\{([^}]*)\}", attributes)
    return one + [name.strip(" %") for names in several for name in names.split(",")]


def _groups(attributes: str) -> Iterable[Any]:
    """Return the groups of devices that exchange, in any of the three ways that XLA writes them."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if counted := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", attributes):
        shape, *source = counted.groups()
        return _devices(*source).reshape(_numbers(shape))
    of_mesh = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({order}\))? \{{(.*?)\}}"
    if (axes := re.search(of_mesh, attributes)) is None:
        raise ValueError(f"no groups of devices in {attributes[:200]}")
    names, shape, transposed, crossed = axes.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", names)}
    n_devices = math.prod(sizes.values())
    grid = _devices(shape or str(n_devices), transposed).reshape(tuple(sizes.values()))
    last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", crossed)]
    first = [i for i in range(len(sizes)) if i not in last]
    return grid.transpose(first + last).reshape(-1, math.prod(grid.shape[i] for i in last))


def _devices(shape: str, order: str | None) -> np.ndarray:
    """Return device numbers as XLA abbreviates them: `[2,4]T(1,0)` counts up, then transposes."""
    grid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return grid.transpose(_numbers(order)) if order else grid


def _sets(groups: Iterable[Any]) -> set[frozenset[int]]:
    return {frozenset(map(int, group)) for group in groups}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def state_bytes(state: TrainState) -> int:
    """Return how much of a train state one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def compile_sampling(
    steps: Steps, n_sequences: int, n_slots: int, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, jax.stages.Compiled, jax.stages.Compiled]:
    """Compile the copying of weights, the reading of prompts, and decoding, each for the last."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    copies = steps.copies.lower(steps.state.params).compile(options)
    weights = _results(copies)
    prompts = array(n_sequences, n_slots)
    prefill = steps.prefill.lower(weights, prompts, n_slots).compile(options)
    ids_B, numbers_B = array(n_sequences), array(n_sequences, dtype=jnp.float32)
    start = Continuation(
        tokens_BS=array(n_sequences, n_slots),
        logprobs_BS=array(n_sequences, n_slots, dtype=jnp.float32),
        position_B=ids_B,
        last_B=ids_B,
        done_B=array(n_sequences, dtype=jnp.bool_),
        cache=_results(prefill),
    )
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n_sequences))
    choice = Choice(numbers_B, ids_B, numbers_B, keys_B)
    decode = steps.decode.lower(weights, start, choice, array(1), array()).compile(options)
    return copies, prefill, decode


def _results(compiled: jax.stages.Compiled) -> Any:
    """Return what a program returns, as shapes with shardings, to lower the next program for."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        compiled.out_info,
        compiled.output_shardings,
    )
