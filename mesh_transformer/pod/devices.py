"""The devices of this host, as many as a run asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import jax

from mesh_transformer import relations
from mesh_transformer.config import Config
from mesh_transformer.errors import InUse, UserError

_MOST_CPU_DEVICES = 64  # each takes threads; who asks for more has a pod's configuration by mistake


def host_devices(config: Config, n_hosts: int = 1) -> list[jax.Device]:
    """Return the devices to train on: all hosts' accelerators, or as many CPU devices as needed.

    On a host without accelerators a configuration for 8 cores runs on 8 CPU devices, which the
    host's cores share: slow, and exact. There are never more than 64.

    Raises:
        UserError: `tpu_size` and the devices there are do not match, or JAX finds none.
    """
    wanted = config.mesh.tpu_size or math.lcm(config.mesh.cores_per_replica, n_hosts)
    if wanted % n_hosts:
        raise UserError(
            f"tpu_size is {wanted}, which {n_hosts} hosts cannot share alike: set it to a multiple "
            f"of {n_hosts}, or ask for {relations.divisors(wanted)} hosts"
        )
    wanted //= n_hosts
    with contextlib.suppress(RuntimeError):  # JAX has started already, with the devices it has
        jax.config.update("jax_num_cpu_devices", min(wanted, _MOST_CPU_DEVICES))
    devices = _devices()
    if config.mesh.tpu_size not in (None, len(devices)):
        raise UserError(
            f"tpu_size is {config.mesh.tpu_size}, but JAX sees {len(devices)} device(s) here "
            f"({devices[0].device_kind}): set tpu_size to {len(devices)}, or leave it out to use "
            "all there are"
        )
    return devices


def one_replica(config: Config) -> tuple[Config, list[jax.Device]]:
    """Return a run's configuration and devices for reading one copy of its model on this host.

    Where there are fewer devices than `cores_per_replica`, each holds a larger part of the model.
    Attention is computed as these devices do it best.

    Raises:
        UserError: JAX finds no devices.
    """
    devices = _devices()
    cores = config.mesh.cores_per_replica
    n = max(n for n in range(1, min(cores, len(devices)) + 1) if cores % n == 0)
    mesh = dataclasses.replace(config.mesh, tpu_size=n, cores_per_replica=n)
    model = dataclasses.replace(config.model, attention="auto")  # what was forced was for others
    return dataclasses.replace(config, mesh=mesh, model=model), devices[:n]


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:
        raise InUse(
            f"JAX finds no devices: {error}. If another program holds them, end it; to compute on "
            "the CPU, set JAX_PLATFORMS=cpu in the environment"
        ) from error
