"""Models of every family that is read compute the same here, and the same again in transformers."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import small
from peers import PEERS

from mesh_transformer.checkpoints import huggingface, opening
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.config import Config, ModelConfig, parse
from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling

pytestmark = pytest.mark.parity
SLOW = pytest.mark.slow

FLOAT32 = np.dtype(np.float32)
TOKENS_BT = np.random.default_rng(1).integers(0, peers.N_VOCAB, (2, peers.SEQ), dtype=np.int32)
PROMPTS = [TOKENS_BT[0, :7].tolist(), TOKENS_BT[1, :3].tolist(), TOKENS_BT[1, :12].tolist()]
N_NEW = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the folder of a peer as transformers saves it."""

    @functools.cache
    def saved(name: str) -> str:
        folder = str(tmp_path_factory.mktemp("peer") / "hf")
        model_of(name).save_pretrained(folder)
        return folder

    return saved


@functools.cache
def model_of(name: str) -> Any:
    return peers.make(name)


def config_of(folder: str, cores: int) -> Config:
    flat = opening.stored_config(folder).to_flat()
    return parse(flat | {"compute_dtype": "float32", "cores_per_replica": cores, "zero_stage": 0})


@pytest.mark.thorough
@pytest.mark.parametrize("name", PEERS)
def test_logits_are_those_of_transformers(name: str, folders: Any) -> None:
    source = HuggingFace(folders(name))
    config = config_of(folders(name), 1)
    worker = Worker(config, jax.devices()[:1])
    worker.load_weights(folders(name))
    apply = jax.jit(make_model(config.model).apply, compiler_options=small.COMPILED_FAST)
    params = worker.state.params
    ours, _ = apply(params, TOKENS_BT, jnp.arange(peers.SEQ)[None])
    theirs = peers.logits(model_of(name), TOKENS_BT)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=2e-5)
    n_theirs = sum(parameter.numel() for parameter in model_of(name).parameters())
    n_biases = config.model.d_model if config.model.embed_bias else 0
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == n_theirs + n_biases
    assert source.known["seq"] == peers.SEQ


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        name if "," not in name or name == "opt, as 125m" else pytest.param(name, marks=SLOW)
        for name in PEERS
    ],
)
def test_losses_on_a_mesh_are_those_of_transformers(name: str, folders: Any) -> None:
    """Of every token, by the full forward pass."""
    worker = Worker(config_of(folders(name), 4), jax.devices()[:8])
    worker.load_weights(folders(name))
    tokens_BT1 = np.concatenate([TOKENS_BT, TOKENS_BT[:, :1]], axis=1)
    seen = worker.evaluate(tokens_BT1)
    theirs_BTV = peers.logits(model_of(name), TOKENS_BT).astype(np.float64)
    sums_BT = np.log(np.exp(theirs_BTV).sum(-1))
    targets_BT = tokens_BT1[:, 1:]
    at_targets_BT = np.take_along_axis(theirs_BTV, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(seen.loss_BT, sums_BT - at_targets_BT, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(seen.correct_BT, theirs_BTV.argmax(-1) == targets_BT)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_greedy_decoding_is_that_of_transformers(
    name: str, mesh: tuple[int, int], folders: Any
) -> None:
    dp, mp = mesh
    worker = Worker(config_of(folders(name), mp), jax.devices()[: dp * mp])
    worker.load_weights(folders(name))
    tokens, _ = worker.generate(PROMPTS, Sampling(temperature=0), N_NEW)
    for prompt, found in zip(PROMPTS, tokens, strict=True):
        assert found == peers.continued(model_of(name), prompt, N_NEW)


@pytest.mark.thorough
@pytest.mark.parametrize("name", PEERS)
def test_no_bit_changes_on_the_way_here_and_back(
    name: str, folders: Any, tmp_path: pathlib.Path
) -> None:
    source, before = HuggingFace(folders(name)), model_of(name)
    model = ModelConfig(**source.known)
    huggingface.write(str(tmp_path), source, model, dtype=FLOAT32)
    after = peers.load(str(tmp_path))
    # Without a window a Mistral is a LLaMA, which comes first.
    written_as = type(before) if name != "mistral, whole" else peers.transformers.LlamaForCausalLM
    assert type(after) is written_as
    theirs, again = before.state_dict(), after.state_dict()
    assert theirs.keys() == again.keys()
    for key, value in theirs.items():
        assert value.dtype == again[key].dtype
        assert value.numpy().tobytes() == again[key].numpy().tobytes(), key
    assert HuggingFace(str(tmp_path)).known == source.known
    found, expected = (peers.logits(it, TOKENS_BT) for it in (after, before))
    np.testing.assert_array_equal(found, expected)
