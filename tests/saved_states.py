"""Small sharded training states to save, and what they must be like when they come back."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mesh_transformer.checkpoints.native import Checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any


class Adam(NamedTuple):
    count: Any
    mu: Any


def mesh(dp: int, mp: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[: dp * mp]).reshape(dp, mp), ("dp", "mp"))


def state_on(
    mesh: jax.sharding.Mesh, dims: tuple[str | None, ...] = ("dp", "mp"), seed: int = 0, layers=4
) -> State:
    rng = np.random.default_rng(seed)

    def placed(array: Any, *dims: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*dims)))

    w_LDF = rng.normal(size=(layers, 32, 48)).astype(np.float32)
    return State(
        step=placed(np.int32(seed)),
        params={
            "decoder/layers/ff": {"w": placed(w_LDF, None, *dims)},
            "decoder/norm": {"scale": placed(rng.normal(size=16).astype(jnp.bfloat16))},
        },
        opt_state=(Adam(placed(np.int32(7)), {"w": placed(-w_LDF, None, *dims)}), ()),
    )


def like(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got: Any, wanted: Any) -> None:
    for (at, a), (bt, b) in zip(*map(jax.tree.leaves_with_path, (got, wanted)), strict=True):
        assert (at, a.dtype) == (bt, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(root: Path, state: Any, step: int = 1, extra: dict[str, Any] | None = None) -> str:
    """Save one checkpoint and give its folder."""
    with Checkpoints(str(root)) as checkpoints:
        checkpoints.save(step, state, extra or {})
    return str(root / "checkpoints" / f"step_{step}")
