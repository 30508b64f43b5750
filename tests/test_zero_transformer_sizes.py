"""The shipped configurations of ZeRO-transformer's models have the sizes that it published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest

from mesh_transformer import config as configuration
from mesh_transformer.model.decoder import make_model

FOLDER = Path(__file__).parent.parent / "configs" / "zero_transformer"
FILES = sorted(FOLDER.glob("*.json"))
THEIRS = {
    # From its conf/model_config.yaml: embedding_dim, num_head, block_size, N, vocab_size.
    "test": (64, 4, 32, 2, 256),
    "417M": (1536, 12, 2048, 12, 50304),
    "760M": (1536, 16, 1024, 24, 50304),
    "1.3B": (2048, 16, 1024, 24, 50304),
}
TOKENS = {"417M": 300e9, "760M": 330e9, "1.3B": 200e9}
"""Trained on, by its README."""


def closed_formula(d: int, n_layers: int, v: int) -> int:
    """Parameters without any bias: embeddings, also the head; blocks of two norms; a last norm."""
    return v * d + n_layers * (4 * d * d + 8 * d * d + 2 * d) + d


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_size_parses_without_a_doubt_and_is_as_published(path: Path) -> None:
    config = configuration.load(path)
    model = config.model
    shape = (model.d_model, model.n_heads, model.seq, model.layers, model.n_vocab)
    assert shape == THEIRS[path.stem]
    params = jax.eval_shape(make_model(model).init, jax.random.key(0))
    assert {name for values in params.values() for name in values} == {"embeddings", "w", "scale"}
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert n_parameters == closed_formula(model.d_model, model.layers, model.n_vocab)
    stated = re.match(r"([\d,]+) parameters: ", config.run.comment)
    assert stated and int(stated[1].replace(",", "")) == n_parameters
    written = json.loads(path.read_text())
    assert {key: config.to_flat()[key] for key in written} == written


def test_the_names_are_the_sizes() -> None:
    sizes = {path.stem: configuration.load(path).run.comment.split()[0] for path in FILES}
    assert sizes.keys() == THEIRS.keys()
    millions = {name: int(size.replace(",", "")) / 1e6 for name, size in sizes.items()}
    assert round(millions["417M"]) == 417
    assert 755 < millions["760M"] < 765
    assert 1300 < millions["1.3B"] < 1350


@pytest.mark.parametrize("name", TOKENS)
def test_a_run_reads_as_many_tokens_as_theirs(name: str) -> None:
    config = configuration.load(FOLDER / f"{name}.json")
    n_tokens = config.tokens_per_step(32) * config.run.total_steps
    assert abs(n_tokens / TOKENS[name] - 1) < 0.01
