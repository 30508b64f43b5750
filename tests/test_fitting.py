"""Checkpoints that nearly fit: tables of positions that are cut, vocabularies that are padded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import memory_source
import named_arrays
import numpy as np
import pytest
import small
import source_logits
from memory_source import MemorySource

from mesh_transformer.checkpoints import huggingface, opening
from mesh_transformer.checkpoints.conversion import Conversion, convert
from mesh_transformer.checkpoints.fitting import WithPositions, check_function, fitted
from mesh_transformer.checkpoints.layout import CheckpointError, by_path
from mesh_transformer.checkpoints.source import MU, PARAMS, Key
from mesh_transformer.config import Config, ModelConfig
from mesh_transformer.pod.worker import Worker

TABLE = Key(PARAMS, "decoder/positions/embeddings")
LONG, SHORT = 16, 10


def a_run(seq: int, **keys: Any) -> Config:
    return small.parsed(**{**small.VARIANTS["gpt2"], "seq": seq, **keys})


@pytest.mark.thorough
@pytest.mark.parametrize("pe_offset", [0, 2])
def test_the_first_positions_are_taken_of_a_table_that_is_longer(
    pe_offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = memory_source.of_model(a_run(LONG, pe_offset=pe_offset).model, moments=True)
    model = a_run(SHORT, pe_offset=pe_offset).model
    with caplog.at_level(logging.INFO):
        found = fitted(source, model)
    assert isinstance(found, WithPositions)
    assert caplog.messages == ["memory has learned 16 positions; the first 10 are taken (seq)"]
    for key in (TABLE, TABLE._replace(kind=MU)):
        assert found.arrays[key].shape == (SHORT + pe_offset, 32)
        np.testing.assert_array_equal(found.read(key), source.contents[key][: SHORT + pe_offset])
    tokens_BT = small.tokens(2, SHORT)
    np.testing.assert_allclose(
        source_logits.logits(source, model, tokens_BT),
        source_logits.logits(source, a_run(LONG, pe_offset=pe_offset).model, tokens_BT),
        rtol=0,
        atol=2e-5,  # other matrix shapes add float32 numbers up in another order
    )
    assert fitted(source, a_run(LONG, pe_offset=pe_offset).model) is source


def test_a_table_that_begins_elsewhere_is_moved_or_refused() -> None:
    """OPT's first two rows are no positions; where there is no room for them they are left out."""
    source = memory_source.of_model(a_run(LONG, pe_offset=2).model)
    source.known = {"pe_offset": 2}
    for seq in (LONG, SHORT):
        found = fitted(source, a_run(seq).model)
        np.testing.assert_array_equal(found.read(TABLE), source.contents[TABLE][2 : 2 + seq])
        assert fitted(found, a_run(seq).model) is found
    source = memory_source.of_model(a_run(LONG).model)
    source.known = {"pe_offset": 0}
    with pytest.raises(CheckpointError, match="row 0 of their table, pe_offset is 2: set pe_offse"):
        fitted(source, a_run(SHORT, pe_offset=2).model)


def test_positions_that_were_not_learned_are_not_made_up() -> None:
    source = memory_source.of_model(a_run(SHORT).model)
    with pytest.raises(CheckpointError) as error:
        fitted(source, a_run(LONG).model)
    told = "memory has learned 10 positions, seq is 16: set seq to 10 or less"
    assert str(error.value) == told


@pytest.mark.thorough
@pytest.mark.parametrize("format", ["native", "hf"])
def test_a_model_is_tuned_at_a_shorter_length(format: str, tmp_path: Path) -> None:
    run, old = a_run(SHORT, model_dir=str(tmp_path / "new")), a_run(LONG)
    source = memory_source.of_model(old.model, moments=True)
    folder = str(tmp_path / "old")
    what = Conversion(format=format)  # type: ignore[arg-type]
    convert(source, old, folder, what, position={"epoch": 0, "sample": 0})
    worker = Worker(run, jax.devices()[:1])
    worker.tune_from(folder, fresh_opt=False)
    table = np.asarray(by_path(worker.state.params)[TABLE.path])
    np.testing.assert_array_equal(table, source.contents[TABLE][:SHORT])
    moments = [leaf for path, leaf in by_path(worker.state.opt_state).items()
               if path.endswith("mu/" + TABLE.path)]  # fmt: skip
    kept = source.contents[TABLE._replace(kind=MU)][:SHORT] if format == "native" else 0 * table
    np.testing.assert_array_equal(np.asarray(moments[0]), kept)
    with pytest.raises(CheckpointError, match="learned 16 positions, seq is 24: set seq to 16 or"):
        Worker(a_run(24), jax.devices()[:1]).load_weights(folder)


def written(tmp_path: Path, source: MemorySource, config: Config, n_vocab: int | None) -> str:
    what = Conversion(format="hf", n_vocab=n_vocab)
    folder = str(tmp_path / f"hf_{n_vocab}")
    convert(source, config, folder, what, position={})
    return folder


@pytest.mark.thorough
def test_padding_without_a_bias_is_not_exported_unless_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_run(LONG, n_tokens=60)
    source = memory_source.of_model(config.model)
    with pytest.raises(CheckpointError) as error:
        written(tmp_path, source, config, None)
    assert str(error.value) == (
        "rows 60 to 63 of the vocabulary are padding (n_tokens), which transformers cannot know: "
        "they have logit 0 there and so a probability; cut them off with --n-vocab 60, or keep "
        "them with --n-vocab 64"
    )
    assert not list(tmp_path.iterdir())
    cut = opening.open_source(opening.find(written(tmp_path, source, config, 60)), None)
    assert cut.arrays[Key(PARAMS, "decoder/embed/embeddings")].shape == (60, 32)
    assert not caplog.messages
    tokens_BT = small.tokens(2, LONG) % 60
    expected = source_logits.logits(source, config.model, tokens_BT)
    found = source_logits.logits(cut, ModelConfig(**cut.known), tokens_BT)
    assert expected[..., 60:].max() < -1000
    np.testing.assert_allclose(found, expected[..., :60], rtol=0, atol=2e-5)
    kept = opening.open_source(opening.find(written(tmp_path, source, config, 64)), None)
    assert kept.arrays[Key(PARAMS, "decoder/embed/embeddings")].shape == (64, 32)
    assert "rows 60 to 63 of the vocabulary are padding" in caplog.text


def test_a_head_with_a_bias_is_exported_with_its_padding(tmp_path: Path) -> None:
    config = small.parsed(n_tokens=60, head_bias=True)
    folder = written(tmp_path, memory_source.of_model(config.model), config, None)
    assert huggingface.is_huggingface(folder)


def test_logits_of_a_renamed_model_are_of_the_size_that_tests_count_on() -> None:
    config = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 32}
    source, held = named_arrays.of_config({**config, "n_layer": 2, "n_head": 4})
    assert len(held) == 28
    found = source_logits.logits(source, ModelConfig(**source.known), small.tokens(1, 16))
    assert 1 < np.abs(found).max() < 30


def test_windows_that_reach_back_to_the_first_token_are_none() -> None:
    of_32 = small.parsed(window=0, seq=32).model
    check_function({"window": 64, "window_every": 2}, of_32, "step_1")
    for windows in ({"window": 16}, {"window": 31, "window_every": 2}):
        with pytest.raises(CheckpointError, match=f"window is {windows['window']} there, 0 in the"):
            check_function(windows, of_32, "step_1")
