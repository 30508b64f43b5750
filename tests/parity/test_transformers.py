"""GPT-J as `transformers` and PyTorch compute it: logits, loss, gradients, optimizer steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from mesh_transformer.model.decoder import make_model
from mesh_transformer.model.loss import z_loss
from mesh_transformer.training.gradients import score

WHY = "compares with PyTorch; run EXTRAS=test,parity ./test"
torch: Any = pytest.importorskip("torch", reason=WHY)
transformers: Any = pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.parity

KEYS: dict[str, Any] = {
    "layers": 3,
    "n_heads": 4,
    "pe_rotary_dims": 4,
    "seq": 24,
    "lr": 1e-3,
    "end_lr": 1e-4,
    "anneal_steps": 4,
}
N_STEPS, A, B = 3, 2, 2
BATCHES = small.tokens(N_STEPS, A, B, KEYS["seq"] + 1)
LAYER = "transformer.h.{}."
PLACES = {
    # Our parameter, theirs, and whether it is a matrix, which PyTorch stores transposed.
    "embed/embeddings": ("transformer.wte.weight", False),
    "layers/block/norm/scale": (LAYER + "ln_1.weight", False),
    "layers/block/norm/offset": (LAYER + "ln_1.bias", False),
    "layers/block/attention/q/w": (LAYER + "attn.q_proj.weight", True),
    "layers/block/attention/k/w": (LAYER + "attn.k_proj.weight", True),
    "layers/block/attention/v/w": (LAYER + "attn.v_proj.weight", True),
    "layers/block/attention/o/w": (LAYER + "attn.out_proj.weight", True),
    "layers/block/ff/in/w": (LAYER + "mlp.fc_in.weight", True),
    "layers/block/ff/in/b": (LAYER + "mlp.fc_in.bias", False),
    "layers/block/ff/out/w": (LAYER + "mlp.fc_out.weight", True),
    "layers/block/ff/out/b": (LAYER + "mlp.fc_out.bias", False),
    "final_norm/scale": ("transformer.ln_f.weight", False),
    "final_norm/offset": ("transformer.ln_f.bias", False),
    "unembed/w": ("lm_head.weight", True),
    "unembed/b": ("lm_head.bias", False),
}


class Peer:
    """GPT-J in PyTorch, float32, random, with the bias that mesh-transformer-jax embeds with.

    Attributes:
        model: The model of `transformers`.
        embedding_bias: What it lacks; zero in every published GPT-J.
    """

    def __init__(self) -> None:
        config = small.parsed(**KEYS).model
        torch.manual_seed(0)
        self.model = transformers.GPTJForCausalLM(
            transformers.GPTJConfig(
                vocab_size=config.n_vocab,
                n_positions=config.seq,
                n_embd=config.d_model,
                n_layer=config.layers,
                n_head=config.n_heads,
                rotary_dim=config.pe_rotary_dims,
                attn_implementation="eager",
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ).float()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                around = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                parameter.normal_(around, 0.2)
        self.embedding_bias = torch.nn.Parameter(torch.randn(config.d_model) * 0.2)

    def logits(self, tokens_BT: np.ndarray) -> Any:
        """Return `[B, T, V]`."""
        embedded = self.model.transformer.wte(torch.tensor(tokens_BT.astype(np.int64)))
        return self.model(inputs_embeds=embedded + self.embedding_bias).logits

    def objective(self, tokens_BT1: np.ndarray, z_weight: float) -> tuple[Any, Any]:
        """Return the mean cross-entropy, with the weighed z-loss and without."""
        logits = self.logits(tokens_BT1[:, :-1])
        targets = torch.tensor(tokens_BT1[:, 1:].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss + z_weight * torch.logsumexp(logits, -1).square().mean(), loss

    def tree(self, attribute: str = "data") -> Any:
        """Return the weights, or their "grad", as our parameter tree."""
        theirs = {
            name: getattr(parameter, attribute).numpy().copy()
            for name, parameter in self.model.named_parameters()
        }
        layers = range(self.model.config.n_layer)
        tree = {"decoder/embed": {"b": getattr(self.embedding_bias, attribute).numpy().copy()}}
        for place, (name, transposed) in PLACES.items():
            stack = [theirs[name.format(i)] for i in layers] if "{}" in name else theirs[name]
            value = np.swapaxes(stack, -1, -2) if transposed else np.asarray(stack)
            module, leaf = f"decoder/{place}".rsplit("/", 1)
            tree.setdefault(module, {})[leaf] = value
        return tree


def test_logits_are_those_of_transformers() -> None:
    peer, tokens_BT = Peer(), BATCHES[0, 0, :, :-1]
    model = make_model(small.parsed(**KEYS).model)
    logits_BTV, _ = model.apply(peer.tree(), tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
    with torch.no_grad():
        theirs = peer.logits(tokens_BT).numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits_BTV, theirs, rtol=0, atol=1e-4)


@pytest.mark.thorough
def test_loss_and_gradients_are_those_of_pytorch() -> None:
    peer, tokens_BT1 = Peer(), jnp.asarray(BATCHES[0, 0])
    model = make_model(small.parsed(**KEYS).model)

    def objective(params: Any) -> jax.Array:
        seen = score(model, params, tokens_BT1)
        return (seen.loss_BT + 1e-4 * z_loss(seen.log_z_BT)).mean()

    value, gradient = jax.jit(jax.value_and_grad(objective))(peer.tree())
    theirs, _ = peer.objective(BATCHES[0, 0], z_weight=1e-4)
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    small.assert_close(gradient, peer.tree("grad"), 1e-5)


@pytest.mark.thorough
def test_optimizer_steps_are_those_of_pytorch_s_adamw() -> None:
    peer = Peer()
    config = small.parsed(**KEYS)
    parameters = [peer.embedding_bias, *peer.model.parameters()]
    matrices = [p for p in parameters if p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    falling = config.optimizer.lr - config.optimizer.end_lr
    train, state = small.steps(**KEYS).train, small.start(**KEYS)
    state = state._replace(params=jax.device_put(peer.tree(), state.step.sharding))
    for count, batch in enumerate(BATCHES):
        state, metrics = train(state, batch, None)
        optimizer.zero_grad()
        losses = []
        for microbatch in batch:
            objective, loss = peer.objective(microbatch, config.model.z_loss)
            (objective / A).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        assert norm > 1, "nothing is clipped"
        for group in optimizer.param_groups:
            group["lr"] = (
                config.optimizer.end_lr + falling * (1 + math.cos(math.pi * count / 4)) / 2
            )
        optimizer.step()
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)
        small.assert_close(state.params, peer.tree(), 1e-5)
