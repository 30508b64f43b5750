"""Checkpoints of mesh-transformer-jax's second model: read, put together, converted, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import memory_source
import ml_dtypes
import numpy as np
import pytest
import small
from fused_run import CORES, KEYS, RUN, STEP, run_config

from mesh_transformer.checkpoints import conversion, fused, opening
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Key, Source
from mesh_transformer.config import ModelConfig
from mesh_transformer.pod.worker import Worker
from mesh_transformer.schema import ConfigError


def written(folder: Path, source: Source, model: ModelConfig, cores: int) -> Path:
    """Write a step as the second model's program does, of one host."""
    by_kind = {"params": (PARAMS,), "opt_state": (MU, NU) if source.counts else ()}
    for name, kinds in by_kind.items():
        arrays: list[Any] = []
        for kind in kinds:
            arrays += _theirs(source, kind, model, cores).values()
        if name == "opt_state" and source.counts:
            adam, schedule = map(np.int32, source.counts)
            arrays = [adam, *arrays, schedule]
        if arrays:
            (folder / name).mkdir(parents=True)
            np.savez(folder / name / "shard_0.npz", *arrays)
    names = list(_theirs(source, PARAMS, model, cores))
    meta = {"total_hosts": 1, "step": source.step, "param_order": names}
    meta["opt_order"] = ["", *names, *names, ""] if source.counts else []
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def _theirs(source: Source, kind: str, model: ModelConfig, cores: int) -> dict[str, np.ndarray]:
    def of(path: str, layer: int | None = None) -> np.ndarray:
        return source.read(Key(kind, f"decoder/{path}", layer))

    def stacked(path: str) -> np.ndarray:
        return np.stack([of(f"layers/block/{path}", i) for i in range(model.layers)])

    def dealt(axis: int, *paths: str) -> np.ndarray:
        parts = [np.split(stacked(path), cores, axis) for path in paths]
        return np.concatenate([part[core] for core in range(cores) for part in parts], axis)

    heads = ("attention/q", "attention/v", "attention/k")
    inputs = (*heads, "ff/in", "ff/gate")
    layer = "/transformer/transformer_layer_shard_v2/~/"
    return {
        "/embed/embedding_shard_v2/~/linear/b": of("embed/b"),
        "/embed/embedding_shard_v2/~/linear/w": of("embed/embeddings"),
        "/proj/projection/~/layer_norm/offset": of("final_norm/offset"),
        "/proj/projection/~/layer_norm/scale": of("final_norm/scale"),
        "/proj/projection/~/linear/b": of("unembed/b"),
        "/proj/projection/~/linear/w": of("unembed/w"),
        layer + "layer_norm/offset": stacked("norm/offset"),
        layer + "layer_norm/scale": stacked("norm/scale"),
        layer + "linear/b": dealt(-1, *(f"{path}/b" for path in inputs)),
        layer + "linear/w": dealt(-1, *(f"{path}/w" for path in inputs)),
        layer + "linear_1/b": stacked("ff/out/b"),
        layer + "linear_1/w": dealt(1, "attention/o/w", "ff/out/w"),
    }


def assert_same_arrays(a: Source, b: Source) -> None:
    assert a.arrays == b.arrays
    assert (a.step, a.counts) == (b.step, b.counts)
    for key in a.arrays:
        assert a.read(key).tobytes() == b.read(key).tobytes(), key


@pytest.mark.thorough
@pytest.mark.parametrize("cores", [1, 2, 3, 4, 8])
def test_any_model_comes_back_from_any_number_of_cores(tmp_path: Path, cores: int) -> None:
    rng = np.random.default_rng(cores)
    for i in range(3):
        n_heads = cores * int(rng.integers(1, 4))
        model = small.parsed(
            layers=int(rng.integers(1, 12)),
            n_heads=n_heads,
            d_model=n_heads * int(rng.integers(1, 5)),
            d_head=2 * int(rng.integers(1, 5)),
            n_vocab=int(rng.integers(3, 60)),
            **KEYS,
        ).model
        dtype = (np.float32, ml_dtypes.bfloat16)[i % 2]
        source = memory_source.of_model(model, i, dtype, moments=i > 0)
        folder = written(tmp_path / f"{i}", source, model, cores)
        assert_same_arrays(fused.Fused(str(folder), model, cores), source)


@pytest.mark.thorough
def test_it_is_tuned_converted_and_verified(tmp_path: Path) -> None:
    run = run_config(model_dir=str(tmp_path / "new"))
    source = opening.open_source(opening.find(str(RUN)), run.model, CORES)
    opening.verify(opening.find(str(RUN)), source, lambda n: None)
    what = Conversion(format="native")
    conversion.convert(
        source, run, str(tmp_path / "native"), what, position={"epoch": 0, "sample": 0}
    )
    native = opening.open_source(opening.find(str(tmp_path / "native")), None)
    assert_same_arrays(native, source)
    worker = Worker(run, jax.devices()[:1])
    worker.tune_from(str(RUN), fresh_opt=False)
    moments = [np.asarray(leaf) for leaf in jax.tree.leaves(worker.state.opt_state)]
    assert any(leaf.any() for leaf in moments if leaf.ndim)
    key = Key(PARAMS, "decoder/layers/block/ff/gate/w", 2)
    gate_LDF = worker.state.params["decoder/layers/block/ff/gate"]["w"]
    np.testing.assert_array_equal(np.asarray(gate_LDF)[2], source.read(key))
    (tmp_path / "run").mkdir()
    shutil.copytree(STEP, tmp_path / "run" / "step_20")
    with pytest.raises(CheckpointError, match="holds a run of mesh-transformer-jax"):
        opening.check_unused(str(tmp_path / "run"))


@pytest.fixture
def step(tmp_path: Path) -> Path:
    shutil.copytree(STEP, tmp_path / "step_20")
    return tmp_path / "step_20"


def opened(folder: Path, cores: int | None = CORES, **keys: Any) -> Source:
    model = run_config(**keys).model
    return opening.open_source(opening.find(str(folder)), model, cores)


def test_the_configuration_of_the_run_alone_is_told_all_that_is_missing() -> None:
    with pytest.raises(CheckpointError) as told:
        opened(STEP, None, gated=False, qkv_bias=False)
    (_, *problems) = str(told.value).split("\n  - ")
    assert problems[:2] == [
        "gated is false, true in mesh-transformer-jax",
        "qkv_bias is false, true in mesh-transformer-jax",
    ]
    assert len(problems) == 3
    assert problems[2].startswith("original_cores is missing: set it to the cores_per_replica of")
    with pytest.raises(CheckpointError, match="hold no configuration: give --config"):
        opening.stored_config(str(STEP))


def test_all_wrong_keys_are_told_at_once() -> None:
    keys = {"layers": 4, "d_model": 64, "d_head": 4, "n_vocab": 64, "o_bias": True}
    with pytest.raises(CheckpointError) as told:
        opened(STEP, 3, **keys)
    for line in (
        "o_bias is true, false in",
        "layers is 4, 3 in the files",
        "d_model is 64, 32 in the files",
        "n_vocab is 64, 128 in the files",
        "n_heads * d_head is 16, 32 in the files",
        "original_cores 3 does not divide n_heads 4; 1, 2, 4 would",
        "original_cores 3 does not divide d_ff 256; 1, 2, 4",
    ):
        assert line in str(told.value)


def test_the_second_model_is_followed_as_one_copy_alone() -> None:
    assert run_config(original_shards=1).optimizer.original_shards == 1
    with pytest.raises(ConfigError, match="held one copy of all parameters; set it to 1"):
        run_config(original_shards=4)


def edit_meta(folder: Path, **keys: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | keys))


def test_checkpoints_of_several_hosts_are_refused(step: Path) -> None:
    edit_meta(step, total_hosts=4)
    with pytest.raises(CheckpointError, match="written by 4 hosts.*Load it with"):
        opened(step)


@pytest.mark.parametrize(
    ("lacks", "told"),
    [
        ("params/shard_0.npz", r"params/shard_0\.npz is missing"),
        ("meta.json", r"meta\.json missing; copy the folder again"),
    ],
)
def test_a_missing_file_is_named(step: Path, lacks: str, told: str) -> None:
    (step / lacks).unlink()
    with pytest.raises(CheckpointError, match=told):
        opened(step)


def test_without_the_optimizer_s_file_the_weights_are_read_alone(step: Path) -> None:
    shutil.rmtree(step / "opt_state")
    source = opened(step)
    assert source.counts is None
    assert {key.kind for key in source.arrays} == {PARAMS}


def test_damaged_lists_of_names_are_told(step: Path) -> None:
    names = json.loads((step / "meta.json").read_text())["param_order"]
    edit_meta(step, opt_order=["", *names, ""])
    with pytest.raises(CheckpointError, match="opt_order of meta.json is not a count"):
        opened(step)
    edit_meta(step, param_order=[*names[:-1], "/other"])
    with pytest.raises(CheckpointError, match="missing or unknown are /other, /transformer/"):
        opened(step)
    edit_meta(step, step="20")
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged: step"):
        opened(step)
    (step / "meta.json").write_text('{"param_order"')
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        opened(step)


def replace(path: Path, index: int, array: np.ndarray | None) -> None:
    with np.load(path) as archive:
        arrays = [archive[name] for name in archive.files]
    arrays[index : index + 1] = [] if array is None else [array]
    np.savez(path, *arrays)


def test_other_numbers_and_shapes_of_arrays_are_told(step: Path) -> None:
    weights, state = (step / name / "shard_0.npz" for name in ("params", "opt_state"))
    pristine = weights.read_bytes(), state.read_bytes()
    replace(state, 3, np.zeros(7, np.float32))
    with pytest.raises(CheckpointError, match=r"mu of /proj/.*offset is \[7\], the weight \[32\]"):
        opened(step)
    replace(state, 25, None)
    with pytest.raises(CheckpointError, match=r"opt_state/shard_0\.npz holds 25 arrays, 26 by"):
        opened(step)
    state.write_bytes(pristine[1])
    replace(weights, 11, np.zeros((3, 128, 32), np.float32))
    with pytest.raises(CheckpointError, match=r"linear_1/w: \[3, 128, 32\] in the files, \[3, 160"):
        opened(step)
    replace(weights, 11, None)
    with pytest.raises(CheckpointError, match="holds 11 arrays, 12 by"):
        opened(step)
    weights.write_bytes(pristine[0])
    replace(weights, 9, np.zeros((3, 32, 3 * 32 + 4 * 32), np.float32))
    with pytest.raises(CheckpointError, match="an early revision.* no gate, and is not read here"):
        opened(step)


@pytest.mark.thorough
def test_a_flipped_bit_of_any_layer_is_found(step: Path) -> None:
    path = step / "params" / "shard_0.npz"
    pristine = path.read_bytes()
    for at in range(len(pristine) // 60, len(pristine), len(pristine) // 30):
        data = bytearray(pristine)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="shard_0.npz"):
            source = opened(step)
            for key in source.arrays:
                source.read(key)


def test_a_compressed_archive_is_read_too(step: Path) -> None:
    expected = opened(STEP)
    for name in ("params", "opt_state"):
        with np.load(step / name / "shard_0.npz") as archive:
            arrays = [archive[it] for it in archive.files]
        np.savez_compressed(step / name / "shard_0.npz", *arrays)
    assert_same_arrays(opened(step), expected)


def test_a_folder_of_the_first_model_is_not_taken_for_one_of_the_second(tmp_path: Path) -> None:
    model = small.parsed().model
    source = memory_source.of_model(model)
    what = Conversion(format="original")
    conversion.convert(source, small.parsed(), str(tmp_path / "step_7"), what, position={})
    assert opening.find(str(tmp_path / "step_7")).format == "original"
    with pytest.raises(CheckpointError, match="is of mesh-transformer-jax's first model"):
        fused.Fused(str(tmp_path / "step_7"), model, 1)
