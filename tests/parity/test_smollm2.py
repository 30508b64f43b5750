"""The example of a pretrained LLaMA runs from end to end, here with a tiny random one."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import peers
import pytest
import smollm2
from fake_session import Fake
from runs import ROOT

from mesh_transformer.data import tokenizer, tokenizer_files

pytestmark = pytest.mark.parity

N_VOCAB = 264


def a_llama(folder: pathlib.Path) -> str:
    """Save a LLaMA of 6 heads, 3 of keys and values, over bytes, as transformers does."""
    peers.torch.manual_seed(0)
    keys: dict[str, Any] = {
        **{"vocab_size": N_VOCAB, "hidden_size": 48, "intermediate_size": 96},
        **{"num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 2},
        **{"max_position_embeddings": 128, "tie_word_embeddings": True, "initializer_range": 0.3},
        **{"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256},
    }
    config = peers.transformers.LlamaConfig(**keys)
    peers.transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_files.write(str(folder), tokenizer.load("bytes"), N_VOCAB)
    return str(folder)


def test_what_fills_a_batch_up_is_not_in_the_loss() -> None:
    tokens_BT1 = np.full((2, 5), 16)
    masks_BT = [np.ones((2, 4), bool), np.arange(8).reshape(2, 4) < 3]
    assert smollm2.loss_of(Fake(), [(tokens_BT1, mask_BT) for mask_BT in masks_BT]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 3])
def test_a_llama_goes_through_everything_as_in_transformers(
    cores: int, tmp_path: pathlib.Path
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    for number in range(200):
        (library / f"module{number}.py").write_text(f"x = {number}\n" * 20)
    folders = (a_llama(tmp_path / "hf"), str(tmp_path / "out"))
    flags = ("--cores", str(cores), "--steps", "10", "--seq", "64", "--library", str(library))
    done = subprocess.run(
        [sys.executable, "examples/smollm2.py", *folders, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"mesh 1x{cores}, " in done.stdout
    assert "equal greedy continuations: 20 of 20" in done.stdout
    [losses] = re.findall(r"^validation loss: (.+)$", done.stdout, re.MULTILINE)
    numbers = [float(loss) for loss in losses.split()]
    assert len(numbers) == 6 and numbers[-1] < numbers[0] - 0.01
    apart = re.findall(r"difference of logits.*: (\S+)$", done.stdout, re.MULTILINE)
    assert len(apart) == 2 and all(float(number) < 1e-4 for number in apart)
