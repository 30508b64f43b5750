"""Tests run on eight CPU devices, whatever else the machine has."""

from __future__ import annotations

import importlib.util

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Packages that a marked test needs; the marker is named as the extra that brings them.
NEEDS = {"parity": ("torch", "transformers"), "tpu": ("libtpu",), "pods": ("ray",)}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip marked tests whose packages are missing, saying how to get them."""
    for extra, packages in NEEDS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing and item.get_closest_marker(extra):
            pytest.skip(f"needs {' and '.join(missing)}; run EXTRAS=test,{extra} ./test")
