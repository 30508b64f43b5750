"""What `transformers` saves is read, what is written it loads, and both compute the same."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import memory_source
import numpy as np
import pytest
import runs
import small
from memory_source import MemorySource

from mesh_transformer import config, resharding
from mesh_transformer.checkpoints import huggingface
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.fitting import cast
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.checkpoints.layout import CheckpointError
from mesh_transformer.checkpoints.native import Checkpoints
from mesh_transformer.checkpoints.npz import BFLOAT16
from mesh_transformer.checkpoints.source import Source
from mesh_transformer.config import ModelConfig
from mesh_transformer.data import tokenizer, tokenizer_files
from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.worker import Worker

WHY = "compares with transformers; run EXTRAS=test,parity ./test"
torch: Any = pytest.importorskip("torch", reason=WHY)
transformers: Any = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.parity

MODEL = small.parsed(layers=3, n_heads=4, pe_rotary_dims=4, seq=24, d_ff=96).model
FLOAT32 = np.dtype(np.float32)
DTYPES = {"float32": FLOAT32, "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
FORMATS = ("safetensors", "safetensors in shards", "bin", "bin in shards")
TOKENS_BT = small.tokens(2, 24)
TEXTS = (
    "The quick brown fox's 1234567 jumps,\n\n  over_the lazyDog!?\tIt'll be",
    "naïve café Ünïcode Ελληνικά русский 日本語 한국어 👩‍🚀 ﬁ ½ e\u0301\r\n\x00",
    "def f(x):\n    return x  # a<|endoftext|>b <|endoftext|>",
    " ",
    "",
)


def theirs(dtype: str = "float32") -> Any:
    """Return a random GPT-J of transformers."""
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=MODEL.n_vocab,
            n_positions=MODEL.seq,
            n_embd=MODEL.d_model,
            n_layer=MODEL.layers,
            n_head=MODEL.n_heads,
            n_inner=MODEL.d_ff,
            rotary_dim=MODEL.pe_rotary_dims,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(around, 0.2)
    return model.to(getattr(torch, dtype)).eval()


def save(model: Any, folder: pathlib.Path, how: str) -> str:
    """Save as transformers does, or as its releases before 5 did."""
    in_shards = how.endswith("shards")
    model.save_pretrained(folder, max_shard_size="20KB" if in_shards else "1GB")
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 3) is in_shards
    if how.startswith("bin"):
        for path in files:
            path.unlink()
        arrays = model.state_dict()
        for layer in range(MODEL.layers):  # which releases before 4.30 wrote too
            attention = f"transformer.h.{layer}.attn."
            arrays[attention + "bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril()
            arrays[attention + "masked_bias"] = torch.tensor(-1e9)
        if in_shards:
            (folder / "model.safetensors.index.json").unlink()
            names = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(arrays)}
            for file in set(names.values()):
                inside = {name: arrays[name] for name in arrays if names[name] == file}
                torch.save(inside, folder / file)
            index = {"metadata": {}, "weight_map": names}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            torch.save(arrays, folder / "pytorch_model.bin")
    return str(folder)


def logits(source: Source) -> np.ndarray:
    """Return what our model makes of a source's weights: `[B, T, V]`."""
    stacks: dict[str, Any] = {}
    for key in sorted(source.arrays, key=lambda key: key.layer or 0):
        stacks.setdefault(key.path, []).append(source.read(key))
    tree: dict[str, Any] = {}
    for path, arrays in stacks.items():
        module, name = path.rsplit("/", 1)
        tree.setdefault(module, {})[name] = np.stack(arrays) if "/layers/" in path else arrays[0]
    positions_BT = jnp.arange(TOKENS_BT.shape[1])[None]
    return np.asarray(make_model(MODEL).apply(tree, TOKENS_BT, positions_BT)[0])


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT.astype(np.int64))).logits.float().numpy()


def ours(dtype: Any = np.float32) -> MemorySource:
    """Return random weights for which logits are of the size of 1 to 10."""
    source = memory_source.of_model(MODEL)
    for key, array in source.contents.items():
        array *= 0.2
        if key.path.endswith("scale"):
            array += 1
    source.contents = {key: array.astype(dtype) for key, array in source.contents.items()}
    return source


def load(folder: str, **how: Any) -> Any:
    """Load as transformers does, and be sure that it missed and ignored nothing."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **how
    )
    assert isinstance(model, transformers.GPTJForCausalLM)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.thorough
@pytest.mark.parametrize("how", FORMATS)
def test_what_transformers_saves_computes_the_same_here(how: str, tmp_path: pathlib.Path) -> None:
    model = theirs()
    source = HuggingFace(save(model, tmp_path / "hf", how))
    assert ModelConfig(**source.known, compute_dtype="float32") == MODEL
    expected = their_logits(model)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(source), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shard_bytes", [10**9, 20000])
def test_what_is_written_transformers_computes_the_same_with(
    shard_bytes: int, tmp_path: pathlib.Path
) -> None:
    source = ours()
    huggingface.write(str(tmp_path), source, MODEL, dtype=FLOAT32, shard_bytes=shard_bytes)
    expected = their_logits(load(str(tmp_path)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(source), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DTYPES)
def test_the_dtype_that_is_written_is_the_one_that_transformers_loads(
    name: str, tmp_path: pathlib.Path
) -> None:
    source = ours()
    huggingface.write(str(tmp_path), source, MODEL, dtype=DTYPES[name])
    model = load(str(tmp_path), dtype="auto")
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{name}"}
    found = model.get_parameter("lm_head.bias").detach().float().numpy()
    key = next(key for key in source.contents if key.path.endswith("unembed/b"))
    np.testing.assert_array_equal(
        found, cast(source.contents[key], DTYPES[name], "").astype(np.float32)
    )


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", DTYPES)
def test_no_bit_changes_on_the_way_here_and_back(
    name: str, how: str, tmp_path: pathlib.Path
) -> None:
    model = theirs(name)
    with torch.no_grad():
        model.transformer.wte.weight[0] = -0.0
    source = HuggingFace(save(model, tmp_path / "hf", how))
    assert source.about.endswith(name)
    (tmp_path / "again").mkdir()
    huggingface.write(str(tmp_path / "again"), source, MODEL, dtype=DTYPES[name])
    before, after = model.state_dict(), load(str(tmp_path / "again"), dtype="auto").state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        integers = torch.int32 if name == "float32" else torch.int16
        assert torch.equal(value.view(integers), after[key].view(integers)), key


def test_a_pytorch_file_that_is_damaged_or_holds_more_than_weights_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    folder = save(theirs(), tmp_path / "hf", "bin")
    path = tmp_path / "hf" / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="is damaged, or no file of weights alone"):
        HuggingFace(folder)
    for what, message in (
        (pathlib.Path("x"), "is damaged, or no file of weights alone"),
        ({"step": 3}, "holds something else than named tensors"),
    ):
        torch.save(what, path)
        with pytest.raises(CheckpointError, match=message):
            HuggingFace(folder)
    arrays = {name: value.double() for name, value in theirs().state_dict().items()}
    torch.save(arrays, path)
    with pytest.raises(CheckpointError, match=r"is torch.float64, .* save it as torch.float32"):
        HuggingFace(folder)


@pytest.mark.parametrize(
    ("name", "n_vocab"), [("gpt2", 50257), ("gpt2", 50400), ("bytes", 257), ("file", 400)]
)
def test_the_tokenizer_of_transformers_gives_our_ids(
    name: str, n_vocab: int, tmp_path: pathlib.Path
) -> None:
    tokens = tokenizer.load(a_tokenizer(tmp_path) if name == "file" else name)
    folder = str(tmp_path / "hf")
    tokenizer_files.write(folder, tokens, n_vocab)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert peer.eos_token_id == tokens.eot_id
    assert len(peer) == (n_vocab if name == "gpt2" else tokens.n_tokens)
    for text in TEXTS:
        ids = tokens.encode(text)
        assert peer(text, split_special_tokens=True).input_ids == ids
        assert peer.decode(ids) == tokens.decode(ids) == text
        between = [tokens.encode(part) for part in text.split(tokens.eot_text)]
        special = [i for part in between for i in (*part, tokens.eot_id)][:-1]
        assert peer(text).input_ids == special
    if n_vocab == 50400:
        assert peer.convert_tokens_to_ids("<|extratoken_143|>") == 50399
    again = tokenizer.load(folder)
    assert [again.encode(text) for text in TEXTS] == [tokens.encode(text) for text in TEXTS]
    assert again.eot_id == tokens.eot_id


def a_tokenizer(folder: pathlib.Path) -> str:
    """Train a byte-level tokenizer and save it as a lone tokenizer.json."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS[:2], vocab_size=300, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "mine.json"))
    return str(folder / "mine.json")


def test_transformers_generates_from_what_is_written(tmp_path: pathlib.Path) -> None:
    model = small.parsed(n_vocab=264).model
    source = memory_source.of_model(model)
    tokens = tokenizer.load("bytes")
    ids = tokenizer_files.special_ids(tokens, model.n_vocab)
    huggingface.write(str(tmp_path), source, model, dtype=FLOAT32, ids=ids)
    tokenizer_files.write(str(tmp_path), tokens, model.n_vocab)
    peer = load(str(tmp_path))
    drawn = peer.generation_config
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.75, 0.9, 0)
    assert drawn.bos_token_id == drawn.eos_token_id == 256
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(drawn, name) == getattr(peer.config, name)
    asked = transformers.AutoTokenizer.from_pretrained(tmp_path)("abc", return_tensors="pt")
    assert peer.generate(**asked, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


@pytest.mark.thorough
def test_a_model_that_is_trained_here_computes_the_same_there(tmp_path: pathlib.Path) -> None:
    keys = {"train_set": "absent", "val_batches": 0, "model_dir": str(tmp_path / "run")}
    run = config.parse(runs.KEYS | keys)
    with Checkpoints(str(tmp_path / "run")) as checkpoints:
        worker = Worker(run, jax.devices()[:1], checkpoints)
        rng = np.random.default_rng(0)
        for _ in range(20):
            worker.train(rng.integers(97, 123, (1, 2, runs.SEQ + 1)))
        worker.save(20, {"epoch": 0, "sample": 40})
    opened = resharding.open_checkpoint(str(tmp_path / "run"), None)
    what = Conversion(format="hf", dtype="float32")
    resharding.write(opened.source, opened.config, str(tmp_path / "hf"), what)
    tokens_BT = rng.integers(97, 123, (2, runs.SEQ))
    positions_BT = jnp.arange(runs.SEQ)[None]
    logits_BTV = make_model(run.model).apply(worker.state.params, tokens_BT, positions_BT)[0]
    with torch.no_grad():
        theirs_BTV = load(str(tmp_path / "hf"))(torch.tensor(tokens_BT)).logits.numpy()
    assert worker.evaluate(tokens_BT).loss_BT.mean() < 4.5  # it has learned: fresh ones have 5.6
    np.testing.assert_allclose(np.asarray(logits_BTV), theirs_BTV, rtol=0, atol=1e-4)
