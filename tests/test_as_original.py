"""With `original_shards` a run of mesh-transformer-jax goes on as it would have gone there.

The original's own next five steps are the measure, in float32; `original.py` says where they come
from. One device computes what 2, 4 or 8 shards computed there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import original
import pytest
import small

from mesh_transformer.model.decoder import make_model
from mesh_transformer.network import Norm
from mesh_transformer.sharding import make_mesh
from mesh_transformer.training import as_original
from mesh_transformer.training.gradients import score
from mesh_transformer.training.steps import Steps, make_steps

STEP = 20
"""The step of the original's checkpoints."""

TOLERANCE = 1e-5
"""Relative. Sums in another order change the last bits of a gradient, and each step of Adam carries
the difference on (measured: 2.4e-7 of losses, 4.8e-7 of norms). One copy goes 1.4e-3 and more, 0.19
and more, away."""


@functools.cache
def steps(name: str, dp: int, mp: int, zero_stage: Any, shards: int) -> Steps:
    """Compile a run of the original's for a mesh of ours."""
    run = original.load(name).config
    config = dataclasses.replace(
        run,
        mesh=dataclasses.replace(run.mesh, cores_per_replica=mp, zero_stage=zero_stage),
        optimizer=dataclasses.replace(run.optimizer, original_shards=shards),
    )
    return make_steps(config, make_mesh(dp, mp, jax.devices()[: dp * mp]))


def trajectory(
    name: str, dp: int = 1, mp: int = 1, zero_stage: int = 0, shards: int | None = None
) -> np.ndarray:
    """Train on from the original's state for its next five steps.

    Returns:
        [5, 3], as the original reported: loss, last_loss, norm of the gradient of the sum over
        microbatches. Ours is of the mean.
    """
    run = original.continued(name)
    if run is None:
        pytest.skip(f"{name} is not copied here, and ORIGINAL_FIXTURES names no folder with it")
    shards = run.config.mesh.cores_per_replica if shards is None else shards
    compiled = steps(name, dp, mp, zero_stage, shards)
    n_microbatches = run.config.batch.gradient_accumulation_steps
    shapes = compiled.state
    opt_state = optax.tree.set(shapes.opt_state, count=np.int32(STEP), **run.moments())
    state = jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding, may_alias=False),
        shapes._replace(step=jnp.int32(STEP), params=run.params(), opt_state=opt_state),
        shapes,
    )
    rows = []
    for batch in run.arrays["later_tokens"].astype(np.int32):
        state, metrics = compiled.train(state, batch, None)
        grad_norm = metrics["grad_norm"] * n_microbatches
        rows.append([metrics["loss"], metrics["last_loss"], grad_norm])
    return np.array(rows, np.float64)


def deviation(name: str, rows: np.ndarray) -> np.ndarray:
    """Return the largest relative deviation from the original's loss, last_loss, grad_norm."""
    run = original.continued(name)
    assert run is not None
    theirs = run.arrays["later_metrics"][:, :3]
    return np.abs(rows / theirs - 1).max(0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", original.CONTINUED)
def test_five_more_steps_are_the_original_s(name: str) -> None:
    assert deviation(name, trajectory(name)).max() < TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    ["E_rmsnorm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("A", "D_fixed"))],
)
def test_one_copy_goes_another_way(name: str) -> None:
    loss, last_loss, grad_norm = deviation(name, trajectory(name, shards=0))
    assert min(loss, last_loss) > 100 * TOLERANCE
    assert grad_norm > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dp", "mp", "zero_stage"), [(2, 2, 3), pytest.param(2, 4, 1, marks=pytest.mark.slow)]
)
def test_a_mesh_and_its_zero_stage_change_nothing(dp: int, mp: int, zero_stage: int) -> None:
    assert deviation("B_small", trajectory("B_small", dp, mp, zero_stage)).max() < TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mesh", "pe", "norm"),
    [
        ((2, 4, 3), "fixed", "rmsnorm-bias"),
        pytest.param((4, 2, 2), "fixed", "scalenorm-bias", marks=pytest.mark.slow),
    ],
)
def test_what_the_original_held_in_copies_is_counted_alike_on_every_mesh(
    mesh: tuple[int, int, int], pe: str, norm: str
) -> None:
    """Of other shards than the mesh has; and micro_grad_norm, where that is of all replicas."""
    alone, here = (
        metrics(*place, pe=pe, norm=norm, original_shards=3) for place in ((1, 1, 0), mesh)
    )
    for one, other in zip(alone, here, strict=True):
        names = {"loss", "last_loss", "grad_norm"}
        names |= {"micro_grad_norm"} if mesh[2] == 3 else set()
        for name in names:
            np.testing.assert_allclose(other[name], one[name], rtol=TOLERANCE, err_msg=name)


def metrics(dp: int, mp: int, zero_stage: int, **keys: Any) -> list[dict[str, Any]]:
    """Take two steps from the same start, with two microbatches of eight sequences in each."""
    state = small.start(dp, mp, zero_stage=zero_stage, **keys)
    train, seen = small.steps(dp, mp, zero_stage=zero_stage, **keys).train, []
    for seed in range(2):
        tokens = small.tokens(2, 8, small.KEYS["seq"] + 1, seed=seed)
        state, row = train(state, tokens, None)
        seen.append(jax.device_get(row))
    return seen


@pytest.mark.thorough
def test_the_reported_losses_include_the_z_loss_less_the_largest_logit() -> None:
    shape = (1, 8, small.KEYS["seq"] + 1)
    tokens, weight = small.tokens(*shape), 0.5
    mask = np.random.default_rng(1).uniform(size=(1, 8, shape[2] - 1)) < 0.7
    scored = functools.partial(score, make_model(small.parsed().model))
    seen = jax.jit(scored, compiler_options=small.COMPILED_FAST)(small.start().params, tokens[0])
    shifted_BT = np.asarray(seen.log_z_BT - seen.max_BT, np.float64)
    loss_BT, last_B = np.asarray(seen.loss_BT, np.float64), mask[0, :, -1]
    assert (shifted_BT > 0).all()
    assert last_B.any()
    added = weight * np.square(shifted_BT)[mask[0]].mean()
    state = small.start(z_loss=weight, original_shards=1)
    _, ours = small.steps(z_loss=weight, original_shards=1).train(state, tokens, np.float32(mask))
    np.testing.assert_allclose(ours["loss"], loss_BT[mask[0]].mean() + added, rtol=1e-6)
    np.testing.assert_allclose(ours["last_loss"], loss_BT[last_B, -1].mean() + added, rtol=1e-6)


@pytest.mark.parametrize(("pe", "norm"), small.KINDS)
def test_what_counts_otherwise_is_decided_by_path_and_norm(pe: str, norm: Norm) -> None:
    params = small.steps(pe=pe, norm=norm).state.params
    paths = [f"{module}/{name}" for module, values in params.items() for name in values]
    found = {path: held for path in paths if any(held := as_original.powers(path, norm))}
    summed, averaged = (1 / 2, 1), (-1 / 2, 0)
    expected = {"decoder/embed/b": summed, "decoder/layers/block/ff/out/b": summed}
    if pe == "fixed":
        expected["decoder/positions/embeddings"] = (1, 0)
    if not norm.startswith("layernorm"):
        expected |= dict.fromkeys((path for path in paths if "norm/" in path), averaged)
        assert len(expected) >= 4
    assert found == expected


@pytest.mark.parametrize(
    ("path", "norm", "length", "step"),
    [
        ("decoder/embed/b", "layernorm", 2, 4),
        ("decoder/layers/block/ff/out/b", "rmsnorm", 2, 4),
        ("decoder/layers/block/ff/in/b", "rmsnorm", 1, 1),
        ("decoder/positions/embeddings", "layernorm", 4, 1),
        ("decoder/final_norm/gain", "scalenorm", 1 / 2, 1),
        ("decoder/final_norm/scale", "layernorm", 1, 1),
    ],
)
def test_four_shards_lengthen_gradients_and_steps_by(
    path: str, norm: Norm, length: float, step: float
) -> None:
    module, name = path.rsplit("/", 1)
    tree = {module: {name: np.ones(3)}}
    for function, factor in ((as_original.counted, length), (as_original.moved, step)):
        np.testing.assert_allclose(function(tree, 4, norm)[module][name], factor)
        for shards in (0, 1):
            assert function(tree, shards, norm)[module][name] is tree[module][name]


def test_the_optimizer_s_state_has_one_tree_with_and_without() -> None:
    trees = [small.steps(original_shards=n).state for n in (1, 0)]
    assert len({str(jax.tree.structure(tree)) for tree in trees}) == 1
