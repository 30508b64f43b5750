"""One host: the mesh of its devices, the state on it, and the compiled steps; a plain class.

It implements the session protocol, so whatever drives a session can drive it, here or over calls.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mesh_transformer import __version__, progress
from mesh_transformer.checkpoints import native, opening, placing
from mesh_transformer.checkpoints.fitting import MADE_TO_FIT, check_function, fitted
from mesh_transformer.checkpoints.native_source import NativeSource
from mesh_transformer.checkpoints.source import MU, NU, PARAMS, Source
from mesh_transformer.config import Config, recorded
from mesh_transformer.model.sampling import Choice
from mesh_transformer.pod import checks
from mesh_transformer.pod import prompts as prompting
from mesh_transformer.session import Evaluation, Generation, Metrics, Position, Restored, Sampling
from mesh_transformer.sharding import COMPUTE, fetch, make_mesh, spec
from mesh_transformer.training.memory import memory_for
from mesh_transformer.training.optimizer import make_optimizer, restart_schedule
from mesh_transformer.training.steps import Continuation, TrainState, make_steps

_logger = logging.getLogger(__name__)


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
        """The train state; made from the configuration's seed if there is none yet.

        Raises:
            UserError: The devices' memory is too small to make it.
        """
        if self._state is None:
            with memory_for("weights and moments"):
                self.state = self.steps.init(jax.random.key(self.config.run.seed))
            assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state
        self._copies = None

    def train(self, tokens_ABT1: np.ndarray, mask_ABT: np.ndarray | None = None) -> Metrics:
        """Take one optimizer step; the metrics are arrays that are waited for when looked at.

        Raises:
            ValueError: The tokens or the mask are of another shape than the letters say, longer
                than `seq`, not a multiple of the replicas, or outside the vocabulary.
            UserError: The devices' memory is too small.
        """
        checks.check_tokens(
            self.config.model, "ABT1", tokens_ABT1, mask_ABT, multiple=self.mesh.shape["dp"]
        )
        tokens = self._on_mesh(tokens_ABT1.astype(np.int32), "ABT")
        mask = None if mask_ABT is None else self._on_mesh(mask_ABT.astype(np.float32), "ABT")
        state, self._copies = self.state, None  # the copies' memory is free for the step
        with memory_for("a step"):
            self.state, metrics = self.steps.train(state, tokens, mask)
        return metrics

    def evaluate(self, tokens_BT1: np.ndarray, mask_BT: np.ndarray | None = None) -> Evaluation:
        """Score tokens with the current weights; any number of sequences.

        Raises:
            ValueError: As for `train`, but for the number of sequences.
            UserError: The devices' memory is too small.
        """
        checks.check_tokens(self.config.model, "BT1", tokens_BT1, mask_BT)
        n = len(tokens_BT1)
        with memory_for("scoring"):
            tokens = self._on_mesh(self._pad(tokens_BT1.astype(np.int32)), "BT")
            loss_BT, correct_BT = self.steps.evaluate(self.state.params, tokens)
            loss_BT, correct_BT = np.asarray(loss_BT)[:n], np.asarray(correct_BT)[:n]
        if mask_BT is None:
            return Evaluation(loss_BT, correct_BT)
        return Evaluation(np.where(mask_BT, loss_BT, 0), correct_BT & np.asarray(mask_BT, bool))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int
    ) -> Generation:
        """Continue each prompt by up to `max_new_tokens` tokens, or answer it after an encoder."""
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
            UserError: A prompt is empty, or does not fit into `seq` with its new tokens; or the
                devices' memory is too small.
        """
        checks.check_prompts(self.config.model, prompts, max_new_tokens)
        with memory_for("sampling"):
            if self._copies is None:
                self._copies = self.steps.copies(self.state.params)
            weights = self._copies
            now = self._begin(weights, prompts, max_new_tokens)
            n_rows = len(now.position_B)
            base_key = jax.random.key(sampling.seed)
            choice = Choice(
                temperature_B=jnp.full(n_rows, sampling.temperature, jnp.float32),
                top_k_B=jnp.full(n_rows, sampling.top_k, jnp.int32),
                top_p_B=jnp.full(n_rows, sampling.top_p, jnp.float32),
                key_B=jax.vmap(lambda row: jax.random.fold_in(base_key, row))(jnp.arange(n_rows)),
            )
            stop_ids = jnp.array(sampling.stop_ids or (-1,), jnp.int32)
            is_answer = bool(self.config.model.encoder_layers)
            seen = [1 if is_answer else len(prompt) for prompt in prompts]
            for _ in range(0, max_new_tokens, every):
                now = self.steps.decode(weights, now, choice, stop_ids, jnp.int32(every))
                tokens_BS, logprobs_BS, position_B, done_B = fetch(
                    now.tokens_BS, now.logprobs_BS, now.position_B, now.done_B
                )
                ends = position_B + 1
                pieces = [slice(begin, end) for begin, end in zip(seen, ends, strict=False)]
                yield Generation(
                    [tokens_BS[row, piece].tolist() for row, piece in enumerate(pieces)],
                    [logprobs_BS[row, piece].tolist() for row, piece in enumerate(pieces)],
                )
                if done_B.all():
                    return
                seen = [piece.stop for piece in pieces]

    def save(self, step: int, position: Position) -> None:
        """Begin to write a checkpoint of the current state; an earlier one that failed raises."""
        extra = {
            "config": self.config.to_flat(),
            "position": dict(position),
            "library_version": __version__,
        }
        self._own_checkpoints().save(step, self.state, extra)

    def restore(self, step: int | None = None) -> Restored | None:
        """Load the newest (or the given) checkpoint of this run; None if there is none yet.

        A newest one that is damaged is set aside, and the one before is taken if there is one; a
        given step is never replaced.

        Raises:
            native.Damaged: It is damaged, and so is what could stand in for it.
            native.CheckpointError: It cannot be read, or is not of the configuration's model.
        """
        checkpoints = self._own_checkpoints()
        if step is not None:
            return self._restore(step)
        restored = checkpoints.newest_sound(self._restore)
        if restored is None:
            opening.check_unused(self.config.checkpoint.root)
        return restored

    def _restore(self, step: int) -> Restored:
        checkpoints = self._own_checkpoints()
        before = recorded(checkpoints.read_extra(step)["config"])
        where = f"the checkpoint of step {step} in {self.config.checkpoint.root}"
        check_function(before, self.config.model, where)
        self._state = self._copies = None  # the devices may not hold two states at once
        self.state, extra = checkpoints.restore(
            step, self.steps.state, config=self.config.to_flat()
        )
        self._tell_changes(before)
        return Restored(step, extra["position"])

    def tune_from(self, path: str, *, fresh_opt: bool) -> None:
        """Take the weights of another run, to train on from step 0.

        Args:
            path: A checkpoint of any format: see `opening.find`.
            fresh_opt: Begin with fresh optimizer moments; otherwise Adam's moments and count go on
                as they were, and only the learning-rate schedule begins anew. Where a checkpoint
                holds weights alone they begin afresh.

        Raises:
            native.CheckpointError: There is no such checkpoint, or it is damaged, of another model,
                or one of this run's own.
        """
        found = opening.find(path)
        own = native.locate(self.config.checkpoint.root)
        if own and found.folder.rpartition("/")[0] == own.rpartition("/")[0]:
            raise native.CheckpointError(
                f"{path} is a checkpoint of this very run, which would be overwritten: set another "
                "model_dir to train on from it at step 0"
            )
        source = self._opened(found)
        _logger.info("tuning the weights of %s", found.folder)
        if not fresh_opt and source.counts is None:
            _logger.info("it holds weights alone, so the optimizer begins afresh")
            fresh_opt = True
        wanted = self.steps.state
        # Placed as training leaves it: otherwise the step would be compiled for each placing.
        step = jnp.zeros((), wanted.step.dtype, device=wanted.step.sharding)
        if fresh_opt:
            params = self._read_params(found, source)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted.opt_state)
            optimizer = make_optimizer(self.config.optimizer, self.config.model.norm)
            init = jax.jit(optimizer.init, out_shardings=shardings)
            self.state = TrainState(step, params, init(params))
            return
        if isinstance(source, NativeSource):  # and needs nothing cut off
            state, _ = native.restore(found.folder, wanted, config=self.config.to_flat())
            params, opt_state = state.params, state.opt_state
        else:
            params = self._read_params(found, source)
            with self._reading(source, moments=True) as advance:
                opt_state = placing.place_opt_state(source, wanted.opt_state, advance)
        self.state = TrainState(step, params, restart_schedule(opt_state))

    def load_weights(self, path: str) -> None:
        """Take the weights of a checkpoint, to evaluate and sample with; no optimizer.

        One replica keeps them in the compute dtype alone, which is what it computes with.

        Args:
            path: Of any format: see `opening.find`.

        Raises:
            native.CheckpointError: There is no such checkpoint, or it is damaged or of another
                model than the configuration's.
        """
        found = opening.find(path)
        params = self._read_params(found, self._opened(found))
        alone = self.mesh.shape["dp"] == 1  # or masters may be spread, which copies never are
        with memory_for("weights"):
            weights = self.steps.copies(params) if alone else params
        self.state = TrainState(jnp.int32(0), weights, ())
        self._copies = weights if alone else None

    def _opened(self, found: opening.Found) -> Source:
        """Open a checkpoint of any format, and check that it is of the configuration's model."""
        source = opening.open_source(
            found, self.config.model, self.config.checkpoint.original_cores
        )
        made_to_fit = () if found.format == "native" else MADE_TO_FIT
        check_function(source.known, self.config.model, found.folder, made_to_fit)
        return fitted(source, self.config.model)

    def _read_params(self, found: opening.Found, source: Source) -> Any:
        wanted = self.steps.state.params
        if isinstance(source, NativeSource):  # each process reads its own part
            flat = self.config.to_flat()
            return native.restore_params(found.folder, wanted, config=flat, cast=True)
        with self._reading(source, moments=False) as advance, memory_for("weights"):
            return placing.place_params(source, wanted, advance)

    def _reading(self, source: Source, *, moments: bool) -> Any:
        """Show progress while arrays are read."""
        kinds = (MU, NU) if moments else (PARAMS,)
        total = sum(array.n_bytes for key, array in source.arrays.items() if key.kind in kinds)
        return progress.stage("Moments" if moments else "Weights", total)

    def close(self) -> None:
        """Wait for a save under way; raises if it failed."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _own_checkpoints(self) -> native.Checkpoints:
        if self._checkpoints is None:
            raise ValueError(
                "this session was made without checkpoints, to read only: it can neither save nor "
                "restore; load_weights reads the weights of any run"
            )
        return self._checkpoints

    def _tell_changes(self, before: Mapping[str, Any]) -> None:
        """Log what has changed in the configuration since a checkpoint was saved."""
        now = self.config.to_flat()
        changes = [
            f"{key} {_told(before.get(key))} -> {_told(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changes:
            _logger.info("changed since that checkpoint: %s", ", ".join(changes))

    def _on_mesh(self, array: np.ndarray, dims: str) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec(dims, COMPUTE))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def _pad(self, array: np.ndarray) -> np.ndarray:
        """Repeat the last row until every replica has as many."""
        missing = -len(array) % self.mesh.shape["dp"]
        return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])

    def _begin(
        self, weights: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> Continuation:
        """Lay out the prompts and fill the cache."""
        laid = prompting.laid(self.config.model, prompts, max_new_tokens, self.mesh.shape["dp"])
        n_slots = laid.tokens_BS.shape[1]
        return Continuation(
            tokens_BS=self._on_mesh(laid.tokens_BS, "BS"),
            logprobs_BS=self._on_mesh(np.zeros(laid.tokens_BS.shape, np.float32), "BS"),
            position_B=self._on_mesh(laid.length_B - 1, "B"),
            last_B=self._on_mesh(laid.length_B - 1 + max_new_tokens, "B"),
            done_B=self._on_mesh(laid.done_B, "B"),
            cache=self.steps.prefill(weights, self._on_mesh(laid.fed_BT, "BT"), n_slots),
        )


def _told(value: Any) -> str:
    return "left out" if value is None else repr(value)
