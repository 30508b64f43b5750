"""What a driver gives its hosts: the library as a wheel, and the token to those who may have it."""

from __future__ import annotations

import http.client
import http.server
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mesh_transformer.pod import startup

ROOT = pathlib.Path(__file__).parent.parent
TOKEN = "not to be seen"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> startup.Wheel:
    return startup.build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_same_library_gives_the_same_wheel(
    wheel: startup.Wheel, tmp_path: pathlib.Path
) -> None:
    again = startup.build_wheel(tmp_path)
    assert again == wheel._replace(path=again.path)
    assert again.path.read_bytes() == wheel.path.read_bytes()


def test_a_wheel_of_an_installed_library_is_the_wheel_that_was_installed(
    wheel: startup.Wheel, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel.path)], check=True)
    program = "from mesh_transformer.pod import startup as s; print(s.build_wheel('.').sha256)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == wheel.sha256


def test_the_wheel_holds_what_setuptools_would_put_there(
    wheel: startup.Wheel, tmp_path: pathlib.Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mesh_transformer", source / "mesh_transformer", ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(source)], check=True)
    [theirs] = tmp_path.glob("*.whl")
    assert theirs.name == wheel.path.name
    assert contents(theirs) == contents(wheel.path)
    assert "mesh_transformer/pod/startup.sh" in contents(wheel.path)[0]
    assert len(contents(wheel.path)[1]) > 20


def contents(path: pathlib.Path) -> tuple[list[str], set[str]]:
    """Return the library's files in a wheel, and what it says about itself and its needs."""
    with zipfile.ZipFile(path) as file:
        names = [name for name in file.namelist() if ".dist-info/" not in name]
        [metadata] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        lines = file.read(metadata).decode().partition("\n\n")[0].replace("'", '"').splitlines()
    wanted = re.compile(r"(Name|Version|Requires-Python|Requires-Dist|Provides-Extra): ")
    return sorted(names), {re.sub(r"[ ()]", "", line) for line in lines if wanted.match(line)}


def test_hosts_get_the_versions_that_the_driver_has(wheel: startup.Wheel) -> None:
    import jax

    assert f"jax=={jax.__version__}" in startup.pins()
    assert not any(pin.startswith("mesh-transformer") for pin in startup.pins())


def make(wheel: startup.Wheel, **changes: object) -> startup.Startup:
    given = {
        "slice_name": "a",
        "head": "10.0.0.2:6379",
        "wheel": wheel,
        "wheel_url": "http://127.0.0.1:9/x",
        "token_url": "http://127.0.0.1:9/y",
        "constraints": ("jax==1",),
    }
    return startup.Startup(**(given | changes))  # type: ignore[arg-type]


def test_the_build_changes_with_all_that_is_installed_and_with_nothing_else(
    wheel: startup.Wheel,
) -> None:
    build = make(wheel).build
    assert re.fullmatch(r"\d+\.\d+\.\d+-[0-9a-f]{12}", build)
    assert make(wheel, head="10.0.0.3:1", wheel_url="gs://b/w", num_cpus=3).build == build
    others = [
        make(wheel._replace(sha256="0")).build,
        make(wheel, extras=("tpu", "pods", "gcs")).build,
        make(wheel, constraints=("jax==2",)).build,
    ]
    assert len({build, *others}) == 4


@contextmanager
def files(wheel: startup.Wheel) -> Iterator[startup.FileServer]:
    with startup.FileServer(wheel, TOKEN, host="127.0.0.1") as server:
        yield server


def get(url: str, source: str = "127.0.0.1") -> tuple[int, bytes]:
    """Ask from an address of this machine."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, source_address=(source, 0), timeout=10)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    content = answer.status, answer.read()
    connection.close()
    return content


def test_the_token_is_given_to_admitted_addresses_until_it_is_closed(wheel: startup.Wheel) -> None:
    with files(wheel) as server:
        assert get(server.url("token")) == (403, b"")
        server.admit(["127.0.0.1", "127.0.0.3"])
        assert get(server.url("token")) == (200, TOKEN.encode())
        assert get(server.url("token"), "127.0.0.2") == (403, b"")
        server.admit([])
        assert get(server.url("token")) == (403, b"")


def test_files_are_given_only_under_the_address_that_nobody_can_guess(
    wheel: startup.Wheel, capfd: pytest.CaptureFixture[str]
) -> None:
    with files(wheel) as server, files(wheel) as other:
        server.admit(["127.0.0.1"])
        url = server.url("wheel")
        assert get(url) == (200, wheel.path.read_bytes())
        secret, another = url.split("/")[3], other.url("wheel").split("/")[3]
        assert secret != another and len(secret) >= 43  # 256 bits
        base = url[: url.index(f"/{secret}")]
        for path in ("/", "/token", "//token", f"/{another}/token", "/../../etc/passwd"):
            assert get(base + path) == (404, b"")
        for name in ("", "wheel", "../token", f"{wheel.path.name}/"):
            assert get(f"{url.rpartition('/')[0]}/{name}") == (404, b"")
    assert capfd.readouterr() == ("", "")


def test_values_are_data_in_the_script_whatever_they_are(wheel: startup.Wheel) -> None:
    strange = 'it\'s "$(touch x)" `y`\n# \\ é'
    text = make(wheel, slice_name=strange).script()
    header = text[: text.index("\nset -euo")]
    done = subprocess.run(
        ["bash", "-c", f'{header}\nprintf %s "$name"'], capture_output=True, check=True
    )
    assert done.stdout.decode() == strange
