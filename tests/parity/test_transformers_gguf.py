"""GGUF files compute the same here and in transformers, which reads them on its own."""

from __future__ import annotations

import pathlib
from typing import Any

import gguf_names
import named_arrays
import numpy as np
import packed_files
import peers
import pytest
import source_logits

from mesh_transformer.checkpoints import opening
from mesh_transformer.config import ModelConfig

pytest.importorskip("gguf", reason="needs the package gguf; EXTRAS=test,parity,gguf ./test")
pytestmark = pytest.mark.parity

TOKENS_BT = np.random.default_rng(1).integers(0, gguf_names.VOCAB, (2, 16))


def loaded(path: str) -> Any:
    """Load a file by the functions of transformers that `from_pretrained` has for it.

    That itself asks for one more package, which only places what these read.
    """
    reader: Any = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    described = reader.load_gguf_checkpoint(path)["config"]
    # Of GPT-2's files it does not read how many positions there are.
    config = peers.transformers.AutoConfig.for_model(**described, n_positions=gguf_names.SEQ)
    model = peers.transformers.AutoModelForCausalLM.from_config(config)
    tensors = reader.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.float().eval()


def written(folder: pathlib.Path, kind: str, how: str) -> str:
    _, held = named_arrays.of_config(gguf_names.CONFIGS[kind])
    arrays = gguf_names.converted(kind, held)
    tensors = {name: (how if it.ndim == 2 else "F32", it) for name, it in arrays.items()}
    data = packed_files.gguf(gguf_names.metadata(kind), tensors)
    (folder / "model.gguf").write_bytes(data)
    return str(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("kind", ["llama", "llama, tied", "qwen2", "gpt2"])
def test_a_file_computes_what_transformers_makes_of_it(
    kind: str, how: str, tmp_path: pathlib.Path
) -> None:
    folder = written(tmp_path, kind, how)
    model = loaded(f"{folder}/model.gguf")
    source = opening.open_source(opening.find(folder), None)
    expected = peers.logits(model, TOKENS_BT)
    assert np.abs(expected).max() > 1
    found = source_logits.logits(source, ModelConfig(**source.known), TOKENS_BT)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
