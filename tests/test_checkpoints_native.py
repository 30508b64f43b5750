"""Native checkpoints: what is saved comes back, exactly, on any mesh, after any accident."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoints.native import CheckpointError, Checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


class Adam(NamedTuple):
    count: Any
    mu: Any


def mesh(dp: int, mp: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: dp * mp]).reshape(dp, mp)
    return jax.sharding.Mesh(devices, ("dp", "mp"))


def state_on(
    mesh: jax.sharding.Mesh, spec=("dp", "mp"), *, seed: int = 0, n_layers: int = 4
) -> State:
    rng = np.random.default_rng(seed)

    def placed(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    weight_LDF = rng.normal(size=(n_layers, 16, 24)).astype(np.float32)
    return State(
        step=placed(np.int32(seed)),
        params={
            "decoder/layers/ff": {"w": placed(weight_LDF, None, *spec)},
            "decoder/norm": {"scale": placed(rng.normal(size=16).astype(jnp.bfloat16))},
        },
        opt_state=(Adam(placed(np.int32(7)), {"w": placed(-weight_LDF, None, *spec)}), ()),
    )


def like(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dp, mp", [(1, 1), (8, 1), (1, 8), (4, 2)])
def test_a_state_is_restored_bit_for_bit_into_another_mesh(tmp_path, dp, mp):
    saved = state_on(mesh(2, 4))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, saved, {"position": {"samples": 96}})
    target = like(state_on(mesh(dp, mp), ("mp", "dp"), seed=1))
    restored, extra = checkpoints.restore(3, target)
    checkpoints.close()
    assert_same(restored, saved)
    assert extra == {"position": {"samples": 96}}
    for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding == wanted.sharding


def test_every_array_that_does_not_fit_is_listed_by_path_with_the_key_to_look_at(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state_on(mesh(2, 4), n_layers=3), {"config": {"layers": 3, "lr": 0.1}})
    target = like(state_on(mesh(2, 4)))
    target.params["decoder/norm"] = {"offset": target.params["decoder/norm"]["scale"]}
    target = target._replace(step=jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(1, target, config={"layers": 4, "lr": 0.1})
    checkpoints.close()
    assert str(caught.value).splitlines()[1:] == [
        "  - opt_state/0/mu/w: float32[3,16,24] in the checkpoint, float32[4,16,24] wanted",
        "  - params/decoder/layers/ff/w: float32[3,16,24] in the checkpoint, float32[4,16,24] wanted",
        "  - params/decoder/norm/offset: missing from the checkpoint, bfloat16[16] wanted",
        "  - params/decoder/norm/scale: bfloat16[16] in the checkpoint, not asked for",
        "  - step: int32[] in the checkpoint, float32[] wanted",
        "  - configuration key layers: 3 in the checkpoint, 4 now",
    ]
    assert "step_1" in str(caught.value)


def test_weights_alone_are_restored_when_asked_for_by_name(tmp_path):
    saved = state_on(mesh(2, 4))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, saved, {})
    assert_same(checkpoints.restore_params(1, like(saved).params), saved.params)
    checkpoints.close()


def test_superseded_checkpoints_are_deleted(tmp_path):
    state = state_on(mesh(1, 1))
    checkpoints = Checkpoints(str(tmp_path), keep_n=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 6, 7]
    assert checkpoints.latest() == 7
    checkpoints.close()
