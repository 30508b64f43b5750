"""One host: the mesh of its devices, the state on it, and the compiled steps; a plain class.

It implements the session protocol, so whatever drives a session can drive it, here or over calls.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mesh_transformer import __version__, storage
from mesh_transformer.checkpoints import native
from mesh_transformer.config import Config
from mesh_transformer.errors import UserError
from mesh_transformer.model.sampling import Choice
from mesh_transformer.session import Evaluation, Generation, Metrics, Position, Restored, Sampling
from mesh_transformer.sharding import COMPUTE, make_mesh, spec
from mesh_transformer.training.optimizer import restart_schedule
from mesh_transformer.training.steps import Continuation, TrainState, make_steps

_SMALLEST_BUCKET = 64  # positions; one compiled decoder serves all prompts of a bucket

_logger = logging.getLogger(__name__)


def host_devices(config: Config) -> list[jax.Device]:
    """Return the devices to run on: this host's accelerators, or as many CPU devices as needed.

    On a host without accelerators a configuration for 8 cores runs on 8 CPU devices, which the
    host's cores share: slow, and exact.

    Raises:
        UserError: `tpu_size` and the devices there are do not match.
    """
    wanted = config.mesh.tpu_size or config.mesh.cores_per_replica
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        jax.config.update("jax_num_cpu_devices", wanted)
    devices = jax.devices()
    if config.mesh.tpu_size not in (None, len(devices)):
        raise UserError(
            f"tpu_size is {config.mesh.tpu_size}, but jax sees {len(devices)} device(s) here: "
            f"{devices[0].device_kind}; set tpu_size to {len(devices)}, or leave it out to use "
            "all there are"
        )
    return devices


class Worker:
    """A session on the devices given.

    The state is made when it is first needed: by `restore` or `tune_from`, or else afresh.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[jax.Device],
        checkpoints: native.Checkpoints | None = None,
    ) -> None:
        """Make the mesh and the steps; nothing is computed yet.

        Args:
            checkpoints: Where `save` and `restore` work; None for a session that only reads.

        Raises:
            ValueError: The configuration cannot run on these devices.
        """
        self.config = config
        mp = config.mesh.cores_per_replica
        self.mesh = make_mesh(config.replicas(len(devices)), mp, devices)
        self.steps = make_steps(config, self.mesh)
        self._checkpoints = checkpoints
        self._state: TrainState | None = None
        self._copies: Any = None

    @property
    def n_parameters(self) -> int:
        """Weights of the model, each counted once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.steps.state.params))

    @property
    def state(self) -> TrainState:
        """The train state; made from the configuration's seed if there is none yet."""
        if self._state is None:
            self.state = self.steps.init(jax.random.key(self.config.run.seed))
            assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state
        self._copies = None

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        """Take one optimizer step; the metrics are arrays that are waited for when looked at."""
        tokens = self._on_mesh(tokens_ABT1, "ABT")
        mask = None if mask_ABT is None else self._on_mesh(mask_ABT.astype(np.float32), "ABT")
        self.state, metrics = self.steps.train(self.state, tokens, mask)
        return metrics

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None = None) -> Evaluation:
        """Score tokens with the current weights; any number of sequences."""
        n = len(tokens_BT1)
        padded = self._pad(tokens_BT1)
        loss_BT, correct_BT = self.steps.evaluate(self.state.params, self._on_mesh(padded, "BT"))
        loss_BT, correct_BT = np.asarray(loss_BT)[:n], np.asarray(correct_BT)[:n]
        if mask_BT is None:
            return Evaluation(loss_BT, correct_BT)
        return Evaluation(np.where(mask_BT, loss_BT, 0), correct_BT & np.asarray(mask_BT, bool))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens."""
        (generation,) = self.stream(prompts, sampling, max_new_tokens, every=max_new_tokens)
        return generation

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        *,
        every: int,
    ) -> Iterator[Generation]:
        """Continue each prompt, yielding what is new after every `every` tokens.

        Raises:
            UserError: A prompt is empty, or does not fit into `seq` with its new tokens.
        """
        self._check_prompts(prompts, max_new_tokens)
        if self._copies is None:
            self._copies = self.steps.copies(self.state.params)
        now = self._begin(prompts, max_new_tokens)
        n_rows = len(now.position_B)
        base_key = jax.random.key(sampling.seed)
        choice = Choice(
            temperature_B=jnp.full(n_rows, sampling.temperature, jnp.float32),
            top_k_B=jnp.full(n_rows, sampling.top_k, jnp.int32),
            top_p_B=jnp.full(n_rows, sampling.top_p, jnp.float32),
            key_B=jax.vmap(lambda row: jax.random.fold_in(base_key, row))(jnp.arange(n_rows)),
        )
        stop_N = jnp.array(sampling.stop_ids or (-1,), jnp.int32)
        seen = [len(prompt) for prompt in prompts]
        for _ in range(0, max_new_tokens, every):
            now = self.steps.decode(self._copies, now, choice, stop_N, jnp.int32(every))
            ends = np.asarray(now.position_B) + 1
            tokens_BS, logprobs_BS = np.asarray(now.tokens_BS), np.asarray(now.logprobs_BS)
            pieces = [slice(begin, end) for begin, end in zip(seen, ends, strict=False)]
            yield Generation(
                [tokens_BS[row, piece].tolist() for row, piece in enumerate(pieces)],
                [logprobs_BS[row, piece].tolist() for row, piece in enumerate(pieces)],
            )
            if now.done_B.all():
                return
            seen = [piece.stop for piece in pieces]

    def save(self, step: int, position: Position) -> None:
        """Begin to write a checkpoint of the current state; an earlier one that failed raises."""
        assert self._checkpoints is not None, "this session has no checkpoints to write"
        self._checkpoints.save(
            step,
            self.state,
            {
                "config": self.config.to_flat(),
                "position": dict(position),
                "library_version": __version__,
            },
        )

    def restore(self, step: int | None = None) -> Restored | None:
        """Load the newest (or the given) checkpoint of this run; None if there is none yet."""
        assert self._checkpoints is not None, "this session has no checkpoints to read"
        step = self._checkpoints.latest() if step is None else step
        if step is None:
            return None
        self.state, extra = self._checkpoints.restore(
            step, self.steps.state, config=self.config.to_flat()
        )
        return Restored(step, extra["position"])

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0.

        Args:
            path: A run's folder or a step folder in it.
            fresh_opt: Begin with fresh optimizer moments; otherwise Adam's moments and count go on
                as they were, and only the learning-rate schedule begins anew.
        """
        folder = located(path)
        flat = self.config.to_flat()
        if fresh_opt:
            params = native.restore_params(folder, self.steps.state.params, config=flat)
            self.state = self.state._replace(params=params)
        else:
            state, _ = native.restore(folder, self.steps.state, config=flat)
            opt_state = restart_schedule(state.opt_state)
            self.state = TrainState(jnp.zeros_like(state.step), state.params, opt_state)

    def load_weights(self, path: str) -> None:
        """Take the weights of a run or step folder, to evaluate and sample with; no optimizer."""
        params = native.restore_params(
            located(path), self.steps.state.params, config=self.config.to_flat()
        )
        self.state = TrainState(jnp.int32(0), params, ())

    def close(self) -> None:
        """Wait for a save under way; raises if it failed."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _on_mesh(self, array: np.ndarray, dims: str) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec(dims, COMPUTE))
        return jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))

    def _pad(self, array: np.ndarray) -> np.ndarray:
        """Repeat the last row until every replica has as many."""
        missing = -len(array) % self.mesh.shape["dp"]
        return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

    def _check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        seq = self.config.model.seq
        problems = [
            f"prompt {i} is empty; give it at least one token, such as the end of text"
            for i, prompt in enumerate(prompts)
            if not len(prompt)
        ] + [
            f"prompt {i} has {len(prompt)} tokens and {max_new_tokens} are to follow, but seq is "
            f"{seq}: shorten the prompt or ask for fewer"
            for i, prompt in enumerate(prompts)
            if len(prompt) + max_new_tokens > seq
        ]
        if not len(prompts) or max_new_tokens < 1:
            problems.append("there must be a prompt, and at least one new token asked for")
        if problems:
            raise UserError("; ".join(problems))

    def _begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Continuation:
        """Lay out the prompts by position, padded on the right, and fill the cache."""
        n_rows = len(prompts) + -len(prompts) % self.mesh.shape["dp"]
        lengths_B = np.ones(n_rows, np.int32)
        lengths_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        n_slots = self._bucket(int(lengths_B.max()) + max_new_tokens)
        tokens_BS = np.zeros((n_rows, n_slots), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = prompt
        filled_BT = tokens_BS[:, : self._bucket(int(lengths_B.max()))]
        return Continuation(
            tokens_BS=self._on_mesh(tokens_BS, "BS"),
            logprobs_BS=self._on_mesh(np.zeros(tokens_BS.shape, np.float32), "BS"),
            position_B=self._on_mesh(lengths_B - 1, "B"),
            last_B=self._on_mesh(lengths_B - 1 + max_new_tokens, "B"),
            done_B=self._on_mesh(np.arange(n_rows) >= len(prompts), "B"),
            cache=self.steps.prefill(self._copies, self._on_mesh(filled_BT, "BT"), n_slots),
        )

    def _bucket(self, n_positions: int) -> int:
        """Return the next power of two, up to `seq`: few lengths, so few compilations."""
        bucket = _SMALLEST_BUCKET
        while bucket < n_positions:
            bucket *= 2
        return min(bucket, self.config.model.seq)


def located(path: str) -> str:
    """Return the step folder that a path given by a user means.

    Raises:
        native.CheckpointError: There is no complete checkpoint.
    """
    folder = native.locate(path)
    if folder is None:
        there = "is empty of complete checkpoints" if storage.exists(path) else "does not exist"
        raise native.CheckpointError(
            f"{path} {there}; give a run's folder (model_dir) or a step folder in it"
        )
    return folder


def stored_config(path: str) -> Mapping[str, Any]:
    """Return the flat configuration that the checkpoint at a path was saved with."""
    return native.read_extra(located(path))["config"]
