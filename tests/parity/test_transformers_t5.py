"""T5, both forms, as `transformers` computes it: logits, losses, greedy answers, and back again."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer.checkpoints import huggingface, opening
from mesh_transformer.checkpoints.huggingface import HuggingFace
from mesh_transformer.config import Config, ModelConfig, parse
from mesh_transformer.model.decoder import make_model
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling

WHY = "compares with transformers; run EXTRAS=test,parity ./test"
torch: Any = pytest.importorskip("torch", reason=WHY)
transformers: Any = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.parity

N_VOCAB, S, T, N_NEW = 64, 150, 40, 8
FLOAT32 = np.dtype(np.float32)
NAMES = {"v1.0": ("relu", True), "v1.1": ("gated-gelu", False)}
PROMPTS = [np.random.default_rng(n).integers(1, N_VOCAB, n).tolist() for n in (7, S, 1)]


@functools.cache
def peer(name: str, encoder_layers: int = 3) -> Any:
    """Return a random model; with as many layers in both stacks `generate` works, too."""
    feed_forward, tied = NAMES[name]
    config = transformers.T5Config(
        **{"vocab_size": N_VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_heads": 8},
        **{"num_layers": encoder_layers, "num_decoder_layers": 3, "decoder_start_token_id": 0},
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # releases from 5 on make them one array at first, whatever the configuration says
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
        model.shared.weight.mul_(2 if tied else 1)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def saved(name: str, encoder_layers: int = 3) -> str:
        folder = str(tmp_path_factory.mktemp("peer") / "hf")
        peer(name, encoder_layers).save_pretrained(folder)
        return folder

    return saved


def config_of(folder: str, cores: int = 1) -> Config:
    flat = opening.stored_config(folder).to_flat()
    return parse(flat | {"compute_dtype": "float32", "cores_per_replica": cores, "zero_stage": 0})


def records() -> np.ndarray:
    """Return two records, one with padding in both parts."""
    tokens_BT1 = np.random.default_rng(1).integers(1, N_VOCAB, (2, S + 1 + T), dtype=np.int32)
    tokens_BT1[:, S] = 0
    tokens_BT1[1, 90:S] = 0
    tokens_BT1[1, S + 11 :] = 0
    return tokens_BT1


def their_logits(model: Any, sources_BS: np.ndarray, inputs_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor(sources_BS.astype(np.int64)),
            attention_mask=torch.tensor(sources_BS != 0),
            decoder_input_ids=torch.tensor(inputs_BT.astype(np.int64)),
        )
    logits_BTV: np.ndarray = found.logits.numpy()
    return logits_BTV


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_losses_are_those_of_transformers(name: str, folders: Any) -> None:
    folder, tokens_BT1 = folders(name, 2), records()
    flat = config_of(folder).to_flat() | {"encoder_seq": S, "seq": T}
    workers = [
        Worker(parse(flat | {"cores_per_replica": mp}), jax.devices()[: dp * mp])
        for dp, mp in ((1, 1), (2, 4))
    ]
    for worker in workers:
        worker.load_weights(folder)
    sources_BS, inputs_BT, targets_BT = np.split(tokens_BT1[:, :-1], [S], axis=1) + [
        tokens_BT1[:, S + 1 :]
    ]
    theirs_BTV = their_logits(peer(name, 2), sources_BS, inputs_BT)
    assert np.abs(theirs_BTV).max() > 0.5
    apply = jax.jit(make_model(workers[0].config.model).apply, compiler_options=small.COMPILED_FAST)
    positions_BT = jnp.arange(T)[None]
    ours_BTV, _ = apply(workers[0].state.params, inputs_BT, positions_BT, sources_BS=sources_BS)
    np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=1e-4)
    losses_BT = torch.nn.functional.cross_entropy(
        torch.tensor(theirs_BTV).flatten(0, 1),
        torch.tensor(targets_BT.astype(np.int64)).flatten(),
        reduction="none",
        ignore_index=0,
    ).reshape(2, T)
    right_BT = (theirs_BTV.argmax(-1) == targets_BT) & (targets_BT != 0)
    for worker in workers:
        seen = worker.evaluate(tokens_BT1)
        np.testing.assert_allclose(seen.loss_BT, losses_BT, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(seen.correct_BT, right_BT)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_transformers(
    name: str, mesh: tuple[int, int], folders: Any
) -> None:
    dp, mp = mesh
    worker = Worker(config_of(folders(name), mp), jax.devices()[: dp * mp])
    worker.load_weights(folders(name))
    tokens, _ = worker.generate(PROMPTS, Sampling(temperature=0), N_NEW)
    for prompt, found in zip(PROMPTS, tokens, strict=True):
        asked = torch.tensor([prompt])
        lengths = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
        mask = torch.ones_like(asked)
        whole = peer(name).generate(
            asked, attention_mask=mask, do_sample=False, eos_token_id=None, **lengths
        )
        assert found == whole[0, 1:].tolist()
    assert len({tuple(answer) for answer in tokens}) > 1, "the prompts do not matter"


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_no_bit_changes_on_the_way_here_and_back(
    name: str, folders: Any, tmp_path: pathlib.Path
) -> None:
    source, before = HuggingFace(folders(name, 2)), peer(name, 2)
    huggingface.write(str(tmp_path), source, ModelConfig(**source.known), dtype=FLOAT32)
    after, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        str(tmp_path), output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(after) is type(before)
    theirs, again = before.state_dict(), after.state_dict()
    assert theirs.keys() == again.keys()
    for key, value in theirs.items():
        assert value.numpy().tobytes() == again[key].numpy().tobytes(), key
    assert HuggingFace(str(tmp_path)).known == source.known
    sources_BS, inputs_BT = records()[:, :S], records()[:, S:-1]
    found, expected = (their_logits(it.eval(), sources_BS, inputs_BT) for it in (after, before))
    np.testing.assert_array_equal(found, expected)
