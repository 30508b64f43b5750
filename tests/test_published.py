"""The files of published models: each is what the model's own config.json says, of its size."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import pytest
from configurations import CONFIGS
from published import N_PARAMETERS, published

import mesh_transformer
from mesh_transformer import config as configuration
from mesh_transformer.checkpoints.families import FAMILIES, config_keys
from mesh_transformer.pod.worker import Worker

FILES = [path for path in CONFIGS if "residual" in json.loads(path.read_text())]
STATED = re.compile(
    r"([\d,]+) parameters(?:, and (\d+) padding rows of (\d+))?: (?:fine-tunes )?(\S+) on a "
    r"v3-(\d+)(?: by .*)?; ([\d,]+) ([bm]illion) tokens"
)

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def stated(path: pathlib.Path) -> dict[str, Any]:
    """Return what a file's comment says."""
    found = STATED.fullmatch(json.loads(path.read_text())["comment"])
    assert found, f"{path.name}: the comment is not of the form {STATED.pattern}"
    n_parameters, n_rows, width, name, n_devices, n_tokens, unit = found.groups()
    return {
        "name": name,
        "n_parameters": int(n_parameters.replace(",", "")),
        "padding": (int(n_rows or 0), int(width or 0)),
        "n_devices": int(n_devices),
        "n_tokens": int(n_tokens.replace(",", "")) * {"billion": 1e9, "million": 1e6}[unit],
    }


def test_every_published_model_has_one_file() -> None:
    assert sorted(stated(path)["name"] for path in FILES) == sorted(N_PARAMETERS)
    told = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"a configuration for {len(FILES)} published models" in told.replace("\n", " ")


def test_no_module_but_their_own_knows_one_family_from_another() -> None:
    theirs = {"families.py", "gpt_families.py", "llama_families.py", "t5_family.py"}
    named = re.compile("|".join(family.architecture for family in FAMILIES))
    package = pathlib.Path(mesh_transformer.__file__).parent
    found = {path.name for path in package.rglob("*.py") if named.search(path.read_text())}
    assert found and found <= theirs


def test_the_table_of_the_documents_has_every_family_in_order() -> None:
    text = (CONFIGS[0].parents[1] / "docs" / "howto_convert_checkpoints.md").read_text()
    table = text.partition("| `model_type` | models |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    kinds = [kind for row in rows for kind in re.findall(r"`(\w+)`", row)]
    assert kinds == [family.model_type for family in FAMILIES]


@every_file
def test_a_file_is_the_model_that_its_config_json_describes(path: pathlib.Path) -> None:
    says, model = stated(path), configuration.load(path).model
    theirs = config_keys(published(says["name"]))
    ours = {key: getattr(model, key) for key in theirs}
    n_rows, _ = says["padding"]
    assert ours.pop("n_vocab") == theirs.pop("n_vocab") + n_rows
    if n_rows:  # of which the tokenizer tells the model that they are no tokens
        assert model.n_tokens == model.n_vocab - n_rows
    seq, longest = ours.pop("seq"), theirs.pop("seq")
    assert seq == longest or (seq < longest and model.pe.startswith(("rotary", "t5")))
    assert ours == theirs


@pytest.mark.thorough
@every_file
def test_a_file_has_the_published_number_of_parameters(path: pathlib.Path) -> None:
    """By the shapes of the train state, spread as the file says over no more than 8 devices."""
    says, config = stated(path), configuration.load(path)
    cores = min(config.mesh.cores_per_replica, 8)
    mesh = dataclasses.replace(config.mesh, tpu_size=8, cores_per_replica=cores)
    worker = Worker(dataclasses.replace(config, mesh=mesh), jax.devices())
    n_rows, width = says["padding"]
    assert width in (0, config.model.d_embed) and (not n_rows or config.model.tie_embeddings)
    assert worker.n_parameters - n_rows * width == says["n_parameters"]
    assert says["n_parameters"] == N_PARAMETERS[says["name"]]


@every_file
def test_a_file_trains_on_the_devices_and_tokens_that_it_states(path: pathlib.Path) -> None:
    says, config = stated(path), configuration.load(path)
    assert config.mesh.tpu_size == says["n_devices"]
    n_tokens = config.tokens_per_step(says["n_devices"]) * config.run.total_steps
    unit = 1e9 if says["n_tokens"] >= 1e9 else 1e6
    assert round(n_tokens / unit) * unit == says["n_tokens"]
    assert (config.run.name, config.checkpoint.model_dir) == (path.stem, f"runs/{path.stem}")
