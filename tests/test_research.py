"""The static SGU and Head-QK are the formulas that they are meant to be, written out in NumPy."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer.model.copying import HeadQK, Pointers, copied
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.mixing import static_sgu
from mesh_transformer.network import SGU_WIDTH

NORMAL = np.random.default_rng(0).normal


def model_config(**keys: Any) -> Any:
    return small.parsed(**keys).model


def test_the_static_sgu_weighs_the_tokens_before_by_distance_in_a_band() -> None:
    n = SGU_WIDTH + 20
    y_BSD = NORMAL(size=(2, n, 3)).astype(np.float32)
    expected = np.zeros_like(y_BSD)
    for t in range(n):
        for s in range(max(0, t - 127), t + 1):
            expected[:, t] += y_BSD[:, s] / (t - s + 2)
    z_BTD = static_sgu(jnp.asarray(y_BSD), jnp.arange(n)[None])
    np.testing.assert_allclose(z_BTD, expected, rtol=0, atol=1e-5)
    # Of a cache, for queries at other positions in each sequence.
    some_BTD = static_sgu(jnp.asarray(y_BSD), jnp.array([[3], [140]]))
    np.testing.assert_allclose(some_BTD[:, 0], expected[[0, 1], [3, 140]], rtol=0, atol=1e-5)
    gradient = jax.grad(lambda y: static_sgu(y, jnp.arange(n)[None]).sum())(jnp.asarray(y_BSD))
    assert not np.asarray(gradient).any()


def test_attention_beside_a_static_sgu_is_half_as_wide() -> None:
    model = model_config(use_static_sgu=True)
    shapes = jax.eval_shape(make_model(model).init, jax.random.key(0))
    attention = "decoder/layers/block/attention/"
    assert model.d_head == small.KEYS["d_model"] // 2 // small.KEYS["n_heads"]
    assert shapes[f"{attention}q"]["w"].shape == (2, 16, 16)
    assert shapes[f"{attention}o"]["w"].shape == (2, 16, 16)
    assert shapes["decoder/layers/block/ff/in"]["w"].shape == (2, 32, 128)


def normed(x_TD: np.ndarray, norm: Any) -> np.ndarray:
    x_TD = x_TD - x_TD.mean(-1, keepdims=True)
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["offset"]


def attended(y_TD: np.ndarray, block: dict[str, Any], n_heads: int) -> np.ndarray:
    q_THK, k_SHK, v_SHK = (
        (y_TD @ block[f"attention/{it}"]["w"]).reshape(len(y_TD), n_heads, -1) for it in "qkv"
    )
    logits_HTS = np.einsum("thk,shk->hts", q_THK, k_SHK) / np.sqrt(q_THK.shape[-1])
    weights_HTS = np.exp(np.where(np.tri(len(y_TD), dtype=bool), logits_HTS, -np.inf))
    weights_HTS /= weights_HTS.sum(-1, keepdims=True)
    y_THK = np.einsum("hts,shk->thk", weights_HTS, v_SHK)
    return y_THK.reshape(len(y_TD), -1) @ block["attention/o"]["w"]


def predicted(tokens_T: np.ndarray, params: Any, layers: int, n_heads: int) -> np.ndarray:
    """Return the logits of a GPT-J without positions, with a static SGU and Head-QK."""
    of = {name.removeprefix("decoder/"): values for name, values in params.items()}
    n = len(tokens_T)
    distance_TS = np.arange(n)[:, None] - np.arange(n)
    is_near_TS = (distance_TS >= 0) & (distance_TS < 128)
    mixing_TS = np.where(is_near_TS, 1 / (np.abs(distance_TS) + 2.0), 0)
    x_TD = of["embed"]["embeddings"][tokens_T] + of["embed"]["b"]
    half = x_TD.shape[1] // 2
    for layer in range(layers):
        block = {
            name.removeprefix("layers/block/"): {it: stack[layer] for it, stack in values.items()}
            for name, values in of.items()
            if name.startswith("layers/")
        }
        y_TD = normed(x_TD, block["norm"])
        mixed_TD = mixing_TS @ y_TD[:, :half]
        a_TD = np.concatenate((mixed_TD, attended(y_TD[:, half:], block, n_heads)), axis=1)
        h_TF = y_TD @ block["ff/in"]["w"] + block["ff/in"]["b"]
        h_TF = h_TF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h_TF + 0.044715 * h_TF**3)))
        x_TD = x_TD + a_TD + h_TF @ block["ff/out"]["w"] + block["ff/out"]["b"]
    x_TD = normed(x_TD, of["final_norm"])
    products_TS = (x_TD @ of["head_qk/q"]["w"]) @ (x_TD @ of["head_qk/k"]["w"]).T / 256
    logits_TV = x_TD @ of["unembed"]["w"] + of["unembed"]["b"]
    return logits_TV + np.tril(products_TS) @ np.eye(logits_TV.shape[1])[tokens_T]


def test_logits_of_a_whole_model_are_those_of_its_formulas() -> None:
    """Longer than the band, in float64 beside float32."""
    model = model_config(
        use_static_sgu=True, head_qk_trick=True, pe="none", seq=SGU_WIDTH + 12, n_heads=4
    )
    shapes = jax.eval_shape(make_model(model).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.2 * NORMAL(size=leaf.shape), shapes)
    tokens_BT = small.tokens(1, model.seq)
    expected_TV = predicted(tokens_BT[0], params, model.layers, model.n_heads)
    apply = jax.jit(make_model(model).apply, compiler_options=small.COMPILED_FAST)
    single = jax.tree.map(np.float32, params)
    found_BTV, _ = apply(single, tokens_BT, jnp.arange(model.seq)[None])
    np.testing.assert_allclose(found_BTV[0], expected_TV, rtol=0, atol=1e-4)


@pytest.mark.thorough
def test_head_qk_adds_its_products_to_the_logits_of_the_tokens_before() -> None:
    d_model, n_vocab, length = 32, 64, 7
    x_BTD = NORMAL(size=(2, length, d_model)).astype(np.float32)
    tokens_BT = jnp.asarray(small.tokens(2, length) % 5)  # some more than once
    logits_BTV = NORMAL(size=(2, length, n_vocab)).astype(np.float32)
    cfg = model_config(head_qk_trick=True)

    def add(x: Any, logits: Any) -> Any:
        pointers, _ = HeadQK(cfg, name="head_qk")(x, tokens_BT, jnp.arange(length)[None], None)
        return copied(logits, pointers, jnp.float32)

    run = hk.without_apply_rng(hk.transform(add))
    params = run.init(jax.random.key(0), x_BTD, logits_BTV)
    np.testing.assert_array_equal(run.apply(params, x_BTD, logits_BTV), logits_BTV)  # at first
    q_DK, k_DK = params["head_qk/q"]["w"], np.asarray(params["head_qk/k"]["w"])
    assert q_DK.shape == k_DK.shape == (d_model, 256)
    np.testing.assert_allclose(k_DK @ k_DK.T, 0.01 * np.eye(d_model), rtol=0, atol=1e-6)

    q_DK, k_DK = (NORMAL(size=k_DK.shape).astype(np.float32) for _ in range(2))
    given = {"head_qk/q": {"w": q_DK}, "head_qk/k": {"w": k_DK}}
    expected = logits_BTV.astype(np.float64)
    for b in range(2):
        for t in range(length):
            for s in range(t + 1):
                product = (x_BTD[b, t] @ q_DK) @ (x_BTD[b, s] @ k_DK) / 256
                expected[b, t, tokens_BT[b, s]] += product
    found = run.apply(given, x_BTD, logits_BTV)
    assert np.abs(expected - logits_BTV).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_token_that_stands_at_two_slots_gets_what_points_at_both() -> None:
    pointers = Pointers(jnp.array([[[0.5, 2.0]]]), jnp.array([[3, 3]]))
    logits_BTV = copied(jnp.zeros((1, 1, 8)), pointers, jnp.float32)
    assert logits_BTV[0, 0].tolist() == [0, 0, 0, 2.5, 0, 0, 0, 0]
