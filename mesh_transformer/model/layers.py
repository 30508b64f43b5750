"""The parts of a decoder beside its blocks: norms, matrices, embedding, head.

Modules take positions and cache as arguments and infer nothing from lengths; every module that
may change the cache returns it. Weights are made under explicit names, which checkpoints keep.
Initial values and formulas are those of mesh-transformer-jax, the program that trained GPT-J-6B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from mesh_transformer.config import ModelConfig
from mesh_transformer.model.initial import stddevs
from mesh_transformer.sharding import columns, lookup, shard

PRODUCT = "product"
"""Names, for rematerialisation, what is dear to compute again: products and attention."""


def kept_for_backward(part: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """Let a part of the model keep for its backward pass its input, its products too, or all."""
    if remat == "none":
        return part
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    }
    return hk.remat(part, policy=policies[remat])


PADDING_BIAS = -1e4
"""Bias of rows that pad a vocabulary: the softmax gives them exactly nothing, in float16 too."""


@dataclasses.dataclass
class Norm(hk.Module):
    """Normalise features, in float32, to the input's dtype.

    `layernorm` (arXiv:1607.06450), with epsilon inside the root; `layernorm-nobias` has no
    offset. `rmsnorm` and `scalenorm` (arXiv:1910.05895) divide by the length of the vector plus
    epsilon and multiply by a scale that starts at sqrt(D), a vector for the one, a number for the
    other; the `-bias` forms add an offset of the same shape. `rmsnorm-mean` (arXiv:1910.07467)
    divides by the root of the mean square plus epsilon; `-plus-one` multiplies by 1 + scale.

    The tokens of all sequences are one dimension meanwhile: over two, B and T, XLA on CPUs sums
    ten times slower.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        kind, epsilon = self.config.norm, self.config.norm_epsilon
        d_model = x_BTD.shape[-1]
        y_ND = x_BTD.reshape(-1, d_model).astype(jnp.float32)
        shape, scale, offset, start = [d_model], "scale", "offset", 1.0
        has_offset = kind == "layernorm" or kind == "layernorm-desync" or kind.endswith("-bias")
        if kind.startswith("layernorm"):
            y_ND = y_ND - y_ND.mean(-1, keepdims=True)
            y_ND = y_ND * jax.lax.rsqrt(jnp.square(y_ND).mean(-1, keepdims=True) + epsilon)
        elif kind.startswith("rmsnorm-mean"):
            y_ND = mean_square_normalised(y_ND, epsilon)
            start = 1.0 if kind == "rmsnorm-mean" else 0.0
        else:
            length = jnp.sqrt(jnp.square(y_ND).sum(-1, keepdims=True))
            y_ND = y_ND / (length + epsilon)
            start = math.sqrt(d_model)
            if kind.startswith("scalenorm"):
                shape, scale, offset = [], "gain", "shift"
        factor = hk.get_parameter(scale, shape, init=hk.initializers.Constant(start))
        y_ND = y_ND * (1 + factor if kind == "rmsnorm-mean-plus-one" else factor)
        if has_offset:
            y_ND = y_ND + hk.get_parameter(offset, shape, init=jnp.zeros)
        return y_ND.reshape(x_BTD.shape).astype(x_BTD.dtype)


def mean_square_normalised(x: jax.Array, epsilon: float) -> jax.Array:
    """Divide by the root of the mean square of the last axis (RMSNorm without its scale)."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


@dataclasses.dataclass
class Matrix(hk.Module):
    """A weight `[n_in, n_out]` and its bias; `columns` and `rows` multiply.

    It starts truncated normal, of this standard deviation, unless `init` is given.
    """

    n_in: int
    n_out: int
    stddev: float = 1.0
    init: hk.initializers.Initializer | None = None
    name: str | None = None

    def __call__(self) -> jax.Array:
        init = self.init or hk.initializers.TruncatedNormal(stddev=self.stddev)
        return hk.get_parameter("w", [self.n_in, self.n_out], init=init)

    def bias(self) -> jax.Array:
        """Return the bias `[n_out]` that goes with the weight, for `plus`; it starts at 0."""
        return hk.get_parameter("b", [self.n_out], init=jnp.zeros)


def plus(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """Add to features what is learned and the same for many tokens, in float32.

    For the sake of the parameter's gradient: a sum over all these tokens.
    """
    return (x.astype(jnp.float32) + parameter.astype(jnp.float32)).astype(x.dtype)


Product = tuple[jax.Array, str]
"""A matrix to multiply by, and its dimensions, as `columns` takes them."""


@dataclasses.dataclass
class Embed(hk.Module):
    """Token embeddings `[V, D]`, split over `mp` by V, and the original's one bias `[D]`."""

    config: ModelConfig
    name: str | None = None

    def __call__(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the embeddings `BTD` of tokens, and the table, which a tied head multiplies by."""
        cfg = self.config
        init = hk.initializers.TruncatedNormal(stddev=stddevs(cfg).embed)
        table_VE = hk.get_parameter("embeddings", [cfg.n_vocab, cfg.d_embed], init=init)
        x_BTD = lookup(table_VE, tokens_BT)
        if cfg.embed_scale != 1:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.d_embed != cfg.d_model:
            project = Matrix(cfg.d_embed, cfg.d_model, stddevs(cfg).embed_project, name="project")
            x_BTD = x_BTD @ project()
        if cfg.embed_bias:
            x_BTD = plus(x_BTD, hk.get_parameter("b", [cfg.d_model], init=jnp.zeros))
        x_BTD = shard(x_BTD, "BTD")
        return (Norm(cfg, name="norm")(x_BTD) if cfg.embed_norm else x_BTD), table_VE


class Head(NamedTuple):
    """The weights that make logits of the last features.

    Attributes:
        w_EV: Split over `mp` by V.
        b_V: A bias, or None.
        project_DE: What the features are multiplied by before, or None.
    """

    w_EV: jax.Array
    b_V: jax.Array | None
    project_DE: jax.Array | None


@dataclasses.dataclass
class Unembed(hk.Module):
    """The head `[D, V]`, or the embeddings' table, and its bias; `logits` applies them.

    Rows that pad a vocabulary would have logit 0, which may well be the largest. A head with a bias
    learns better, as mesh-transformer-jax's did; one without has `PADDING_BIAS` there.
    """

    config: ModelConfig
    name: str | None = None

    def __call__(self, table_VE: jax.Array) -> Head:
        cfg = self.config
        b_V = project_DE = None
        if cfg.tie_embeddings:
            w_EV = shard(table_VE.T, "EV")
        else:
            init = hk.initializers.TruncatedNormal(stddev=stddevs(cfg).head)
            w_EV = hk.get_parameter("w", [cfg.d_embed, cfg.n_vocab], init=init)
        if cfg.head_bias:
            b_V = hk.get_parameter("b", [cfg.n_vocab], init=jnp.zeros)
        elif cfg.n_tokens < cfg.n_vocab:
            b_V = shard(jnp.where(jnp.arange(cfg.n_vocab) < cfg.n_tokens, 0, PADDING_BIAS), "V")
        if cfg.d_embed != cfg.d_model:
            spread = stddevs(cfg).head_project
            project_DE = Matrix(cfg.d_model, cfg.d_embed, spread, name="project")()
        return Head(w_EV, b_V, project_DE)


def logits(x_BTD: jax.Array, head: Head, scale: float = 1.0) -> jax.Array:
    """Return float32 logits, `scale` times the products plus the bias, split over `mp` by V."""
    if head.project_DE is not None:
        x_BTD = x_BTD @ head.project_DE
    (logits_BTV,) = columns(x_BTD, (head.w_EV, "DV"), dtype=jnp.float32)
    if scale != 1:
        logits_BTV = logits_BTV * scale
    if head.b_V is not None:
        logits_BTV = logits_BTV + head.b_V.astype(jnp.float32)
    return shard(logits_BTV, "BTV")
