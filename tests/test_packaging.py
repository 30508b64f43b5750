from __future__ import annotations

import pathlib
import re
import tomllib

import pin
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
REQUIRED = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])

# Only CUDA machines install the plugins of jax[cuda13]; JAX itself pins them to its own version.
# TensorFlow's full build stands in for tensorflow-cpu where that has no wheels.
UNPINNED = {"tensorflow"}


def normal(requirement: str) -> str:
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned_versions(minor: int) -> dict[str, str]:
    """Return the pins that hold on Python 3.`minor`."""
    pins = {}
    for line in CONSTRAINTS:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if "==" in requirement and (
            not marker or marker == (pin.OLD_MARKER if minor < 12 else pin.NEW_MARKER)
        ):
            name, version = requirement.split("==")
            assert name not in pins, f"{name} is pinned twice for Python 3.{minor}"
            pins[name] = version
    return pins


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_every_dependency_is_pinned_on_every_python(minor: int) -> None:
    missing = {normal(requirement) for requirement in REQUIRED} - set(pinned_versions(minor))
    assert missing <= UNPINNED


def test_the_oldest_python_has_the_oldest_jax_and_the_newest_a_newer_one() -> None:
    floor = next(line for line in PROJECT["dependencies"] if line.startswith("jax>="))
    assert floor == f"jax>={pinned_versions(11)['jax']}"
    assert pinned_versions(13)["jax"] != pinned_versions(11)["jax"]


def test_the_quickstart_installs_neither_pytorch_nor_ray() -> None:
    names = {normal(requirement) for requirement in PROJECT["dependencies"]}
    assert not names & {"torch", "transformers", "ray", "lm-eval", "google-cloud-tpu"}


def test_environments_that_differ_are_told_apart_by_markers() -> None:
    old = {"both": "1", "newer": "1", "old-only": "5"}
    new = {"both": "1", "newer": "2", "new-only": "6"}
    assert pin.merged(old, new) == [
        "both==1",
        "new-only==6",
        f"newer==1 ; {pin.OLD_MARKER}",
        f"newer==2 ; {pin.NEW_MARKER}",
        "old-only==5",
    ]
