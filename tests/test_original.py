"""Checkpoints of mesh-transformer-jax: read, written, merged, split, refused when not whole."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import memory_source
import ml_dtypes
import numpy as np
import original as golden
import original_steps
import pytest
import small

from mesh_transformer import network_rules
from mesh_transformer.checkpoints import npz, original, original_writer
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Key, Source
from mesh_transformer.config import ModelConfig

NORMS = (
    "layernorm", "layernorm-nobias", "rmsnorm", "rmsnorm-bias", "scalenorm", "scalenorm-bias",
)  # fmt: skip
VARIANTS = [*itertools.product(NORMS, ("rotary", "t5", "fixed"))]


def written(
    folder: Path, source: Source, model: ModelConfig, n_shards: int, dtype: Any = None
) -> Path:
    folder.mkdir(parents=True)
    original_writer.write(
        str(folder),
        source,
        model,
        n_shards=n_shards,
        dtype=dtype,
        moments=source.counts is not None,
        advance=lambda n: None,
    )
    return folder


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*.npz"))
    assert names == sorted(path.relative_to(ours) for path in ours.rglob("*.npz"))
    for name in names:
        assert (ours / name).stat().st_size == (theirs / name).stat().st_size
        with zipfile.ZipFile(ours / name) as a, zipfile.ZipFile(theirs / name) as b:
            assert a.namelist() == b.namelist()
            for member in a.namelist():  # header and all
                assert a.read(member) == b.read(member), (name, member)


def assert_same_arrays(a: Source, b: Source, ulps: float = 0) -> None:
    assert a.arrays == b.arrays
    assert (a.step, a.counts) == (b.step, b.counts)
    for key in a.arrays:
        x, y = a.read(key), b.read(key)
        if ulps == 0:
            assert x.tobytes() == y.tobytes(), key
        else:
            about = ml_dtypes.finfo(x.dtype)
            eps, least = float(about.eps), 8 * float(about.smallest_subnormal)
            x, y = x.astype(np.float64), y.astype(np.float64)
            np.testing.assert_allclose(x, y, rtol=ulps * eps, atol=least, err_msg=str(key))


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size"), original_steps.STEPS)
def test_a_checkpoint_of_the_original_is_read_and_written_as_the_same_files(
    tmp_path: Path, name: str, size: str
) -> None:
    step = original_steps.find(name, size)
    source = original.Original(str(step.folder), step.config.model)
    assert source.step == 20
    assert source.counts == ((20, 20) if size == "full" else None)
    again = written(tmp_path / "again", source, step.config.model, step.n_shards)
    assert_same_files(again, step.folder)


@pytest.mark.parametrize(("name", "size"), original_steps.STEPS)
def test_arrays_are_in_the_order_of_the_original(name: str, size: str) -> None:
    step = original_steps.find(name, size)
    ours = original.leaves(step.config.model, moments=size == "full")
    renamed = {"adam count": "opt_state/2/count", "schedule count": "opt_state/5/count"}
    names = [
        renamed.get(leaf.name)
        or (f"opt_state/2/{leaf.name}" if leaf.name[:2] in (MU, NU) else leaf.name)
        for leaf in ours
    ]
    assert names == [leaf["name"] for leaf in step.leaves]
    shapes = [list(leaf.part_shape(step.n_shards)) for leaf in ours]
    assert shapes == [leaf["shape_per_shard"] for leaf in step.leaves]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "size"), original_steps.STEPS)
def test_weights_are_merged_by_name(name: str, size: str) -> None:
    """Against the merge that the parity tests use, which is written apart from the library."""
    step = original_steps.find(name, size)
    source = original.Original(str(step.folder), step.config.model)
    shards = golden.read_leaves(step.folder, step.leaves, step.n_shards)
    weights = {k.removeprefix("params/"): v for k, v in shards.items() if k.startswith("params/")}
    merged = golden.merge(
        {k: golden.as_float32(v) for k, v in weights.items()},
        golden.MERGE_WEIGHT,
        step.config.model,
    )
    held = {key for key in source.arrays if key.kind == PARAMS}
    assert len(held) == sum(
        step.config.model.layers if "/layers/" in module else 1
        for module, leaves in merged.items()
        for _ in leaves
    )
    for key in held:
        module, leaf = key.path.rsplit("/", 1)
        whole = merged[module][leaf] if key.layer is None else merged[module][leaf][key.layer]
        ours = source.read(key)
        eps = 2**-8 if size == "slim" else 2**-21  # theirs rounds after each of up to 8 copies
        np.testing.assert_allclose(ours.astype(np.float32), whole, rtol=eps, atol=0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*step, marks=pytest.mark.slow) if i % 3 else step
        for i, step in enumerate(original_steps.STEPS)
    ],
)
def test_other_numbers_of_shards_and_back_are_the_identity(
    tmp_path: Path, name: str, size: str
) -> None:
    step = original_steps.find(name, size)
    model = step.config.model
    source = original.Original(str(step.folder), model)
    for n in (n for n in (1, 2, 4, 8) if model.n_heads % n == 0 and n != step.n_shards):
        other = written(tmp_path / f"{n}", source, model, n)
        between = original.Original(str(other), model)
        assert between.n_shards == n
        assert_same_arrays(between, source)
        back = written(tmp_path / f"{n} and back", between, model, step.n_shards)
        assert_same_files(back, step.folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("norm", "pe"),
    [
        pytest.param(*kind, marks=pytest.mark.slow) if i % 4 else kind
        for i, kind in enumerate(VARIANTS)
    ],
)
def test_any_model_in_any_dtype_comes_back_from_any_number_of_shards(
    tmp_path: Path, norm: str, pe: str
) -> None:
    rng = np.random.default_rng(VARIANTS.index((norm, pe)))
    for i in range(3):
        n_shards = int(rng.integers(1, 7))
        keys: dict[str, Any] = {
            "layers": int(rng.integers(1, 13)),
            "n_heads": n_shards * int(rng.integers(1, 3)),
            "n_vocab": n_shards * int(rng.integers(1, 9)),
            "seq": int(rng.integers(2, 9)),
            "norm": norm,
            "pe": pe,
        }
        keys["d_model"] = keys["n_heads"] * 2 * int(rng.integers(1, 4))
        model = small.parsed(**keys).model
        dtype = rng.choice(np.array([np.float32, np.float16, ml_dtypes.bfloat16]))
        source = memory_source.of_model(model, i, dtype, moments=bool(rng.integers(2)))
        folder = written(tmp_path / f"{i}", source, model, n_shards)
        back = original.Original(str(folder), model)
        assert back.n_shards == n_shards
        # Shares of a sum are rounded unless the number of shards is a power of two; and float16's
        # shares may be too small for all their digits.
        exact = math.log2(n_shards).is_integer() and dtype != np.float16
        assert_same_arrays(back, source, ulps=0 if exact else 1)
        one = original.Original(str(written(tmp_path / f"{i} merged", back, model, 1)), model)
        assert_same_arrays(one, back, ulps=0 if exact else 1)


def test_copies_that_differ_are_summed_and_the_unused_ones_ignored(tmp_path: Path) -> None:
    model = small.parsed().model
    folder = written(tmp_path / "step_7", memory_source.of_model(model), model, 4)
    leaves = original.leaves(model, moments=False)
    index = {leaf.key: i for i, leaf in enumerate(leaves)}
    bias = Key(PARAMS, "decoder/layers/block/ff/out/b", 0)
    scale = Key(PARAMS, "decoder/final_norm/scale")
    rng = np.random.default_rng(0)
    copies = rng.normal(size=(2, 4, model.d_model)).astype(np.float32)
    for shard in range(4):
        for key, values in ((bias, copies[0]), (scale, copies[1])):
            replace(folder / f"shard_{shard}", index[key], values[shard], len(leaves))
    source = original.Original(str(folder), model)
    np.testing.assert_allclose(source.read(bias), copies[0].astype(np.float64).sum(0), rtol=1e-7)
    np.testing.assert_array_equal(source.read(scale), copies[1][0])


def replace(shard: Path, index: int, array: np.ndarray, n_leaves: int) -> None:
    """Write another array over the one at `index` of a shard."""
    sizes = original.n_files_of(n_leaves)
    file = next(i for i in range(16) if index < sum(sizes[: i + 1]))
    path = shard / f"{file}.npz"
    with np.load(path) as archive:
        arrays = [archive[name] for name in archive.files]
    arrays[index - sum(sizes[:file])] = array
    np.savez(path, *arrays)


def test_archives_are_what_savez_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: list[Any] = [
        rng.normal(size=(3, 5)).astype(np.float32),
        np.int32(7),
        rng.normal(size=(2, 1, 4)).astype(ml_dtypes.bfloat16),
        np.zeros((0, 3), np.float16),
    ]
    with npz.Writer(str(tmp_path / "ours.npz")) as writer:
        for array in arrays:
            writer.add(np.asarray(array))
    theirs = io.BytesIO()
    np.savez(theirs, *arrays)
    assert (tmp_path / "ours.npz").read_bytes() == theirs.getvalue()
    back = [npz.read(member) for member in npz.members(str(tmp_path / "ours.npz"))]
    for a, b in zip(arrays, back, strict=True):
        assert (np.asarray(a).dtype, np.shape(a)) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == b.tobytes()


def test_a_compressed_archive_is_read_too(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)
    np.savez_compressed(tmp_path / "0.npz", array)
    (member,) = npz.members(str(tmp_path / "0.npz"))
    np.testing.assert_array_equal(npz.read(member), array)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step folder of four shards with optimizer state, of `small`'s model."""
    source = memory_source.of_model(small.parsed().model, moments=True)
    return written(tmp_path / "step_7", source, small.parsed().model, 4)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def opened(folder: Path, **keys: Any) -> Source:
    return original.Original(str(folder), small.parsed(**keys).model)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"layers": 3}, "layers 3, .* set layers to 2"),
        ({"norm": "rmsnorm"}, "norm rmsnorm and pe rotary .* set layers to 2|norm and pe decide"),
        ({"pe": "fixed"}, "pe fixed has .* norm and pe decide"),
        ({"d_model": 64}, "d_model is 64, 32 in the files"),
        ({"n_vocab": 72}, "n_vocab is 72, 64 in the files"),
        ({"d_ff": 64}, "d_ff is 64, 128 in mesh-transformer-jax"),
        ({"d_head": 8}, "d_head is 8, 4 in mesh-transformer-jax"),
    ],
)
def test_a_wrong_configuration_is_told_which_key_to_change(
    step: Path, keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){told}"):
        opened(step, **keys)


@pytest.mark.parametrize("variant", small.VARIANTS)
def test_a_model_that_the_original_does_not_compute_is_refused_key_by_key(
    step: Path, variant: str
) -> None:
    keys = small.VARIANTS[variant]
    # Of the window, the stretching and its factors the first says all.
    named = keys.keys() - {"window_every", "pe_rotary_dims", "pe_scaling_factors"}
    named -= {"pe"} if keys["pe"] in ("rotary", "t5", "fixed", "none") else set()
    with pytest.raises(CheckpointError, match="no checkpoints of such a model") as refused:
        opened(step, **keys)
    assert sorted(re.findall(r"- (\w+) is ", str(refused.value))) == sorted(named)


def test_every_key_of_a_model_is_free_or_held_to_what_the_original_computes() -> None:
    """A key that is new in a model must be in `ORIGINAL`, or change nothing computed."""
    sizes = {"layers", "d_model", "n_heads", "n_vocab", "seq", "pe_rotary_dims", "n_tokens"}
    programs = {"compute_dtype", "remat", "unroll", "attention"}
    others = {"pe_scaling_factors", "window_every", "z_loss"}  # of another key, or of training
    others |= {"dropout_embedding", "dropout_attention", "dropout_residual"}
    others |= {*network_rules.MUP, "encoder_seq", "pad_id"}  # of muP, of an encoder
    keys = {field.name for field in dataclasses.fields(ModelConfig)}
    assert keys == set(network_rules.ORIGINAL) | sizes | programs | others
    plain = small.parsed().model
    assert network_rules.unlike(network_rules.ORIGINAL, vars(plain)) == []


def test_missing_shards_are_named(step: Path) -> None:
    shutil.move(step / "shard_3", step.parent / "kept")
    with pytest.raises(CheckpointError, match="or shards are missing: there are 3, 4 would fit"):
        opened(step)
    shutil.move(step.parent / "kept", step / "shard_3")
    shutil.rmtree(step / "shard_1")
    with pytest.raises(CheckpointError, match="shard_1 missing"):
        opened(step)


def test_shards_that_do_not_belong_together_are_told(step: Path) -> None:
    (step.parent / "other").mkdir()
    model = small.parsed().model
    source = dataclasses.replace(memory_source.of_model(model, moments=True), step=99)
    other = written(step.parent / "other" / "step_99", source, model, 4)
    shutil.rmtree(step / "shard_1")
    shutil.copytree(other / "shard_1", step / "shard_1")
    with pytest.raises(CheckpointError, match="(?s)of several checkpoints: .*copy all shards"):
        opened(step)
    narrow = written(step.parent / "narrow", opened(other), model, 4, ml_dtypes.bfloat16)
    shutil.rmtree(other / "shard_2")
    shutil.copytree(narrow / "shard_2", other / "shard_2")
    with pytest.raises(CheckpointError, match="of bfloat16; .* of float32 in shard 0"):
        memory_source.read_all(opened(other))


def test_a_vocabulary_that_shards_cannot_share_is_refused(step: Path) -> None:
    with pytest.raises(CheckpointError, match="n_vocab is 65, 64 in the files"):
        original.Original(str(step), small.parsed(n_vocab=65).model)


def test_a_missing_file_is_named(step: Path) -> None:
    (step / "shard_2" / "9.npz").unlink()
    with pytest.raises(CheckpointError, match=r"shard_2/9\.npz missing"):
        opened(step)


def test_an_extra_array_is_told(step: Path) -> None:
    path = step / "shard_1" / "15.npz"
    with np.load(path) as archive:
        arrays = [archive[name] for name in archive.files]
    np.savez(path, *arrays, np.zeros(3))
    with pytest.raises(CheckpointError, match="shard_1 is not whole: its files hold"):
        opened(step)


def test_a_file_that_is_cut_off_is_named(step: Path) -> None:
    path = step / "shard_1" / "3.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"shard_1/3\.npz is damaged or cut off"):
        opened(step)


@pytest.mark.thorough
def test_a_flipped_bit_is_found_wherever_it_is(step: Path) -> None:
    path = step / "shard_1" / "12.npz"
    pristine = path.read_bytes()
    for at in range(0, len(pristine), max(1, len(pristine) // 40)):
        flip(path, at)
        try:
            source = opened(step)
            for key in source.arrays:
                source.read(key)
        except CheckpointError as error:
            assert "12.npz" in str(error) or "shard_1" in str(error)
        else:  # only in what no reader needs: times, versions and sizes that are told twice
            assert data_of(path.read_bytes()) == data_of(pristine)
        path.write_bytes(pristine)


def data_of(archive: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [opened.read(name) for name in opened.namelist()]


def test_norms_of_each_shard_s_own_are_merged_only_where_they_are_one(tmp_path: Path) -> None:
    model = dataclasses.replace(small.parsed().model, norm="layernorm-desync")
    source = memory_source.of_model(model)
    folder = written(tmp_path / "step_7", source, model, 2)
    assert_same_arrays(original.Original(str(folder), model), source)
    leaves = original.leaves(model, moments=False)
    key = Key(PARAMS, "decoder/final_norm/scale")
    index = next(i for i, leaf in enumerate(leaves) if leaf.key == key)
    replace(folder / "shard_1", index, np.zeros(model.d_model, np.float32), len(leaves))
    with pytest.raises(CheckpointError, match="differs from shard to shard"):
        original.Original(str(folder), model).read(key)
