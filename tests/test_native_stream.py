"""Native checkpoints layer by layer: written from any source, read as one, and verified."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, like, mesh, saved

from mesh_transformer.checkpoints import layout, native, native_writer
from mesh_transformer.checkpoints.fingerprint import as_digits, box_sum, fingerprints
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints, Damaged
from mesh_transformer.checkpoints.native_source import NativeSource
from mesh_transformer.checkpoints.pieces import verify
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Array, Counts, Key
from mesh_transformer.training.steps import TrainState

BFLOAT16 = np.dtype(jnp.bfloat16)
EXTRA: dict[str, Any] = {"config": {"layers": 2, "lr": 0.1}, "position": {"epoch": 0, "sample": 24}}


def trained(dp: int = 1, mp: int = 1, **keys: Any) -> TrainState:
    """A state with something in each of its arrays, the same on every mesh."""
    state = small.start(dp, mp, **keys)
    rng = np.random.default_rng(0)

    def filled(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.int32:
            return jax.device_put(np.int32(rng.integers(1, 100)), leaf.sharding)
        return jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)

    return jax.tree.map(filled, state)._replace(
        step=jax.device_put(np.int32(7), state.step.sharding)
    )


class Held:
    """A source that holds a train state in memory."""

    where = "memory"
    about = "made up"
    known: dict[str, Any] = {}

    def __init__(self, state: TrainState) -> None:
        adam, schedule = state.opt_state[1], state.opt_state[3]
        self.step = int(state.step)
        self.counts: Counts | None = Counts(int(adam.count), int(schedule.count))
        self._arrays = {
            Key(kind, path, layer): np.asarray(leaf if layer is None else leaf[layer])
            for kind, tree in ((PARAMS, state.params), (MU, adam.mu), (NU, adam.nu))
            for path, leaf in layout.by_path(tree).items()
            for layer in (range(len(leaf)) if layout.is_stacked(path) else (None,))
        }
        self.arrays = {key: Array(a.shape, a.dtype) for key, a in self._arrays.items()}
        self.reads: list[Key] = []

    def read(self, key: Key) -> np.ndarray:
        self.reads.append(key)
        return self._arrays[key]


@pytest.fixture(params=[1, 2**20], ids=["by-layer", "together"])
def by_layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers as small as a test's cut apart, as those of real models are, or not."""
    monkeypatch.setattr(layout, "BY_LAYER_BYTES", request.param)


# Writing


@pytest.mark.thorough
@pytest.mark.parametrize("on", [(1, 1), (2, 4)])
@pytest.mark.usefixtures("by_layer")
def test_what_is_written_layer_by_layer_is_what_a_run_saves(
    tmp_path: Path, on: tuple[int, int]
) -> None:
    keys = {"zero_stage": 3} if on != (1, 1) else {}
    state, source = trained(*on, **keys), Held(trained())
    told: list[int] = []
    folder = tmp_path / "written" / "checkpoints" / "step_7"
    native_writer.write(str(folder), source, extra=EXTRA, advance=told.append)
    assert sorted(source.reads) == sorted(source.arrays)
    assert sum(told) == sum(array.n_bytes for array in source.arrays.values())
    assert os.listdir(folder.parent) == ["step_7"]
    with Checkpoints(str(tmp_path / "written")) as checkpoints:
        restored, extra = checkpoints.restore(7, like(state))
        checkpoints.save(8, restored, extra)
    assert_same(restored, state)
    assert extra == EXTRA
    theirs = Path(saved(tmp_path / "saved", state, 7, EXTRA))
    for name in ("about/about.json", "state/_METADATA"):
        assert sorted((folder / name).read_text()) == sorted((theirs / name).read_text())


@pytest.mark.thorough
def test_weights_alone_are_written_and_read_and_are_no_run_to_go_on(tmp_path: Path) -> None:
    state, folder = trained(), str(tmp_path / "step_0")
    native_writer.write(folder, Held(state), extra={}, dtype=BFLOAT16, moments=False)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    assert_same(native.restore_params(folder, like(narrow)), narrow)
    with pytest.raises(CheckpointError) as told:
        native.restore(folder, like(state))
    lines = str(told.value).splitlines()
    assert "  - opt_state/1/count: nothing in the checkpoint, int32[] asked for" in lines
    assert lines[-1].endswith("in a run of its own (--tune-model-path PATH --fresh-opt)")
    assert NativeSource(folder).counts is None


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_are_widened_when_asked_for_by_name_and_never_narrowed(
    tmp_path: Path, dtype: Any
) -> None:
    state = trained(2, 4, zero_stage=3)
    folder = str(tmp_path / "step_0")
    native_writer.write(folder, Held(trained()), extra={}, dtype=np.dtype(dtype), moments=False)
    wanted = like(state).params
    with pytest.raises(CheckpointError, match=r"does not fit:(.*\n)*.*restore_params.*cast=True"):
        native.restore_params(folder, wanted)
    widened = native.restore_params(folder, wanted, cast=True)
    assert_same(widened, jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), state.params))
    for got, asked in zip(*map(jax.tree.leaves, (widened, wanted)), strict=True):
        assert got.sharding == asked.sharding
    wide = saved(tmp_path, state)
    narrow = jax.tree.map(
        lambda it: jax.ShapeDtypeStruct(it.shape, dtype, sharding=it.sharding), wanted
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        native.restore_params(wide, narrow, cast=True)


class Broken(Held):
    """Ends half-way."""

    def read(self, key: Key) -> np.ndarray:
        if key.kind == NU:
            raise CheckpointError("shard 3 is cut off")
        return super().read(key)


def test_a_write_that_fails_leaves_nothing_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_7"
    with pytest.raises(CheckpointError, match=r"writing .*step_7 failed: shard 3 is cut off"):
        native_writer.write(str(folder), Broken(trained()), extra={})
    assert not list(folder.parent.iterdir())
    native_writer.write(str(folder), Held(trained()), extra={})
    with pytest.raises(CheckpointError, match="is there already"):
        native_writer.write(str(folder), Held(trained()), extra={})


@pytest.mark.thorough
def test_what_is_being_written_is_waited_for_when_something_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[concurrent.futures.Future[None]] = []

    class Slow:
        """An array of TensorStore's whose writes take half a second."""

        def __getitem__(self, part: slice) -> Slow:
            return self

        def write(self, part: np.ndarray, **options: object) -> asyncio.Future[None]:
            begun: concurrent.futures.Future[None] = concurrent.futures.Future()
            threading.Timer(0.5, begun.set_result, [None]).start()
            ended.append(begun)
            return asyncio.wrap_future(begun)

    async def create(value: object, info: object) -> Slow:
        return Slow()

    monkeypatch.setattr(native_writer, "_create", create)
    monkeypatch.setattr(
        native_writer.layout, "delete", lambda _: done.extend(it.done() for it in ended)
    )
    done: list[bool] = []
    with pytest.raises(CheckpointError, match="failed: shard 3 is cut off"):
        native_writer.write(str(tmp_path / "step_7"), Broken(trained()), extra={})
    assert done and all(done)


# Reading


@pytest.mark.usefixtures("by_layer")
def test_what_a_run_saves_on_a_mesh_is_read_layer_by_layer(tmp_path: Path) -> None:
    state = trained(2, 4, zero_stage=3)
    source, held = NativeSource(saved(tmp_path, state, 7, EXTRA)), Held(trained())
    assert source.arrays == held.arrays
    assert (source.step, source.counts) == (7, held.counts)
    assert source.known.items() >= EXTRA["config"].items()
    assert source.about == "native checkpoint of step 7, float32, with moments"
    for key in source.arrays:
        np.testing.assert_array_equal(source.read(key), held.read(key))


def test_stacked_layers_are_cut_apart_on_the_disk_on_every_mesh(tmp_path: Path) -> None:
    """And no part of an array is gathered for it: each is a device's own, or a piece of that."""
    stacked = jnp.zeros((6, 64, 8192))
    for dims in [(None, "dp", "mp"), (None, None, None)]:
        placed = jax.device_put(stacked, NamedSharding(mesh(2, 4), PartitionSpec(*dims)))
        folder = saved(tmp_path / str(dims), {"a/layers/w": placed})
        found = layout.state_handler().metadata(layout.absolute(folder) / "state").tree
        shape = found["a/layers/w"].storage.chunk_shape
        assert shape == (1, *placed.sharding.shard_shape(placed.shape)[1:])


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [np.float32, np.int32, BFLOAT16, np.bool_])
def test_parts_add_up_to_the_fingerprint_of_the_whole(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_transformer.checkpoints.fingerprint._PIECE", 100)
    whole = np.random.default_rng(0).normal(size=(4, 6, 50)).astype(dtype)
    wanted = fingerprints({"a": jnp.asarray(whole)})["a"]
    layers = [box_sum(whole[i : i + 1], (i, 0, 0), whole.shape) for i in range(4)]
    columns = [box_sum(whole[:, :, i : i + 25], (0, 0, i), whole.shape) for i in (0, 25)]
    rows = [box_sum(whole[2:, i : i + 1], (2, i, 0), whole.shape) for i in range(6)]
    assert as_digits(sum(layers)) == as_digits(sum(columns)) == wanted
    assert as_digits(sum(layers[:2]) + sum(rows)) == wanted
    scalar = np.asarray(whole[0, 0, 0])
    assert as_digits(box_sum(scalar, (), ())) == fingerprints({"a": jnp.asarray(scalar)})["a"]


# Damage


READERS: dict[str, Callable[[str], Any]] = {
    "restore": lambda folder: native.restore(folder, like(small.start())),
    "verify": verify,
    "source": lambda folder: [(s := NativeSource(folder)), *map(s.read, s.arrays)],
}


def test_a_sound_checkpoint_is_verified(tmp_path: Path) -> None:
    state = trained(2, 4, zero_stage=3)
    told: list[int] = []
    verify(saved(tmp_path, state), told.append)
    assert sum(told) == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_damage_that_files_do_not_tell_is_named_by_all_arrays_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in files too long to read twice: only what is in them tells."""
    monkeypatch.setattr(layout, "_CHECKSUM_BYTES", 0)
    state = trained()
    folder = saved(tmp_path, state)
    damaged = {
        "params/decoder/unembed/w": state.params["decoder/unembed"]["w"],
        "opt_state/1/nu/decoder/unembed/w": state.opt_state[1].nu["decoder/unembed"]["w"],
    }
    for leaf in damaged.values():
        value = np.asarray(leaf).reshape(-1)[3:7].tobytes()
        (path,) = [
            path
            for path in Path(folder).rglob("*")
            if path.is_file() and value in path.read_bytes()
        ]
        flipped = bytes([value[0] ^ 1]) + value[1:]
        path.write_bytes(path.read_bytes().replace(value, flipped))
    for reader in READERS.values():
        with pytest.raises(Damaged, match=r"unembed/w \(changed\)"):
            reader(folder)
    with pytest.raises(Damaged) as told:
        verify(folder)
    assert all(f"{path} (changed)" in str(told.value) for path in damaged)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["cut", "flipped", "missing"])
@pytest.mark.parametrize("listed", [True, False], ids=["checksums", "lengths"])
def test_every_kind_of_damaged_file_is_refused_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, listed: bool
) -> None:
    if not listed:
        monkeypatch.setattr(layout, "_CHECKSUM_BYTES", 0)
    folder = Path(saved(tmp_path, trained(), 7, EXTRA))
    kinds = {path.parent / path.name[:3]: path for path in folder.rglob("*") if path.is_file()}
    unread = {"_CHECKPOINT_METADATA", layout.MARKER}
    for path in kinds.values():
        if path.name in unread:
            continue
        content = path.read_bytes()
        if how == "missing":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif listed or path.name == "files.json":
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        else:
            continue  # bits of arrays are above; of all else, checksums tell
        name = (
            "" if path.name == "files.json" and how != "missing" else str(path.relative_to(folder))
        )
        for reader in READERS.values():
            with pytest.raises(Damaged) as told:
                reader(str(folder))
            assert str(folder) in str(told.value) and name in str(told.value)
        path.write_bytes(content)
    verify(str(folder))


# Memory


MEASURED = """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    from mesh_transformer.checkpoints import native_source, native_writer, pieces
    from mesh_transformer.checkpoints.source import PARAMS, Array, Key

    folder = sys.argv[1]
    shape = (4096, 4096)  # 64 MB


    class Made:
        where, about, step, counts, known = "memory", "made up", 0, None, {}

        def __init__(self, layers):
            paths = [Key(PARAMS, "decoder/layers/block/w", layer) for layer in range(layers)]
            self.arrays = {key: Array(shape, np.dtype(np.float32)) for key in paths}

        def read(self, key):
            return np.full(shape, key.layer, np.float32)


    def high():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


    def all_of(layers):
        step = f"{folder}/step_{layers}"
        native_writer.write(step, Made(layers), extra={})
        told = [high()]
        source = native_source.NativeSource(step)
        for key in source.arrays:
            assert (source.read(key) == key.layer).all()
        told.append(high())
        pieces.verify(step)
        return [*told, high()]


    before = all_of(1)[-1]  # what is compiled, and TensorStore's threads
    print(*[now - before for now in all_of(16)])
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells of peak memory")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Sixteen layers of 64 MB take less than five beyond what one took."""
    # Without it the C library keeps freed arrays of up to 32 MB, more of them the busier a machine.
    freed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), tmp_path],
        env=os.environ | freed | {"PYTHONPATH": str(Path(native.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    write, read, verified = map(float, done.stdout.split())
    assert write < 320 and read < 320 and verified < 320, done.stdout
