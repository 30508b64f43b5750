"""Checkpoints of ZeRO-transformer: the names, the model that they are of, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import packed_files
import pytest
import source_logits

from mesh_transformer.checkpoints import opening, zero_writer
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.source import PARAMS, Key
from mesh_transformer.checkpoints.zero_transformer import ZeroTransformer
from mesh_transformer.config import ModelConfig

LAYERS, D, HEADS, VOCAB, SEQ = 3, 24, 6, 40, 20
TOKENS_BT = np.random.default_rng(1).integers(0, VOCAB, (2, SEQ))
LINEAR = {
    **{f"CausalAttention_0/{it}_proj": (D, D) for it in ("query", "key", "value")},
    **{"CausalAttention_0/residual_out": (D, D), "MLPBlock_0/fc_in": (D, 4 * D)},
    "MLPBlock_0/fc_residual": (4 * D, D),
}
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO-transformer": {"alibi": True},
    "without positions": {},
    "with biases": {"alibi": True, "biases": True},
    "one norm a block": {"alibi": True, "biases": True, "fused": True},
    "a table of positions": {"biases": True, "table": True},
}
KEYS: dict[str, Any] = {
    **{"layers": LAYERS, "d_model": D, "n_heads": HEADS, "n_vocab": VOCAB, "seq": SEQ},
    **{"residual": "sequential", "norm": "layernorm-nobias", "norm_epsilon": 1e-6, "pe": "alibi"},
    **{"ff_bias": False, "embed_bias": False, "head_bias": False, "tie_embeddings": True},
}
MODEL = ModelConfig(**KEYS)


def model_of(
    alibi: bool = False, biases: bool = False, fused: bool = False, table: bool = False
) -> ModelConfig:
    """Return the configuration that docs/howto_convert_checkpoints.md gives for such a model."""
    changed: dict[str, Any] = {
        "pe": "alibi" if alibi else "none",
        "norm": "layernorm" if biases else "layernorm-nobias",
        "residual": "parallel" if fused else "sequential",
        **dict.fromkeys(("qkv_bias", "o_bias", "ff_bias"), biases),
        "embed_bias": table,
    }
    return ModelConfig(**{**KEYS, **changed})


def weights(
    alibi: bool = False, biases: bool = False, fused: bool = False, table: bool = False
) -> dict[str, np.ndarray]:
    """Return random weights by the names of Flax."""
    rng = np.random.default_rng(0)

    def random(*shape: int, around: float = 0.0) -> np.ndarray:
        return (around + 0.3 * rng.normal(size=shape)).astype(np.float32)

    made = {"wte/embedding": random(VOCAB, D)}
    if table:
        made["wpe/embedding"] = random(SEQ, D)
    norms = ["LayerNorm_0"]
    for i in range(LAYERS):
        block = f"TransformerBlock_{i}/"
        norms += [block + "LayerNorm_0", *([] if fused else [block + "LayerNorm_1"])]
        for name, shape in LINEAR.items():
            made[f"{block}{name}/kernel"] = random(*shape)
            if biases:
                made[f"{block}{name}/bias"] = random(shape[1])
    for name in norms:
        made[f"{name}/scale"] = random(D, around=1.0)
        if biases:
            made[f"{name}/bias"] = random(D)
    return made


def slopes(n: int) -> list[float]:
    """Return ALiBi's slopes as the program has them."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    less = 2 ** int(math.log2(n))
    return slopes(less) + slopes(2 * less)[0::2][: n - less]


def forward(held: dict[str, np.ndarray], *, alibi: bool) -> np.ndarray:
    """Compute the logits as the programs in Flax do, in float64."""

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return y * held[f"{name}/scale"] + held.get(f"{name}/bias", 0)

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ held[f"{name}/kernel"] + held.get(f"{name}/bias", 0)

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        def heads(it: str) -> np.ndarray:
            return dense(x, f"{name}/{it}_proj").reshape(2, SEQ, HEADS, -1).swapaxes(1, 2)

        scores = heads("query") @ heads("key").swapaxes(2, 3) / math.sqrt(D // HEADS)
        if alibi:  # the program's one row for all queries: softmax takes no notice of the rest
            scores -= np.array(slopes(HEADS))[:, None, None] * np.arange(SEQ - 1, -1, -1.0)
        scores = np.where(np.tril(np.ones((SEQ, SEQ))), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ heads("value")
        return dense(mixed.swapaxes(1, 2).reshape(2, SEQ, D), f"{name}/residual_out")

    def feed_forward(x: np.ndarray, name: str) -> np.ndarray:
        y = dense(x, f"{name}/fc_in")
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        return dense(y, f"{name}/fc_residual")

    x = held["wte/embedding"][TOKENS_BT].astype(np.float64)
    if "wpe/embedding" in held:
        x = x + held["wpe/embedding"][np.ones((2, SEQ), int)]
    for i in range(LAYERS):
        block = f"TransformerBlock_{i}/"
        y = normed(x, block + "LayerNorm_0")
        mixed = attention(y, block + "CausalAttention_0")
        if f"{block}LayerNorm_1/scale" in held:
            x = x + mixed
            x = x + feed_forward(normed(x, block + "LayerNorm_1"), block + "MLPBlock_0")
        else:
            x = x + mixed + feed_forward(y, block + "MLPBlock_0")
    return normed(x, "LayerNorm_0") @ held["wte/embedding"].T


def write(path: pathlib.Path, held: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(packed_files.tree(packed_files.nested(held)))
    return str(path)


def opened(path: str, model: ModelConfig) -> Any:
    return opening.open_source(opening.find(path), model)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_what_flax_has_packed_computes_the_same_here(kind: str, tmp_path: pathlib.Path) -> None:
    held, model = weights(**KINDS[kind]), model_of(**KINDS[kind])
    write(tmp_path / "params" / "params_7", {f"params/{name}": it for name, it in held.items()})
    write(tmp_path / "params" / "params_10", {f"params/{name}": it for name, it in held.items()})
    (tmp_path / "params" / "notes_11").write_text("no checkpoint")
    source = opened(str(tmp_path), model)
    assert source.step == 10 and source.where.endswith("params_10")
    assert source.about == "weights of ZeRO-transformer, Flax, float32"
    expected = forward(held, alibi=KINDS[kind].get("alibi", False))
    assert np.abs(expected).max() > 1
    found = source_logits.logits(source, model, TOKENS_BT)
    # float32 against float64, over three layers of logits up to 20
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    (tmp_path / "again").mkdir()
    float32 = np.dtype(np.float32)
    zero_writer.write_flax(
        str(tmp_path / "again"), source, model, dtype=float32, advance=lambda n: None
    )
    if "wpe/embedding" in held:  # of which the program gives all tokens row 1
        held["wpe/embedding"] = np.tile(held["wpe/embedding"][1], (SEQ, 1))
    params = {name: held[name] for name in sorted(held, key=lambda it: it.split("/"))}
    state = {"step": 10, "params": {"params": packed_files.nested(params)}, "opt_state": b"\xc0"}
    assert (tmp_path / "again" / "params_10").read_bytes() == packed_files.tree(state)


def test_a_training_state_is_read_without_its_optimizer(tmp_path: pathlib.Path) -> None:
    held = weights(alibi=True)
    state = {
        "step": 7,
        **{f"params/params/{name}": it for name, it in held.items()},
        "opt_state/1/0/count": np.int32(7).reshape(()),
        **{f"opt_state/1/0/mu/params/{name}": it for name, it in held.items()},
    }
    source = opened(write(tmp_path / "checkpoint_7", state), MODEL)
    assert source.step == 7 and source.counts is None
    key = Key(PARAMS, "decoder/layers/block/attention/q/w", 1)
    expected = held["TransformerBlock_1/CausalAttention_0/query_proj/kernel"]
    np.testing.assert_array_equal(source.read(key), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["ZeRO-transformer", "with biases", "one norm a block"])
def test_the_export_to_pytorch_holds_the_same(kind: str, tmp_path: pathlib.Path) -> None:
    torch: Any = pytest.importorskip("torch", reason="reads and writes PyTorch's own files")
    held, model = weights(**KINDS[kind]), model_of(**KINDS[kind])
    names = {
        **{f"CausalAttention_0/{it}_proj": f"attn.{it}" for it in ("query", "key", "value")},
        **{"CausalAttention_0/residual_out": "attn.fc_resid", "MLPBlock_0/fc_in": "mlp.fc1"},
        "MLPBlock_0/fc_residual": "mlp.fc_resid",
        "LayerNorm_0": "ln" if KINDS[kind].get("fused") else "ln1",
        "LayerNorm_1": "ln2",
    }
    state = {"wte.weight": held["wte/embedding"], "lm_head.weight": held["wte/embedding"]}
    for name, value in held.items():
        *module, leaf = name.split("/")
        leaf = "bias" if leaf == "bias" else "weight"
        if module[0].startswith("Transformer"):
            number = module[0].rpartition("_")[2]
            state[f"blocks.{number}.{names['/'.join(module[1:])]}.{leaf}"] = value.T
        elif module[0] == "LayerNorm_0":
            state[f"norm.{leaf}"] = value
    for name, value in list(state.items()):  # its layers have biases, whether it has trained any
        if name not in ("wte.weight", "lm_head.weight"):
            state.setdefault(name.replace("weight", "bias"), np.zeros(len(value), np.float32))
    state["blocks.0.attn.mask"] = np.tril(np.ones((1, 1, SEQ, SEQ), np.uint8))
    state["blocks.0.attn.slopes"] = np.array(slopes(HEADS), np.float32)
    path = tmp_path / "417M.pth"
    torch.save({name: torch.tensor(value.copy()) for name, value in state.items()}, path)
    source = opened(str(path), model)
    assert source.about == "weights of ZeRO-transformer, PyTorch, float32"
    flax = ZeroTransformer(write(tmp_path / "params_7", held), model)
    assert source.arrays == flax.arrays
    for key in source.arrays:
        np.testing.assert_array_equal(source.read(key), flax.read(key))
    (tmp_path / "again").mkdir()
    float32 = np.dtype(np.float32)
    zero_writer.write_torch(
        str(tmp_path / "again"), flax, model, dtype=float32, advance=lambda n: None
    )
    ours = torch.load(tmp_path / "again" / "params_7.pth")
    for name, value in state.items():
        np.testing.assert_array_equal(ours[name].numpy(), value, err_msg=name)
        assert ours[name].numpy().dtype == value.dtype, name
    biases: Any = dict.fromkeys(("qkv_bias", "o_bias", "ff_bias"), True)
    biased = opened(str(path), dataclasses.replace(model, norm="layernorm", **biases))
    assert biased.arrays.keys() >= source.arrays.keys(), "a model with biases may have them zero"
    of_others = {f"blocks.{i}.attn.{it}" for i in range(1, LAYERS) for it in ("mask", "slopes")}
    assert ours.keys() == state.keys() | of_others, "its port loads a whole state dict alone"


def test_every_key_that_the_file_contradicts_is_named(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "params_7", weights(alibi=True, biases=True))
    with pytest.raises(CheckpointError) as error:
        opened(path, dataclasses.replace(MODEL, layers=2, norm_epsilon=1e-5, n_vocab=50))
    told = str(error.value).splitlines()
    assert told[0] == f"{path}, of ZeRO-transformer, does not fit the configuration:"
    assert set(told[1:]) == {
        "  - layers is 2, 3 in the file",
        "  - n_vocab is 50, 40 in the file",
        "  - norm_epsilon is 1e-05, 1e-06 in the file",
        "  - norm is 'layernorm-nobias', 'layernorm' in the file",
        "  - qkv_bias is False, True in the file",
        "  - o_bias is False, True in the file",
        "  - ff_bias is False, True in the file",
    }
    with pytest.raises(CheckpointError, match=r"is of ZeRO-transformer, whose checkpoints hold no"):
        opening.stored_config(path)


def test_another_file_than_its_name_says_is_refused(tmp_path: pathlib.Path) -> None:
    held = weights(alibi=True)
    del held["TransformerBlock_1/MLPBlock_0/fc_in/kernel"]
    held["TransformerBlock_2/more"] = np.zeros(3, np.float32)
    held["LayerNorm_0/scale"] = np.zeros(D + 1, np.float32)
    with pytest.raises(CheckpointError) as error:
        opened(write(tmp_path / "params_7", held), MODEL)
    assert str(error.value).splitlines()[1:] == [
        "  - TransformerBlock_1/MLPBlock_0/fc_in/kernel is missing",
        "  - TransformerBlock_2/more is no part of a ZeRO-transformer",
        f"  - LayerNorm_0/scale is [{D + 1}], [{D}] by configuration",
    ]
    text = tmp_path / "params_8"
    text.write_text("no weights")
    with pytest.raises(CheckpointError, match="params_8 is damaged, or not packed by Flax"):
        opened(str(text), MODEL)
