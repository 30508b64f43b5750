"""One host: what it computes does not depend on its mesh, and what it saves comes back."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

from mesh_transformer.checkpoints import layout
from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints
from mesh_transformer.checkpoints.opening import stored_config
from mesh_transformer.errors import UserError
from mesh_transformer.pod.devices import host_devices, one_replica
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Restored, Sampling
from mesh_transformer.training.optimizer import learning_rate, schedule_count

SPREAD: dict[str, Any] = {"dp": 2, "mp": 4, "zero_stage": 3}


def fresh(dp: int = 1, mp: int = 1, **keys: Any) -> Worker:
    """The host with this mesh, with the same weights on every mesh."""
    worker = small.worker(dp, mp, **keys)
    worker.state = small.start(dp, mp, **keys)
    return worker


def on_disk(root: Path, dp: int = 1, mp: int = 1, **keys: Any) -> tuple[Worker, Checkpoints]:
    """A host that saves under a folder; its compiled steps are the shared ones."""
    mesh_keys = {key: value for key, value in keys.items() if key == "zero_stage"}
    config = small.parsed(cores_per_replica=mp, model_dir=str(root), **keys)
    checkpoints = Checkpoints(str(root))
    worker = Worker(config, jax.devices()[: dp * mp], checkpoints)
    worker.steps = small.steps(dp, mp, **mesh_keys)
    return worker, checkpoints


@pytest.fixture
def run(tmp_path: Path) -> tuple[Worker, Path]:
    """A run on one device that has taken three steps, saved the last and ended."""
    worker, checkpoints = on_disk(tmp_path / "run")
    with checkpoints:
        worker.state = small.start()
        for step in range(3):
            worker.train(batch(step))
        worker.save(3, {"epoch": 0, "sample": 24})
    return worker, tmp_path / "run"


def batch(seed: int) -> np.ndarray:
    return small.tokens(2, 8, small.KEYS["seq"] + 1, seed=seed)


def values(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(found: Any, wanted: Any) -> None:
    for a, b in zip(values(found), values(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


# Scoring and training


@pytest.mark.parametrize("n", [3, 4])
def test_any_number_of_sequences_is_scored_alike_on_every_mesh(n: int) -> None:
    tokens_BT1 = small.tokens(n, 16)
    mask_BT = np.arange(15) % 3 > 0
    alone = fresh().evaluate(tokens_BT1, np.broadcast_to(mask_BT, (n, 15)))
    spread = fresh(**SPREAD).evaluate(tokens_BT1, np.broadcast_to(mask_BT, (n, 15)))
    assert alone.loss_BT.shape == alone.correct_BT.shape == (n, 15)
    np.testing.assert_allclose(spread.loss_BT, alone.loss_BT, atol=1e-5)
    assert not alone.loss_BT[:, ::3].any() and not alone.correct_BT[:, ::3].any()
    assert alone.loss_BT[:, 1::3].all()


SHAPES = [
    ("evaluate", (17,), r"tokens_BT1 has the shape \(17,\)"),
    ("evaluate", (0, 17), r"tokens_BT1 has the shape \(0, 17\)"),
    ("evaluate", (2, 18), r"needed are 2 dimensions, .* T1 from 2 to 17 \(seq \+ 1\)"),
    ("evaluate", (2, 1), "T1 from 2 to 17"),
    ("train", (4, 17), "tokens_ABT1 .* needed are 3 dimensions"),
    ("train", (1, 3, 17), r"\(1, 3, 17\); .*B a multiple of 2 \(one part for each replica\)"),
]


@pytest.mark.parametrize(("method", "shape", "told"), SHAPES)
def test_a_batch_of_a_wrong_shape_is_told_by_its_letters(
    method: str, shape: tuple[int, ...], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        getattr(fresh(**SPREAD), method)(np.zeros(shape, np.int32))


def test_a_mask_of_a_wrong_shape_and_ids_beyond_the_vocabulary_are_told() -> None:
    worker = fresh()
    tokens = small.tokens(1, 4, 16)
    with pytest.raises(ValueError, match=r"mask has the shape \(1, 4, 16\); .* is \(1, 4, 15\)"):
        worker.train(tokens, np.ones((1, 4, 16)))
    with pytest.raises(ValueError, match=r"mask has the shape \(1, 15\); .* is \(4, 15\)"):
        worker.evaluate(tokens[0], np.ones((1, 15)))
    for outside in (64, -1):
        tokens[0, 1, 3] = outside
        with pytest.raises(ValueError, match=r"token ids run from -?\d+ to \d+; n_vocab is 64"):
            worker.train(tokens)


def test_token_ids_of_any_integer_type_are_the_same() -> None:
    tokens = small.tokens(4, 16)
    losses = [
        fresh().evaluate(tokens.astype(dtype)).loss_BT for dtype in ("int32", "uint32", "int64")
    ]
    assert_equal(losses[1:], [losses[0]] * 2)


# Saving and going on


def test_what_was_saved_is_restored_without_making_fresh_weights_first(
    run: tuple[Worker, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, root = run
    again, checkpoints = on_disk(root)
    again.steps = again.steps._replace(init=None)  # type: ignore[arg-type]
    with checkpoints:
        assert again.restore() == Restored(3, {"epoch": 0, "sample": 24})
    assert_equal(again.state, worker.state)
    assert schedule_count(again.state.opt_state) == again.state.step == 3


def test_a_run_goes_on_on_another_mesh_with_the_same_losses(run: tuple[Worker, Path]) -> None:
    """From one device to eight in a 2 x 4 mesh with everything spread; sums differ by rounding."""
    worker, root = run
    tokens = batch(7)
    there, checkpoints = on_disk(root, **SPREAD)
    with checkpoints:
        there.restore()
    assert there.state.params["decoder/embed"]["embeddings"].sharding.mesh.shape == {
        "dp": 2,
        "mp": 4,
    }
    np.testing.assert_allclose(
        there.evaluate(tokens[0, :4]).loss_BT, worker.evaluate(tokens[0, :4]).loss_BT, atol=1e-5
    )
    for step in range(3):
        here, elsewhere = worker.train(batch(step)), there.train(batch(step))
        np.testing.assert_allclose(elsewhere["loss"], here["loss"], rtol=1e-5)
        assert float(elsewhere["lr"]) == float(here["lr"])


def test_a_given_step_is_restored(run: tuple[Worker, Path]) -> None:
    before, root = values(run[0].state), run[1]
    worker, checkpoints = on_disk(root)
    with checkpoints:
        worker.restore()
        worker.train(batch(0))
        worker.save(4, {"epoch": 0, "sample": 32})
        assert worker.restore(3) == Restored(3, {"epoch": 0, "sample": 24})
    assert_equal(values(worker.state), before)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path: Path) -> None:
    worker, checkpoints = on_disk(tmp_path)
    with checkpoints:
        assert worker.restore() is None


def test_a_session_without_checkpoints_says_so() -> None:
    worker = fresh()
    with pytest.raises(ValueError, match="made without checkpoints"):
        worker.save(1, {})
    with pytest.raises(ValueError, match="made without checkpoints"):
        worker.restore()
    worker.close()


def test_a_save_that_failed_behind_is_raised_on_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "list_files", full)
    worker, _ = on_disk(tmp_path)
    worker.state = small.start()
    worker.save(1, {})
    with pytest.raises(CheckpointError, match="saving step 1 to .*step_1 failed: .*No space left"):
        worker.close()


# Which weights fit


@pytest.mark.parametrize("read", ["restore", "tune_from", "load_weights"])
def test_weights_of_another_function_are_refused_though_their_shapes_fit(
    run: tuple[Worker, Path], tmp_path: Path, read: str
) -> None:
    _, root = run
    keys = {"n_heads": 4, "pe": "none", "layers": 3}
    config = small.parsed(model_dir=str(root), **keys)
    other = Worker(config, jax.devices()[:1], Checkpoints(str(root)))
    with pytest.raises(CheckpointError) as told:
        if read == "restore":
            other.restore()
        elif read == "tune_from":
            other.config = small.parsed(model_dir=str(tmp_path / "tuned"), **keys)
            other.tune_from(str(root), fresh_opt=False)
        else:
            other.load_weights(str(root))
    assert str(told.value).splitlines()[1:] == [
        "  - layers is 2 there, 3 in the configuration",
        "  - n_heads is 8 there, 4 in the configuration",
        "  - pe is 'rotary' there, 'none' in the configuration",
        "  - pe_rotary_dims is 4 there, 0 in the configuration",
        "  - d_head is 4 there, 8 in the configuration",
        "  - n_kv_heads is 8 there, 4 in the configuration",
        "  - attention_scale is 0.5 there, 0.3535533905932738 in the configuration",
    ]


@pytest.mark.parametrize(("epsilon", "fits"), [(float(np.float32(1e-5)), True), (1e-6, False)])
def test_numbers_are_the_same_that_are_in_float32(
    run: tuple[Worker, Path], epsilon: float, fits: bool
) -> None:
    """As GGUF files hold them, and folders that were made of those."""
    _, root = run
    other = Worker(small.parsed(norm_epsilon=epsilon), jax.devices()[:1])
    with contextlib.nullcontext() if fits else pytest.raises(CheckpointError, match="norm_eps"):
        other.load_weights(str(root))


def test_how_a_model_is_computed_and_trained_may_change_and_changes_are_told(
    run: tuple[Worker, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, root = run
    caplog.set_level("INFO", "mesh_transformer.pod.worker")
    keys: dict[str, Any] = {"lr": 0.02, "total_steps": 300, "remat": "none", "z_loss": 0.0}
    other, checkpoints = on_disk(root, **keys)
    with checkpoints:
        assert other.restore() is not None
    assert caplog.messages == [
        "changed since that checkpoint: lr 0.01 -> 0.02, remat 'full' -> 'none', "
        "total_steps 200 -> 300, z_loss 0.0001 -> 0.0"
    ]


def test_the_configuration_is_read_back_from_a_checkpoint(run: tuple[Worker, Path]) -> None:
    worker, root = run
    assert stored_config(str(root)) == worker.config
    for path, told in (("absent", "does not exist"), ("", "holds no complete checkpoint")):
        with pytest.raises(CheckpointError, match=told):
            stored_config(str(root.parent / path))


@pytest.mark.parametrize(("dp", "mp"), [(1, 1), (1, 4), (2, 1)])
def test_weights_that_are_only_read_score_as_in_training_and_one_replica_keeps_no_masters(
    run: tuple[Worker, Path], dp: int, mp: int
) -> None:
    keys: dict[str, Any] = {"compute_dtype": "bfloat16", "zero_stage": 3}
    training = small.worker(dp, mp, **keys)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, training.steps.state)
    training.state = jax.device_put(jax.device_get(run[0].state), shardings)
    reading = Worker(training.config, jax.devices()[: dp * mp])
    reading.steps = training.steps
    reading.load_weights(str(run[1]))
    tokens = small.tokens(4, 16)
    assert_equal(reading.evaluate(tokens), training.evaluate(tokens))
    kept = reading.state.params["decoder/embed"]["embeddings"]
    assert kept.dtype == ("bfloat16" if dp == 1 else "float32")
    if mp == 1:  # XLA cannot compile bfloat16 sums over `mp` in prefill for CPUs
        texts = [worker.generate([[5, 6, 7], [1]], Sampling(), 9) for worker in (reading, training)]
        assert texts[0] == texts[1]


# Tuning


@pytest.mark.parametrize("fresh_opt", [False, True])
def test_tuning_begins_at_step_0_with_the_weights_and_if_asked_the_moments(
    run: tuple[Worker, Path], tmp_path: Path, fresh_opt: bool
) -> None:
    worker, root = run
    tuned, checkpoints = on_disk(tmp_path / "tuned", **SPREAD)
    with checkpoints:
        tuned.tune_from(str(root), fresh_opt=fresh_opt)
    assert_equal(tuned.state.params, worker.state.params)
    assert tuned.state.step == schedule_count(tuned.state.opt_state) == 0
    adam, before = tuned.state.opt_state[1], worker.state.opt_state[1]
    assert before.count == 3
    if fresh_opt:
        assert adam.count == 0 and not any(moment.any() for moment in values((adam.mu, adam.nu)))
    else:
        assert_equal(adam, before)
    for found, placed in zip(*map(jax.tree.leaves, (tuned.state, tuned.steps.state)), strict=True):
        # Otherwise the step would be compiled twice.
        assert found.sharding == placed.sharding and found.committed
    rate = learning_rate(worker.config.optimizer)
    assert tuned.train(batch(3))["lr"] == rate(0) != rate(3) == worker.train(batch(3))["lr"]


def test_a_run_is_not_tuned_from_a_checkpoint_of_its_own(run: tuple[Worker, Path]) -> None:
    worker, root = run
    for path in (root, root / "checkpoints", root / "checkpoints" / "step_3"):
        with pytest.raises(CheckpointError, match="a checkpoint of this very run"):
            worker.tune_from(str(path), fresh_opt=True)


# Devices


def test_a_size_that_is_not_there_is_refused_with_the_size_that_is() -> None:
    with pytest.raises(UserError, match=r"tpu_size is 4, but JAX sees 8 device\(s\) here \(cpu\)"):
        host_devices(small.parsed(tpu_size=4))
    for size in (8, None):
        assert host_devices(small.parsed(tpu_size=size)) == jax.devices()


def test_the_configuration_of_a_pod_makes_no_pod_of_cpu_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = jax.devices()[:1]
    made: list[jax.Device] = []
    monkeypatch.setattr(jax, "devices", lambda: made)
    monkeypatch.setattr(jax.config, "update", lambda _, n: made.__setitem__(slice(None), cpu * n))
    assert len(host_devices(small.parsed(tpu_size=64))) == 64
    with pytest.raises(UserError, match=r"tpu_size is 256, but JAX sees 64 device\(s\) here"):
        host_devices(small.parsed(tpu_size=256))


def test_no_devices_at_all_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[jax.Device]:
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UserError, match="JAX finds no devices: Unable to init.*JAX_PLATFORMS=cpu"):
        host_devices(small.parsed())


@pytest.mark.parametrize(
    ("cores", "there", "used"), [(1, 8, 1), (8, 8, 8), (8, 1, 1), (8, 6, 4), (2, 8, 2), (4, 3, 2)]
)
def test_one_copy_of_a_model_is_read_on_as_many_devices_as_divide_it(
    monkeypatch: pytest.MonkeyPatch, cores: int, there: int, used: int
) -> None:
    devices = jax.devices()[:there]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    config = small.parsed(cores_per_replica=cores, tpu_size=8, zero_stage=3)
    fitted, chosen = one_replica(config)
    assert chosen == devices[:used]
    assert fitted.replicas(used) == 1
    assert fitted.model == config.model
