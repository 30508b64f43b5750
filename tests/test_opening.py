"""What a path means: formats by their files, tokenizers beside them, and what is verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf_names
import jax
import memory_source
import named_arrays
import numpy as np
import original_steps
import packed_files
import pytest
import runs
import test_jaxseq
import test_zero_transformer

import device_sample
import resharding_example
from mesh_transformer import config
from mesh_transformer.checkpoints import conversion, opening
from mesh_transformer.checkpoints.conversion import Conversion
from mesh_transformer.checkpoints.layout import CheckpointError, by_path
from mesh_transformer.checkpoints.source import PARAMS, Key
from mesh_transformer.data import DataError, tokenizer, tokenizer_files
from mesh_transformer.pod.worker import Worker

pytestmark = pytest.mark.usefixtures("compiled_once")

TABLE = "decoder/embed/embeddings"


def a_jaxseq(folder: Path) -> str:
    return test_jaxseq.write(folder, test_jaxseq.LLAMA, test_jaxseq.llama_weights())


def a_zero_transformer(folder: Path) -> str:
    held = {f"params/{name}": it for name, it in test_zero_transformer.weights(alibi=True).items()}
    test_zero_transformer.write(folder / "params_7", held)
    return str(folder)


def a_gguf(folder: Path) -> str:
    pytest.importorskip("gguf", reason="needs the package gguf; EXTRAS=test,gguf ./test")
    folder.mkdir()
    _, held = named_arrays.of_config(gguf_names.CONFIGS["llama"])
    tensors = {name: ("F32", it) for name, it in gguf_names.converted("llama", held).items()}
    data = packed_files.gguf(gguf_names.metadata("llama"), tensors)
    (folder / "model.gguf").write_bytes(data)
    return str(folder)


MAKERS = {"jaxseq": a_jaxseq, "zero-transformer": a_zero_transformer, "gguf": a_gguf}


def run_of(name: str, folder: str, tmp_path: Path, **keys: Any) -> Path:
    """Write the configuration of a run that is tuned from a checkpoint."""
    if name == "zero-transformer":
        model = test_zero_transformer.KEYS
    else:
        known = dict(opening.open_source(opening.find(folder), None).known)
        model = {key: value for key, value in known.items() if key != "pe_scaling_factors"}
    path = tmp_path / "run.json"
    others = {"train_set": "absent", "val_batches": 0, "model_dir": str(tmp_path / "run")}
    own = {"compute_dtype": "float32", "tokenizer": "bytes", **others, **keys}
    kept = {
        key: it for key, it in runs.KEYS.items() if key not in vars(test_zero_transformer.MODEL)
    }
    path.write_text(json.dumps({**kept, **model, **own}))
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_is_tuned_from_what_another_program_wrote(name: str, tmp_path: Path) -> None:
    folder = MAKERS[name](tmp_path / "theirs")
    assert opening.find(folder).format == name
    run = config.load(run_of(name, folder, tmp_path))
    source = opening.open_source(opening.find(folder), run.model)
    worker = Worker(run, jax.devices()[:1])
    worker.tune_from(folder, fresh_opt=False)
    params = by_path(worker.state.params)
    np.testing.assert_array_equal(np.asarray(params[TABLE]), source.read(Key(PARAMS, TABLE)))
    path = "decoder/layers/block/attention/k/w"
    for layer in range(run.model.layers):
        expected = source.read(Key(PARAMS, path, layer))
        np.testing.assert_array_equal(np.asarray(params[path][layer]), expected)


@pytest.mark.parametrize(
    "name",
    ["checkpoint_10", "params_10", "a.msgpack", "a.pth", "1.mdl", "a.gguf", "params.msgpack"],
)
def test_a_folder_is_not_taken_for_a_file_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(
            CheckpointError, match=f"{path} holds no complete checkpoint; needed is"
        ):
            opening.find(str(path))


@pytest.mark.parametrize(
    ("file", "folder"), [("params_7", "params_10"), ("checkpoint_7.mdl", "checkpoint_10.mdl")]
)
def test_the_newest_file_is_taken_and_no_folder(file: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    (tmp_path / folder).mkdir()
    assert opening.find(str(tmp_path)).folder == str(tmp_path / file)


@pytest.mark.parametrize("name", MAKERS)
def test_the_commands_convert_verify_and_sample_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MAKERS[name](tmp_path / "theirs")
    flags = ["--config", str(run_of(name, folder, tmp_path))]
    target = str(tmp_path / "native")
    convert = ["--input", folder, "--output", target, "--format", "native", "--verify"]
    ended = runs.called(capsys, resharding_example.main, *convert, *flags)
    assert ended.status == 0, ended.told
    assert "Verifying: done in" in ended.told and f"written: {target}" in ended.told
    run = config.load(flags[1])
    source = opening.open_source(opening.find(folder), run.model)
    again = opening.open_source(opening.find(target), run.model)
    assert again.arrays.keys() == source.arrays.keys()
    for key in source.arrays:
        np.testing.assert_array_equal(again.read(key), source.read(key))
    sample = ["--model", folder, "--prompt", "\x1e\x1f", "--max-new-tokens", "4", *flags]
    ended = runs.called(capsys, device_sample.main, *sample)
    assert ended.status == 0 and ended.output.startswith("\x1e\x1f"), ended.told


def test_a_folder_without_a_tokenizer_is_not_taken_for_gpt2_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"n_vocab": 50257, "d_model": 16, "n_heads": 2, "pe_rotary_dims": 4, "model_dir": "x"}
    made = config.parse({**runs.KEYS, "train_set": "absent", "val_batches": 0, **keys})
    folder = str(tmp_path / "hf")
    source = memory_source.of_model(made.model)
    conversion.convert(source, made, folder, Conversion(format="hf"), position={})
    run = opening.stored_config(folder)
    assert run.data.tokenizer == folder and run.model.n_tokens == 50257
    told = f"{folder} holds no tokenizer.json, so that nothing says which tokenizer is meant: copy"
    with pytest.raises(DataError) as error:
        tokenizer.load(folder)
    assert str(error.value) == (
        f"{told} that of its model there, or name it as tokenizer in the configuration (--config)"
    )
    ended = runs.called(capsys, device_sample.main, "--model", folder, "--prompt", "a")
    assert ended.status == 1 and told in ended.told
    target = tmp_path / "again"
    convert = ("--input", folder, "--output", str(target), "--format", "hf")
    ended = runs.called(capsys, resharding_example.main, *convert)
    assert ended.status == 0 and "no tokenizer.json, so that none is written either" in ended.told
    assert not (target / "tokenizer.json").exists() and (target / "config.json").exists()
    tokenizer_files.write(folder, tokenizer.load("gpt2"), 50257)
    assert opening.stored_config(folder).data.tokenizer == folder
    assert tokenizer.load(folder).eot_id == 50256


def test_verifying_reads_what_the_original_keeps_and_nobody_uses(tmp_path: Path) -> None:
    step = original_steps.find("E_layernorm-nobias", "full")
    folder = tmp_path / "step_20"
    shutil.copytree(step.folder, folder)
    found = opening.find(str(folder))
    source = opening.open_source(found, step.config.model)
    n_read = 0

    def advance(n_bytes: int) -> None:
        nonlocal n_read
        n_read += n_bytes

    opening.verify(found, source, advance)
    assert n_read == sum(array.n_bytes for array in source.arrays.values())
    unused = [leaf for leaf in step.leaves if leaf["name"].endswith("/offset")]
    for leaf in (unused[0], unused[-1]):
        path = folder / "shard_1" / leaf["file"]
        whole = path.read_bytes()
        begin = whole.index(f"{leaf['key']}.npy".encode())
        at = whole.index(b"\n", begin) + 5  # in its numbers, after NumPy's header
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"is damaged: its checksum is another"):
            opening.verify(found, source, advance)
        path.write_bytes(whole)
