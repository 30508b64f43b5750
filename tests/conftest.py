"""Tests run on eight CPU devices, whatever else the machine has."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator

import jax
import object_stores
import pytest
from object_stores import Gateway

from mesh_transformer import buckets

# Before PyTorch starts: its threads would spin while other tests' want the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[None]:
    """Let the runs of a module share compiled steps; see `runs.compiled_once`."""
    import runs  # which imports what takes a while, and most tests do not need

    with runs.compiled_once():
        yield


@pytest.fixture(scope="session")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """Start the object stores that the installed extras allow: once, for clients keep addresses."""
    folder = tmp_path_factory.mktemp("object_stores")
    with contextlib.ExitStack() as servers:
        there = [scheme for scheme in object_stores.KINDS if not object_stores.missing(scheme)]
        yield {name: servers.enter_context(object_stores.serve(name, folder)) for name in there}


@pytest.fixture
def stores(
    gateways: dict[str, Gateway], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Gateway]]:
    """Give an empty bucket in each object store, which all clients take for the real ones."""
    for gateway in gateways.values():
        gateway.reset()
    for name, value in object_stores.environment(gateways).items():
        monkeypatch.setenv(name, value)
    buckets._connect.cache_clear()
    yield gateways
    buckets._connect.cache_clear()


@pytest.fixture(params=["local", "gs", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """Give a folder of each kind of storage: what a test says holds for all three alike."""
    if request.param == "local":
        return str(tmp_path / "run")
    return _bucket_folder(request.param, request)


@pytest.fixture(params=["gs", "s3"])
def remote(request: pytest.FixtureRequest) -> str:
    return _bucket_folder(request.param, request)


def _bucket_folder(scheme: str, request: pytest.FixtureRequest) -> str:
    if extras := object_stores.missing(scheme):
        pytest.skip(f"{scheme}:// needs the extras [{','.join(extras)}], which are not installed")
    request.getfixturevalue("stores")
    return f"{scheme}://bucket/run"


@pytest.fixture
def store(remote: str, stores: dict[str, Gateway]) -> Gateway:
    """Give what stands before the server that holds `remote`."""
    return stores[remote.partition("://")[0]]


@pytest.fixture
def gs(request: pytest.FixtureRequest) -> str:
    """Give a folder in gs://, for what no other bucket can."""
    return _bucket_folder("gs", request)


@pytest.fixture
def s3(request: pytest.FixtureRequest) -> str:
    return _bucket_folder("s3", request)
