"""Every command and path that the documents name exists and takes the arguments shown."""

from __future__ import annotations

import ast
import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

import mesh_transformer.sharding
from mesh_transformer import config
from mesh_transformer.training import loop

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")]
    if not path.parent.name.startswith(".")
)
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "setup.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# What a command may begin with beyond `python`: checked by its own tests, or not ours.
OTHER = {"cd", "git", "pre-commit", "source"}


def commands(document: str) -> Iterator[list[str]]:
    """Yield the words of each command line in a document's indented and fenced shell blocks.

    A script's document is its docstring.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    if document.endswith(".py"):
        text = f"{ast.get_docstring(ast.parse(text))}\n"
    fenced = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(
        r"(?<=\n\n)(?: {4}.*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    for block in fenced + indented:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and (words[0] in {"python", "pip", *OTHER} or "/" in words[0]):
                yield words


@functools.cache
def help_of(*program: str) -> str:
    command = [sys.executable, *program, "--help"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout


def known_flags(*program: str) -> set[str]:
    return set(re.findall(r"--[\w-]+", help_of(*program)))


def check_python(words: list[str]) -> None:
    """Check that a Python command's program exists and knows every flag that it is given."""
    module = words[1] == "-m"
    program = words[1:3] if module else words[1:2]
    if program in (["-m", "venv"], ["-m", "pytest"]):
        return
    assert module or (ROOT / program[0]).is_file(), f"there is no {program[0]}"
    flags = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
    known = known_flags(*program)
    assert flags <= known, f"{program[-1]} does not know {sorted(flags - known)}"


def snippets(document: str) -> Iterator[dict[str, Any]]:
    """Yield each block of JSON in a document: keys of a configuration."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for block in re.findall(r"^```json\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield json.loads(block)


def keys_named(document: str) -> set[str]:
    """Return what a document names as code and only a key can be called.

    A table that begins with what is said "there" says what that is here.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    here: list[str] = []
    for table in re.findall(r"(?<=^\| there )\|.*\n(?:\|.*\n)+", text, re.MULTILINE):
        text = text.replace(table, "")
        here += [row.split("|")[2] for row in table.splitlines()[2:]]
    said = set(re.findall(r"`(\w+)`", " ".join(here)))
    first = r"(?:tpu|pod|val|ckpt|keep|warmup|anneal|total|gradient|per_replica|zero)_\w+"
    return said | set(re.findall(rf"`({first}|\w+_(?:lr|dir|set))`", text))


def check_pip(words: list[str]) -> None:
    named = {
        extra for extras in re.findall(r"\[(.*?)\]", " ".join(words)) for extra in extras.split(",")
    }
    assert named <= set(EXTRAS), f"there are no extras {sorted(named - set(EXTRAS))}"


@pytest.mark.parametrize("document", DOCUMENTS + SCRIPTS)
def test_the_commands_shown_can_be_run(document: str) -> None:
    for words in commands(document):
        if words[0] == "python":
            check_python(words)
        elif words[0] == "pip":
            check_pip(words)
        elif words[0] not in OTHER:
            assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} cannot be run"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_and_links_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (folder / link).exists()]
    ours = r"(?:mesh_transformer|configs|tests|tools|examples|benchmarks|docs)"
    named = re.findall(rf"(?<![\w./-])({ours}/[\w./-]*\w)", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_keys_named_are_keys_of_the_configuration(document: str) -> None:
    assert keys_named(document) <= {*config.KEYS}


def test_what_is_to_be_trained_names_no_tasks_that_nothing_runs() -> None:
    for document in DOCUMENTS + SCRIPTS:
        for words in commands(document):
            if words[1:2] and words[1] in ("device_train.py", "train.py"):
                path = ROOT / words[words.index("--config") + 1]
                if path.exists():  # else it is one that the reader has made
                    loop.check_tasks(config.load(path))


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(snippets(name))])
def test_the_configurations_shown_are_sound(document: str) -> None:
    base = json.loads((ROOT / "configs" / "gptj_6B_v3-8.json").read_text())
    for keys in snippets(document):
        config.parse(base | keys)


def test_the_alphabet_shown_is_the_one_in_use() -> None:
    legend = re.findall(r"^    [A-Z]  .*$", mesh_transformer.sharding.__doc__ or "", re.MULTILINE)
    shown = re.findall(r"^    [A-Z]  .*$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert legend and shown == legend


def test_the_readme_leads_to_every_how_to() -> None:
    linked = re.findall(r"^- .*?\]\((docs/howto_\w+\.md)\)", README, re.MULTILINE)
    assert sorted(linked) == sorted(name for name in DOCUMENTS if name.startswith("docs/howto_"))


def test_the_readme_shows_both_commands() -> None:
    shown = {words[0] for words in commands("README.md")}
    assert {"./quickstart", "./test"} <= shown


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python no_such_script.py", "there is no no_such_script.py"),
        ("python tools/compare_runs.py a b --tolerence 1", "does not know ['--tolerence']"),
    ],
)
def test_a_command_that_cannot_be_run_is_found(command: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(problem)):
        check_python(shlex.split(command))


def test_an_extra_that_is_not_there_is_found() -> None:
    with pytest.raises(AssertionError, match="gpu"):
        check_pip(shlex.split("pip install -e '.[test,gpu]'"))
