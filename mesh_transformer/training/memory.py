"""What to change where the devices' memory is too small; JAX says only by how much it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from mesh_transformer.errors import UserError

Use = Literal["a step", "weights", "weights and moments", "scoring", "sampling"]

_ADVICE: dict[Use, str] = {
    "a step": "lower per_replica_batch (and raise gradient_accumulation_steps to make up for it) "
    "or seq, set remat to full, or raise cores_per_replica or zero_stage",
    "weights": "raise cores_per_replica",
    "weights and moments": "raise cores_per_replica or, with several replicas, zero_stage",
    "scoring": "score fewer or shorter sequences at once (val_batch_multiplier, seq), or raise "
    "cores_per_replica",
    "sampling": "ask for fewer new tokens, give fewer or shorter prompts at once, or raise "
    "cores_per_replica",
}


@contextlib.contextmanager
def memory_for(use: Use) -> Iterator[None]:
    """Say what to change if the devices' memory does not suffice.

    Devices work behind Python's back: put it around what asks for a result, and around what first
    looks at one.

    Raises:
        UserError: Within the `with` block JAX ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:  # JaxRuntimeError is one; the driver of a pod has no JAX
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the memory of the devices is too small for {use}: {_ADVICE[use]}. "
            f"{str(error).splitlines()[0]}"
        ) from error
