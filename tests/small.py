"""A model small enough to train in a test, on any mesh of the eight CPU devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from mesh_transformer import config
from mesh_transformer.pod.worker import Worker
from mesh_transformer.training.steps import Steps, TrainState

KEYS: dict[str, Any] = {
    "layers": 2,
    "d_model": 32,
    "n_heads": 8,
    "n_vocab": 64,
    "seq": 16,
    "norm": "layernorm",
    "pe": "rotary",
    "compute_dtype": "float32",
    "zero_stage": 0,
    "per_replica_batch": 1,
    "warmup_steps": 0,
    "anneal_steps": 100,
    "lr": 1e-2,
    "end_lr": 1e-3,
    "weight_decay": 0.1,
    "total_steps": 200,
    "train_set": "train.index",
    "model_dir": "runs/small",
    "ckpt_every": 10,
    "keep_every": 100,
    "name": "small",
}

KINDS = (
    ("rotary", "layernorm"),  # layernorm-desync is the same
    ("t5", "rmsnorm"),
    ("fixed", "scalenorm-bias"),
    ("none", "layernorm-nobias"),
    ("rotary", "rmsnorm-bias"),
    ("rotary", "scalenorm"),
)
"""Every position encoding and every norm of the original, but not each with each."""

_BIAS_FREE = {"ff_bias": False, "embed_bias": False, "head_bias": False}
_BIASED = {"qkv_bias": True, "o_bias": True, "embed_bias": False, "head_bias": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **_BIASED,
        **{"residual": "sequential", "pe": "fixed", "tie_embeddings": True, "activation": "gelu"},
    },
    "neox": {
        **_BIASED,
        **{"residual": "parallel-untied", "pe": "rotary-half", "pe_rotary_dims": 2},
    },
    "neo": {
        **{"residual": "sequential", "pe": "sinusoidal", "o_bias": True, "tie_embeddings": True},
        **{"window": 3, "window_every": 2, "attention_scale": 1.0},
    },
    "opt": {
        **_BIASED,
        **{"residual": "post-norm", "final_norm": False, "pe": "fixed", "pe_offset": 2},
        **{"d_embed": 16, "activation": "relu", "tie_embeddings": True},
    },
    "bloom": {
        **_BIASED,
        **{"residual": "sequential", "pe": "alibi", "embed_norm": True, "tie_embeddings": True},
    },
    "llama": {
        **_BIAS_FREE,
        **{"residual": "sequential", "norm": "rmsnorm-mean", "pe": "rotary-half"},
        **{"n_kv_heads": 4, "gated": True, "activation": "silu", "pe_scaling": "llama3"},
        "pe_scaling_factors": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 8.0,
        },
    },
    "one head of keys": {
        **_BIAS_FREE,
        **{"residual": "sequential", "norm": "rmsnorm-mean-plus-one", "pe": "rotary"},
        **{
            "n_kv_heads": 1,
            "qk_norm": True,
            "embed_scale": 32**0.5,
            "gated": True,
            "qkv_bias": True,
            "window": 5,
        },
    },
    "research": {
        **{"use_static_sgu": True, "head_qk_trick": True, "pe": "alibi", "qkv_bias": True},
        **{"o_bias": True, "embed_bias": False, "tie_embeddings": True, "head_bias": False},
    },
}
"""Every other option of a decoder, as families combine them."""

_T5 = {
    **_BIAS_FREE,
    **{"residual": "sequential", "norm": "rmsnorm-mean", "pe": "t5", "attention_scale": 1.0},
    **{"layers": 3, "encoder_layers": 2, "encoder_seq": 20, "pe_buckets": 8, "pe_max_distance": 12},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {
        **_T5,
        **{"activation": "relu", "tie_embeddings": True, "output_scale": 32**-0.5, "d_head": 8},
    },
    "t5 v1.1": {**_T5, "gated": True, "d_ff": 48, "pad_id": 3},
}
"""Both forms of T5: the first, and that of v1.1 and Flan-T5."""

COMPILED_FAST = {"xla_backend_optimization_level": 0}
"""Options of `jax.jit` that halve the time to compile what runs only once."""


def parsed(**keys: Any) -> config.Config:
    """Return the small configuration with some keys changed."""
    return config.parse(KEYS | keys)


def worker(dp: int = 1, mp: int = 1, **keys: Any) -> Worker:
    """Return a host with this mesh; the same one, and its compiled steps, for the same arguments.

    A `variant` among the keys is one of `VARIANTS` or `ENCODER_DECODERS`.
    Its weights are what the last test left there: set `state` before using them.
    """
    return _worker(dp, mp, **_changes(keys))


@functools.cache
def _worker(dp: int, mp: int, variant: str = "", **keys: Any) -> Worker:
    keys = (VARIANTS | ENCODER_DECODERS).get(variant, {}) | keys
    return Worker(parsed(cores_per_replica=mp, **keys), jax.devices()[: dp * mp])


def _changes(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if KEYS.get(key) != value}


def steps(dp: int = 1, mp: int = 1, **keys: Any) -> Steps:
    """Return the compiled steps of a mesh; compiled once per test run."""
    return worker(dp, mp, **keys).steps


def start(dp: int = 1, mp: int = 1, **keys: Any) -> TrainState:
    """Return the state before the first step, initialised on one device and put on the mesh."""
    host_state = _initial(**_changes(keys | {"zero_stage": KEYS["zero_stage"]}))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, steps(dp, mp, **keys).state)
    return jax.device_put(host_state, shardings, may_alias=False)


@functools.cache
def _initial(**keys: Any) -> TrainState:
    return jax.device_get(steps(**keys).init(jax.random.key(0)))


@functools.cache
def weights(pe: str = "rotary", norm: str = "layernorm") -> Any:
    """Return weights sharp enough for attention and positions to matter, in NumPy arrays."""
    sharp = jax.tree.map(lambda leaf: np.asarray(leaf) * 2, start(norm=norm).params)
    shapes = steps(pe=pe, norm=norm).state.params
    tables = {module: shapes[module] for module in set(shapes) - set(sharp)}
    normal = np.random.default_rng(0).normal
    return sharp | jax.tree.map(lambda leaf: np.float32(normal(size=leaf.shape)), tables)


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random token ids of the small vocabulary."""
    return np.random.default_rng(seed).integers(0, KEYS["n_vocab"], shape, dtype=np.int32)


def pairs(*shape: int, variant: str, seed: int = 0) -> np.ndarray:
    """Return random records of an encoder-decoder, of as many lengths, padding after the tokens."""
    model = parsed(**ENCODER_DECODERS[variant]).model
    rng = np.random.default_rng(seed)
    records = rng.integers(4, model.n_vocab, (*shape, model.encoder_seq + model.seq + 1))
    for record in records.reshape(-1, records.shape[-1]):
        record[rng.integers(2, model.encoder_seq + 1) : model.encoder_seq + 1] = model.pad_id
        record[rng.integers(2, model.seq + 1) + model.encoder_seq + 1 :] = model.pad_id
    return records.astype(np.int32)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compare parameter trees name by name.

    The tolerance is absolute, and relative to the largest number of an array where that is below 1.
    """
    assert {module: set(values) for module, values in ours.items()} == {
        module: set(values) for module, values in theirs.items()
    }
    for module, values in theirs.items():
        for name, value in values.items():
            atol = tolerance * min(1, float(np.abs(value).max()))
            np.testing.assert_allclose(
                np.asarray(ours[module][name]),
                np.asarray(value),
                rtol=0,
                atol=atol,
                err_msg=f"{module}/{name}",
            )
