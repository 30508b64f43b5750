"""The decoder computes what mesh-transformer-jax computed: losses, gradients, continuations.

The numbers are the original program's own, in float32; `original.py` says where they come from.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import original
import original_steps
import pytest
import small

from mesh_transformer.config import Config
from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.loss import TokenLoss, next_token_loss
from mesh_transformer.pod.worker import Worker
from mesh_transformer.session import Sampling
from mesh_transformer.training.steps import TrainState

ROTARY = ("A", "B_small")
NORMS = ("E_rmsnorm", "E_rmsnorm_mp4", "E_scalenorm", "E_layernorm-nobias")
RUNS = (*ROTARY, "C_t5", "D_fixed", *NORMS)
CONTINUED = [  # not D_fixed: the original cannot continue a prompt with learned positions
    pytest.param(name, marks=[] if name in ("B_small", "C_t5") else pytest.mark.slow)
    for name in ("A", "B_small", "C_t5", "E_rmsnorm", "E_scalenorm", "E_layernorm-nobias")
]


def original_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return the original's training loss: its log Z is taken less the largest logit."""
    max_BT = jax.lax.stop_gradient(logits_BTV.max(-1))
    shifted_BTV = logits_BTV - max_BT[..., None]
    log_z_BT = jnp.log(jnp.exp(shifted_BTV).sum(-1))
    target_BT = jnp.take_along_axis(shifted_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return (log_z_BT - target_BT).mean() + 1e-4 * jnp.square(log_z_BT).mean()


@functools.cache
def computed(name: str) -> tuple[TokenLoss, Any]:
    """Our loss of the run's evaluation tokens, and our gradient of its training step.

    One program does both: the first sequences are the training step's, the others are evaluated.
    """
    run = original.load(name)
    model = make_model(run.config.model)
    train_ABT1, eval_BT1 = run.arrays["next_tokens"], run.arrays["eval_tokens"]
    n_steps, n_train = len(train_ABT1), train_ABT1.size // train_ABT1.shape[-1]
    tokens_BT1 = jnp.concatenate([train_ABT1.reshape(n_train, -1), eval_BT1]).astype(jnp.int32)

    def objective(params: Any) -> tuple[jax.Array, TokenLoss]:
        inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
        positions_BT = jnp.arange(inputs_BT.shape[1])[None]
        logits_BTV, _ = model.apply(params, inputs_BT, positions_BT)
        seen = next_token_loss(logits_BTV[n_train:], targets_BT[n_train:])
        return n_steps * original_loss(logits_BTV[:n_train], targets_BT[:n_train]), seen

    both = jax.jit(jax.grad(objective, has_aux=True), compiler_options=small.COMPILED_FAST)
    gradient, seen = both(run.params())
    return jax.device_get((seen, gradient))


@pytest.mark.parametrize("name", RUNS)
def test_every_token_has_the_loss_that_the_original_gave_it(name: str) -> None:
    seen, _ = computed(name)
    np.testing.assert_allclose(
        seen.loss_BT, original.load(name).arrays["all_loss"], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_same_tokens_are_predicted_correctly(name: str) -> None:
    seen, _ = computed(name)
    np.testing.assert_array_equal(seen.correct_BT, original.load(name).arrays["correct"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["A", "B_small", "C_t5", "D_fixed"])
def test_a_slim_checkpoint_gives_every_token_the_loss_that_the_original_gave_it(name: str) -> None:
    """The original's record of rounded weights; its activations are float32, as ours are here."""
    step = original_steps.find(name, "slim")
    if not (original.FOLDERS / name).exists():
        pytest.skip("ORIGINAL_FIXTURES names no folder with the original's record")
    with np.load(original.FOLDERS / name / "record.npz") as record:
        tokens_BT1, theirs_BT = record["eval_tokens"], record["eval_bf16_all_loss"]
    worker = Worker(one_device(step.config), jax.devices()[:1])
    worker.load_weights(str(step.folder))
    ours = worker.evaluate(tokens_BT1.astype(np.int32))
    np.testing.assert_allclose(ours.loss_BT, theirs_BT, rtol=0, atol=1e-5)
    full_BT = original.load(name).arrays["all_loss"] if name != "A" else 0  # A's is rounded too
    assert np.abs(theirs_BT - full_BT).max() > 1e-3, "rounding is seen"


def one_device(run: Config) -> Config:
    return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, cores_per_replica=1))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "A"])  # A's is in bfloat16
def test_the_gradient_is_the_original_s(name: str) -> None:
    _, ours = computed(name)
    small.assert_close(ours, original.load(name).gradient(), 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CONTINUED)
def test_greedy_continuations_are_the_original_s(name: str) -> None:
    run = original.load(name)
    worker = Worker(one_device(run.config), jax.devices()[:1])
    worker.state = TrainState(jnp.int32(0), jax.device_put(run.params(), jax.devices()[0]), ())
    for row in (0, 2, 3):  # row 1 begins at the end of the window, which the original then slides
        expected = run.arrays["generated"][row]
        n_prompt, seq = int(run.arrays["prompt_lengths"][row]), run.config.model.seq
        prompt = run.arrays["prompts"][row, seq - n_prompt :].tolist()
        n_new = min(len(expected), seq - n_prompt)
        close = np.flatnonzero(run.arrays["margins"][row, :n_new] <= 1e-3)
        n_new = int(close[0]) if len(close) else n_new
        assert n_new > 0, "a prompt without a token to compare proves nothing"
        generation = worker.generate([prompt], Sampling(temperature=0), n_new)
        assert generation.tokens == [expected[:n_new].tolist()]
