"""Native checkpoints: what is saved comes back, exactly, on any mesh, and nothing else does."""

import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_states import assert_same, like, mesh, saved, state_on

from mesh_transformer.checkpoints import layout, native
from mesh_transformer.checkpoints.fingerprint import fingerprints
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints, locate

# What comes back


@pytest.mark.parametrize("chunk_bytes", [128 * 2**20, 1000])
@pytest.mark.parametrize("dp, mp", [(1, 1), (8, 1), (1, 8), (4, 2)])
def test_a_state_is_restored_bit_for_bit_into_another_mesh(
    tmp_path, monkeypatch, dp, mp, chunk_bytes
):
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
    state = state_on(mesh(2, 4))
    folder = saved(tmp_path, state, extra={"position": {"samples": 96}})
    target = like(state_on(mesh(dp, mp), ("mp", "dp"), seed=1))
    restored, extra = native.restore(folder, target)
    assert_same(restored, state)
    assert extra == {"position": {"samples": 96}}
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding == wanted.sharding


def test_weights_alone_are_restored_when_asked_for_by_name(tmp_path):
    state = state_on(mesh(2, 4))
    folder = saved(tmp_path, state)
    assert_same(native.restore_params(folder, like(state).params), state.params)
    with pytest.raises(CheckpointError, match=r"params/opt_state/.*nothing in the checkpoint"):
        native.restore_params(folder, like(state)._asdict())


def test_a_target_without_shardings_is_restored_to_one_device(tmp_path):
    state = state_on(mesh(2, 4))
    folder = saved(tmp_path, state)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    restored, _ = native.restore(folder, target)
    assert_same(restored, state)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {1}


def test_arrays_donated_right_after_save_are_saved_as_they_were(tmp_path):
    before = state_on(mesh(2, 4))
    kept = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, before))
    negated = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, before, {})
        after = negated(before)
        for _ in range(5):
            after = negated(after)
        restored, _ = checkpoints.restore(1, like(after))
    assert_same(restored, kept)


def test_extra_is_saved_as_it_was_when_save_was_called(tmp_path):
    state = state_on(mesh(1, 1))
    extra = {"position": {"samples": 1}, "note": "ü", "noise": None}
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state, extra)
        extra["position"]["samples"] = 2  # type: ignore[index]
        assert checkpoints.read_extra(1) == {"position": {"samples": 1}, "note": "ü", "noise": None}


def test_a_relative_root_is_taken_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = state_on(mesh(2, 4))
    saved(Path("runs/mine"), state)
    restored, _ = native.restore("runs/mine/checkpoints/step_1", like(state))
    assert_same(restored, state)


# Strictness


def test_every_array_that_does_not_fit_is_listed_by_path_with_the_key_to_look_at(tmp_path):
    config = {"layers": 3, "lr": 0.1, "pe": "rotary", "train_set": "a.index"}
    folder = saved(tmp_path, state_on(mesh(2, 4), layers=3), extra={"config": config})
    target = like(state_on(mesh(2, 4)))
    target.params["decoder/norm"] = {"offset": target.params["decoder/norm"]["scale"]}
    target = target._replace(step=jax.ShapeDtypeStruct((), jnp.float32))
    now = {"layers": 4, "lr": 0.2, "train_set": "b.index", "d_ff": None}
    with pytest.raises(CheckpointError) as caught:
        native.restore(folder, target, config=now)
    assert str(caught.value).splitlines() == [
        f"{folder} does not fit:",
        "  - opt_state/0/mu/w: float32[3,32,48] in the checkpoint, float32[4,32,48] asked for",
        "  - params/decoder/layers/ff/w: float32[3,32,48] in the checkpoint,"
        " float32[4,32,48] asked for",
        "  - params/decoder/norm/offset: nothing in the checkpoint, bfloat16[16] asked for",
        "  - params/decoder/norm/scale: bfloat16[16] in the checkpoint, nothing asked for",
        "  - step: int32[] in the checkpoint, float32[] asked for",
        "  - configuration key d_ff: absent in the checkpoint, null now",
        "  - configuration key layers: 3 in the checkpoint, 4 now",
        '  - configuration key pe: "rotary" in the checkpoint, absent now',
    ]


def test_without_a_differing_key_of_the_model_every_differing_key_is_named(tmp_path):
    state = state_on(mesh(1, 1))
    folder = saved(tmp_path, state, extra={"config": {"layers": 4, "lr": 0.1, "seed": 0}})
    without_moments = like(state._replace(opt_state=()))
    with pytest.raises(CheckpointError, match=r"for\n  - configuration key lr: 0.1 .* 0.2 now$"):
        native.restore(folder, without_moments, config={"layers": 4, "lr": 0.2, "seed": 0})


def test_what_is_no_jax_array_is_refused_by_path_before_anything_is_written(tmp_path):
    state = state_on(mesh(1, 1))._replace(step=3)
    with Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(CheckpointError, match=r"not: \['step'\]"):
            checkpoints.save(1, state, {})
        with pytest.raises(TypeError, match="set"):
            checkpoints.save(1, state_on(mesh(1, 1)), {"position": {1, 2}})
        assert checkpoints.steps() == []


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    state = state_on(mesh(1, 1))
    saved(tmp_path, state, 5)
    with (
        Checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(CheckpointError, match=r"step_6 is not a checkpoint; there are steps \[5\]"),
    ):
        checkpoints.restore(6, like(state))


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "FORMAT_VERSION", 2)
    folder = saved(tmp_path, state_on(mesh(1, 1)))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2; .* up to 1"):
        native.read_extra(folder)


# Which steps there are


def test_superseded_checkpoints_are_deleted(tmp_path):
    state = state_on(mesh(1, 1))
    with Checkpoints(str(tmp_path), keep_n=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7]
        assert checkpoints.latest() == 7
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_4", "step_6", "step_7"]


def test_a_step_as_old_as_an_existing_one_is_saved_only_after_delete_after(tmp_path):
    state, changed = state_on(mesh(1, 1)), state_on(mesh(1, 1), seed=9)
    with Checkpoints(str(tmp_path)) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, state, {})
        for step in (20, 30):
            with pytest.raises(CheckpointError, match=rf"step 30: .*delete_after\({step - 1}\)"):
                checkpoints.save(step, changed, {})
        assert_same(checkpoints.restore(20, like(state))[0], state)
        checkpoints.delete_after(10)
        assert checkpoints.steps() == [10]
        checkpoints.save(20, changed, {})
        assert_same(checkpoints.restore(20, like(state))[0], changed)
        checkpoints.clear()
        assert checkpoints.latest() is None


def test_a_start_removes_what_was_not_finished_and_nothing_else(tmp_path, caplog):
    saved(tmp_path, state_on(mesh(1, 1)), 10)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_10", folder / "step_20.orbax-checkpoint-tmp")
    shutil.copytree(folder / "step_10", folder / "step_30")
    (folder / "step_30" / layout.MARKER).unlink()
    (folder / "step_best").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert locate(str(tmp_path)) == str(folder / "step_10")
    with caplog.at_level(logging.WARNING), Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.steps() == [10]
    assert sorted(os.listdir(folder)) == ["notes.txt", "step_10", "step_best"]
    assert "step_30, which was never finished" in caplog.text


def test_a_deletion_cut_short_leaves_nothing_that_looks_complete(tmp_path, monkeypatch, caplog):
    def cut_short(folder: str) -> None:
        Path(folder, "state", "_METADATA").unlink()
        raise OSError("interrupted")

    state = state_on(mesh(1, 1))
    with Checkpoints(str(tmp_path), keep_n=1) as checkpoints:
        checkpoints.save(1, state, {})
        with monkeypatch.context() as patch:
            patch.setattr(layout.storage, "remove_folder", cut_short)
            checkpoints.save(2, state, {})
            checkpoints.wait()
        assert (tmp_path / "checkpoints" / "step_1").exists()
        assert checkpoints.steps() == [2]
    assert "[1] are not all deleted: interrupted" in caplog.text


def test_a_path_means_the_step_it_names_or_the_newest_of_its_run(tmp_path):
    state = state_on(mesh(1, 1))
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(9, state, {})
        checkpoints.save(10, state, {})
    folder = tmp_path / "checkpoints"
    assert locate(str(tmp_path)) == str(folder / "step_10")
    assert locate(str(folder)) == str(folder / "step_10")
    assert locate(str(folder / "step_9")) == str(folder / "step_9")
    assert locate(str(folder / "step_9" / "state")) is None
    assert locate(str(tmp_path / "nowhere")) is None


def test_fingerprints_depend_on_content_and_place_and_not_on_sharding():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, jnp.bfloat16, np.bool_):
        content = rng.normal(size=(8, 16)).astype(dtype)
        swapped = content.copy()
        swapped[0, 0], swapped[5, 3] = content[5, 3], content[0, 0]
        placings = [
            jax.device_put(content, NamedSharding(mesh(dp, mp), PartitionSpec(*dims)))
            for dp, mp, dims in [(1, 1, ()), (2, 4, ("dp", "mp")), (2, 4, (None, ("dp", "mp")))]
        ]
        assert len(set(fingerprints(dict(enumerate(placings))).values())) == 1  # type: ignore[arg-type]
        if (swapped != content).any():
            changed = {"as it was": jnp.asarray(content), "swapped": jnp.asarray(swapped)}
            assert len(set(fingerprints(changed).values())) == 2
    zeros = {"+": jnp.zeros(4), "-": -jnp.zeros(4), "shorter": jnp.zeros(3), "none": jnp.zeros(0)}
    assert len(set(fingerprints(zeros).values())) == 4
