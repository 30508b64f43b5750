"""The decoder's parts, parameters and initial values are what checkpoints and papers say.

After a change of parameters that is meant, write the golden file anew and read its difference:

    PYTHONPATH=. python tests/test_model.py
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import types
import warnings
from typing import Any, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer import config, network
from mesh_transformer.errors import UserError
from mesh_transformer.model.attention import implementation_for
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.layers import Norm
from mesh_transformer.model.positions import RelativePositions, rotary, rotate
from mesh_transformer.sharding import PARAM_DIMS, param_dims

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "parameters.json"
NORMS = get_args(network.Norm)
POSITIONS = get_args(network.Positions)
HOW = (
    "if the change is meant, run `PYTHONPATH=. python tests/test_model.py` and read the difference"
)


def model_config(**keys: Any) -> config.ModelConfig:
    """Return the small network with some keys changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", config.ConfigWarning)  # layernorm-desync is not quite that
        return small.parsed(**keys).model


def shapes(model: config.ModelConfig) -> Any:
    """Return the parameters without computing any."""
    return jax.eval_shape(make_model(model).init, jax.random.key(0))


def paths(params: Any) -> set[str]:
    """Return all parameters as `module/name`."""
    return {f"{module}/{name}" for module, values in params.items() for name in values}


def parameters(name: str) -> dict[str, str]:
    """Return dimensions and shape of every parameter of a configuration file."""
    params = shapes(config.load(ROOT / "configs" / f"{name}.json").model)
    dims = param_dims(params)
    return {
        f"{module}/{key}": f"{dims[module][key]} {value.shape}"
        for module, values in sorted(params.items())
        for key, value in sorted(values.items())
    }


@pytest.mark.parametrize("name", ["quickstart", "gptj_6B_v3-8"])
def test_names_and_shapes_of_parameters_are_those_that_checkpoints_hold(name: str) -> None:
    assert parameters(name) == json.loads(GOLDEN.read_text())[name], HOW


def test_gpt_j_has_the_published_number_of_weights() -> None:
    params = shapes(config.load(ROOT / "configs" / "gptj_6B_v3-8.json").model)
    published, embedding_bias = 6_050_882_784, 4096
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published + embedding_bias


def test_no_kind_of_anything_is_left_out_where_meshes_and_decoding_are_tested() -> None:
    tested_positions, tested_norms = map(set, zip(*small.KINDS, strict=True))
    variants = [model_config(**keys) for keys in small.VARIANTS.values()]
    assert tested_positions | {it.pe for it in variants} == set(POSITIONS)
    assert tested_norms | {it.norm for it in variants} | {"layernorm-desync"} == set(NORMS)
    assert {"parallel"} | {it.residual for it in variants} == set(get_args(network.Residual))


def test_every_parameter_has_one_row_of_dimensions_and_every_row_a_parameter() -> None:
    found = set()
    kinds = [{"norm": norm, "pe": pe} for norm in NORMS for pe in POSITIONS]
    for keys in (*kinds, *small.VARIANTS.values(), *small.ENCODER_DECODERS.values()):
        params = shapes(model_config(**keys))
        param_dims(params)  # raises unless exactly one row of the right rank matches each
        found |= {path.split("/", 1)[1] for path in paths(params)}
    dead = [row for row, _ in PARAM_DIMS if not any(re.fullmatch(row, path) for path in found)]
    assert not dead


def test_parameters_without_a_row_or_with_another_rank_are_all_named() -> None:
    params = {"decoder/unembed": {"w": np.zeros((2, 3, 4)), "scale": np.zeros(3)}}
    with pytest.raises(LookupError) as error:
        param_dims(params)
    assert "decoder/unembed/scale matches 0 rows" in str(error.value)
    assert "decoder/unembed/w has rank 3; its row of PARAM_DIMS says 'DV'" in str(error.value)


def test_initial_values_are_the_original_s() -> None:
    model = model_config(pe="t5", layers=4, d_model=64, n_vocab=512)
    init = jax.jit(make_model(model).init, compiler_options=small.COMPILED_FAST)
    params = jax.device_get(init(jax.random.key(0)))
    d_model, truncated = model.d_model, 0.87962566  # of a normal distribution cut at two deviations
    write, read = 2 / model.layers / math.sqrt(d_model), 1 / math.sqrt(d_model)
    layer = "decoder/layers/block/"
    stddevs = {
        "decoder/embed/embeddings": 1 / math.sqrt(model.n_vocab),
        "decoder/relative_positions/embeddings": 0.02,
        **{f"{layer}attention/{name}/w": read for name in "qkv"},
        f"{layer}attention/o/w": write,
        f"{layer}ff/in/w": read,
        f"{layer}ff/out/w": write,
        "decoder/unembed/w": read,
    }
    for path in paths(params):
        module, name = path.rsplit("/", 1)
        value = params[module][name]
        if path in stddevs:
            assert np.abs(value).max() <= 2 * stddevs[path], path
            spread = value.std() / (stddevs[path] * truncated)
            assert abs(spread - 1) < 4 / math.sqrt(2 * value.size), path
        else:
            assert (value == (1 if name == "scale" else 0)).all(), path
    assert set(stddevs) <= paths(params)


def normalised(norm: str, x: Any, values: dict[str, Any] | None = None) -> tuple[Any, jax.Array]:
    """Return the first parameters of a norm, and its output with these or with `values`."""
    cfg = model_config(norm=norm)
    transformed = hk.without_apply_rng(hk.transform(lambda x: Norm(cfg, name="norm")(x)))
    params = transformed.init(jax.random.key(0), x)
    return params["norm"], transformed.apply({"norm": values} if values else params, x)


X_BTD = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, small.KEYS["d_model"])).astype(np.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_their_formulas(norm: str) -> None:
    x, d_model = X_BTD.astype(np.float64), X_BTD.shape[-1]
    start, _ = normalised(norm, jnp.asarray(X_BTD))
    random = np.random.default_rng(1)
    values = {name: random.normal(size=v.shape).astype(np.float32) for name, v in start.items()}
    _, y_BTD = normalised(norm, jnp.asarray(X_BTD), values)
    if norm.startswith("layernorm"):
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        wanted = {"scale"} | ({"offset"} if norm != "layernorm-nobias" else set())
        first, size = 1.0, d_model
    elif norm.startswith("rmsnorm-mean"):
        expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        wanted, size = {"scale"}, d_model
        first = 0.0 if norm.endswith("plus-one") else 1.0
    else:
        expected = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-5)
        wanted = {"gain"} if norm.startswith("scalenorm") else {"scale"}
        first, size = math.sqrt(d_model), 1 if norm.startswith("scalenorm") else d_model
        if norm.endswith("-bias"):
            wanted |= {"shift"} if norm.startswith("scalenorm") else {"offset"}
    assert set(start) == wanted
    for name, value in start.items():
        multiplies = name in ("scale", "gain")
        assert value.size == size
        np.testing.assert_allclose(value, first if multiplies else 0.0, rtol=1e-6)
        factor = values[name] + 1 if norm.endswith("plus-one") else values[name]
        expected = expected * factor if multiplies else expected
    for name in {"offset", "shift"} & set(start):
        expected = expected + values[name]
    np.testing.assert_allclose(y_BTD, expected, rtol=0, atol=1e-5)


def test_desynchronised_layernorm_is_plain_layernorm() -> None:
    plain, desync = (normalised(norm, X_BTD) for norm in ("layernorm", "layernorm-desync"))
    jax.tree.map(np.testing.assert_array_equal, plain, desync)


def test_norms_of_bfloat16_are_computed_in_float32() -> None:
    x_BTD = jnp.asarray(X_BTD + 1000, jnp.bfloat16)
    _, y_BTD = normalised("layernorm", x_BTD)
    _, exact_BTD = normalised("layernorm", x_BTD.astype(jnp.float32))
    assert y_BTD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_BTD, exact_BTD.astype(jnp.bfloat16))


@pytest.mark.parametrize("n_rotated", [2, 4, 8])
def test_rotation_turns_interleaved_pairs_by_their_position(n_rotated: int) -> None:
    x_BTHK = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 300, 301, 1000, 2047]])
    cfg = model_config(pe_rotary_dims=n_rotated, d_head=8)
    cos_BTR, sin_BTR = rotary(jnp.asarray(positions_BT), cfg)
    y_BTHK = rotate(jnp.asarray(x_BTHK), cos_BTR, sin_BTR, halves=False)
    pairs = x_BTHK[..., :n_rotated:2] + 1j * x_BTHK[..., 1:n_rotated:2]
    frequency = 10_000.0 ** (-np.arange(0, n_rotated, 2) / n_rotated)
    turned = pairs * np.exp(1j * positions_BT[:, :, None, None] * frequency)
    np.testing.assert_allclose(y_BTHK[..., :n_rotated:2], turned.real, rtol=0, atol=1e-3)
    np.testing.assert_allclose(y_BTHK[..., 1:n_rotated:2], turned.imag, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(y_BTHK[..., n_rotated:], x_BTHK[..., n_rotated:])


def test_relative_positions_fall_into_t5_s_buckets() -> None:
    cfg = model_config(pe="t5")
    transformed = hk.without_apply_rng(
        hk.transform(lambda p, s: RelativePositions(cfg, name="bias")(p, s))
    )
    table_HR = jnp.tile(jnp.arange(32.0), (cfg.n_heads, 1))
    positions_BT, slots_S = jnp.array([[200]]), jnp.arange(220)
    bias_BHTS = transformed.apply({"bias": {"embeddings": table_HR}}, positions_BT, slots_S)
    # The table of T5: distance at which each bucket begins, the largest being open.
    begins = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    distance = np.maximum(200 - np.arange(220), 0)
    expected = np.searchsorted(begins, distance, side="right") - 1
    np.testing.assert_array_equal(bias_BHTS[0, 0, 0], expected)


@functools.cache
def outcome(remat: str = "none", compute_dtype: str = "float32", unroll: int = 1) -> Any:
    """Return the gradient of the logits, weighed at random and summed, and the logits."""
    model = make_model(model_config(remat=remat, compute_dtype=compute_dtype, unroll=unroll))
    tokens_BT = small.tokens(2, small.KEYS["seq"])

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        logits_BTV, _ = model.apply(params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
        weights_BTV = np.random.default_rng(0).normal(size=logits_BTV.shape)
        return (logits_BTV * weights_BTV).sum(), logits_BTV

    both = jax.jit(jax.grad(objective, has_aux=True), compiler_options=small.COMPILED_FAST)
    return jax.device_get(both(small.weights()))


def test_each_kind_of_rematerialisation_computes_less_anew_than_the_one_before() -> None:
    tokens_BT, positions_BT = small.tokens(1, 8), jnp.arange(8)[None]

    def products(remat: str) -> int:
        model = make_model(model_config(remat=remat))

        def objective(params: Any) -> jax.Array:
            seen, _ = model.apply(params, tokens_BT, positions_BT, targets_BT=tokens_BT)
            return seen.loss_BT.sum()

        return str(jax.make_jaxpr(jax.grad(objective))(small.weights())).count("dot_general")

    assert products("none") < products("dots") < products("full")


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("dots", 1), ("none", 2), ("full", 2)])
def test_computing_anew_and_unrolling_change_nothing(remat: str, unroll: int) -> None:
    gradient, logits_BTV = outcome(remat, unroll=unroll)
    expected, expected_BTV = outcome()
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    small.assert_close(gradient, expected, 1e-5 * largest)


def test_bfloat16_logits_are_close_and_come_in_float32() -> None:
    _, logits_BTV = outcome(compute_dtype="bfloat16")
    _, expected_BTV = outcome()
    assert logits_BTV.dtype == np.float32
    error = (logits_BTV - expected_BTV).std() / expected_BTV.std()
    assert 1e-4 < error < 0.02, "bfloat16 has 8 significant bits"


@pytest.mark.parametrize("pe", POSITIONS)
def test_a_token_sees_those_before_it_and_only_those(pe: str) -> None:
    model = make_model(model_config(pe=pe))
    tokens_BT, changed = small.tokens(1, 12), 7
    other_BT = tokens_BT.copy()
    other_BT[0, changed] = (other_BT[0, changed] + 1) % small.KEYS["n_vocab"]
    apply = jax.jit(model.apply, compiler_options=small.COMPILED_FAST)
    one, other = (
        apply(small.weights(pe), t, jnp.arange(12)[None])[0][0] for t in (tokens_BT, other_BT)
    )
    np.testing.assert_array_equal(one[:changed], other[:changed])
    assert (np.abs(one[changed:] - other[changed:]).max(-1) > 1e-4).all()


def device(platform: str, kind: str) -> Any:
    """Return what the choice of an attention looks at."""
    capability = {"NVIDIA H100": "9.0", "NVIDIA A100": "8.0", "Tesla T4": "7.5"}.get(kind, "gfx90a")
    return types.SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)


@pytest.mark.parametrize(
    ("platform", "kind", "keys", "expected"),
    [
        ("cpu", "cpu", {}, "xla"),
        ("gpu", "NVIDIA H100", {"d_head": 256, "seq": 256}, "cudnn"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 256, "compute_dtype": "float32"}, "xla"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 200}, "xla"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 256, "pe": "t5"}, "xla"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 256, "window": 255}, "xla"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 256, "window": 256}, "cudnn"),
        ("gpu", "NVIDIA H100", {"d_head": 64, "seq": 256, "dropout_attention": 0.1}, "xla"),
        ("gpu", "NVIDIA A100", {"d_head": 128, "seq": 256}, "cudnn"),
        ("gpu", "NVIDIA A100", {"d_head": 256, "seq": 256}, "xla"),
        ("gpu", "Tesla T4", {"d_head": 64, "seq": 256}, "xla"),
        ("gpu", "AMD Instinct MI250X", {"d_head": 64, "seq": 256}, "xla"),
        ("tpu", "TPU v3", {"d_head": 128, "seq": 256}, "xla"),
        ("tpu", "TPU v4", {"d_head": 128, "seq": 256}, "splash"),
        ("tpu", "TPU v5 lite", {"d_head": 128, "seq": 200}, "xla"),
    ],
)
def test_each_platform_gets_the_best_attention_it_can_run(
    platform: str, kind: str, keys: dict[str, Any], expected: str
) -> None:
    model = model_config(**{"compute_dtype": "bfloat16"} | keys)
    assert implementation_for(model, device(platform, kind)) == expected


A100, H100, V3 = ("gpu", "NVIDIA A100"), ("gpu", "NVIDIA H100"), ("tpu", "TPU v3")


@pytest.mark.parametrize(
    ("name", "on", "keys", "reasons"),
    [
        ("cudnn", A100, {"compute_dtype": "float32"}, ['it needs "compute_dtype": "bfloat16"']),
        ("cudnn", A100, {"d_head": 136}, ["it needs d_head a multiple of 8 up to 128, it is 136"]),
        ("cudnn", H100, {"d_head": 264}, ["it needs d_head a multiple of 8 up to 256, it is 264"]),
        ("cudnn", H100, {"d_head": 68}, ["it needs d_head a multiple of 8 up to 256, it is 68"]),
        (
            "cudnn",
            H100,
            {"dropout_attention": 0.1},
            ["it drops no weights, and dropout_attention is 0.1"],
        ),
        ("cudnn", H100, {"seq": 100}, ["it needs seq a multiple of 128, seq is 100"]),
        ("cudnn", H100, {"pe": "t5"}, ["it takes no bias, which pe t5 adds"]),
        ("splash", ("tpu", "TPU v4"), {"pe": "t5"}, ["it takes no bias, which pe t5 adds"]),
        (
            "cudnn",
            ("gpu", "Tesla T4"),
            {"compute_dtype": "float32", "d_head": 4, "seq": 100, "pe": "t5"},
            [
                "it needs an NVIDIA GPU from Ampere on, this is Tesla T4",
                'it needs "compute_dtype": "bfloat16"',
                "it needs d_head a multiple of 8 up to 256, it is 4",
                "it needs seq a multiple of 128, seq is 100",
                "it takes no bias, which pe t5 adds",
            ],
        ),
        (
            "splash",
            V3,
            {"d_head": 64, "seq": 100, "pe": "t5"},
            [
                "it needs a TPU v4 or newer, this is TPU v3",
                "it needs seq a multiple of 128, seq is 100",
                "it needs d_head a multiple of 128, it is 64",
                "it takes no bias, which pe t5 adds",
            ],
        ),
        ("splash", H100, {}, ["it needs a TPU v4 or newer, this is NVIDIA H100"]),
        ("cudnn", V3, {}, ["it needs an NVIDIA GPU from Ampere on, this is TPU v3"]),
    ],
)
def test_an_attention_that_cannot_run_says_every_reason_and_what_to_do(
    name: str, on: tuple[str, str], keys: dict[str, Any], reasons: list[str]
) -> None:
    """Asked of a stand-in, as no configuration holds all of this: cuDNN in float32 is refused."""
    fits_any = {"compute_dtype": "bfloat16", "d_head": 128, "seq": 256, "pe": "rotary"}
    fits_any |= {"window": 0, "dropout_attention": 0.0}
    model: Any = types.SimpleNamespace(**fits_any | keys, attention=name)
    with pytest.raises(UserError) as error:
        implementation_for(model, device(*on))
    assert str(error.value) == (
        f'"attention": "{name}" cannot be used: {"; ".join(reasons)}; '
        'set "attention" to "auto" or "xla"'
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    golden = {name: parameters(name) for name in ("quickstart", "gptj_6B_v3-8")}
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
