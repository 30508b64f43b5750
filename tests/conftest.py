"""Tests run on eight CPU devices, whatever else the machine has."""

from __future__ import annotations

import importlib.util
import pathlib
import warnings
from collections.abc import Iterator

import fake_buckets
import jax
import pytest

from mesh_transformer import storage

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


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_buckets.FakeBuckets]:
    """Serve a bucket on this machine, which clients of S3 and of GCS take for theirs."""
    with fake_buckets.serve() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        storage._connect.cache_clear()
        yield server
        storage._connect.cache_clear()


PACKAGES = {"gs": "google.cloud.storage", "s3": "boto3"}


def _installed(package: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # google.api_core without grpcio-status
        try:
            importlib.import_module(package)
        except ImportError:
            return False
    return True


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
    if not _installed(PACKAGES[scheme]):
        extra = storage.EXTRAS[scheme]
        pytest.skip(f"{scheme}:// needs the extra [{extra}], which is not installed")
    request.getfixturevalue("buckets")
    return f"{scheme}://bucket/run"
