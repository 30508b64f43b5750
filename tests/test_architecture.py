"""The house rules that a reader relies on, checked over the source: rows, sizes, letters, names."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from house import OWNERS, ROWS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "mesh_transformer"

FILE_LINES, FUNCTION_LINES, SCRIPT_LINES = 400, 60, 70


@functools.cache
def tracked() -> tuple[pathlib.Path, ...]:
    """Return the repository's own files; what git ignores (environments, runs) is not ours."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"these rules are checked in a git checkout: {done.stderr.strip()}")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return tuple(path for path in paths if path.is_file())


def python_files() -> list[pathlib.Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def library_files() -> list[pathlib.Path]:
    return [path for path in python_files() if path.is_relative_to(PACKAGE)]


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: pathlib.Path) -> str:
    """Return a library file's name below the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full dotted name of everything imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def library_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the name, below the package, of each library module that a file imports."""
    modules = {module_name(path) for path in library_files()}
    for name in imports(tree):
        package, _, inner = name.partition(".")
        if package == PACKAGE.name:
            yield inner if inner in modules else inner.rpartition(".")[0]


def places() -> dict[str, tuple[int, int, int]]:
    """Return the row, group and place within the group of each name in `ROWS`."""
    return {
        module: (row, group, place)
        for row, groups in enumerate(ROWS)
        for group, names in enumerate(groups)
        for place, module in enumerate(names.split())
    }


def may_import(importer: str, imported: str) -> bool:
    here, there = places()[importer], places()[imported]
    return there[0] < here[0] or (there[:2] == here[:2] and there[2] < here[2])


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def where(path: pathlib.Path, node: ast.AST | None = None) -> str:
    line = getattr(node, "lineno", None)
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


def test_every_module_has_a_place_in_the_rows() -> None:
    known = places()
    report(
        [
            f"{where(path)}: add {module_name(path)!r} to ROWS, where what it imports allows"
            for path in library_files()
            if module_name(path) and module_name(path) not in known
        ]
    )


def test_modules_import_only_from_rows_above() -> None:
    report(
        [
            f"{where(path)}: {module_name(path)} may not import {imported}"
            for path in library_files()
            for imported in library_imports(parse(path))
            if module_name(path) in places() and imported
            if imported not in places() or not may_import(module_name(path), imported)
        ]
    )


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("model.decoder", "sharding", True),
        ("model.layers", "model.attention", True),
        ("model.attention", "model.layers", False),
        ("sharding", "storage", False),
        ("data.tokenizer", "checkpoints.native", False),
        ("config", "training.loop", False),
    ],
)
def test_rows_allow_one_direction_only(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_scripts_are_imported_by_nobody() -> None:
    scripts = {path.stem for path in python_files() if path.parent == ROOT}
    report(
        [
            f"{where(path)}: imports the script {name}.py"
            for path in library_files()
            for name in imports(parse(path))
            if name.partition(".")[0] in scripts
        ]
    )


def test_heavy_packages_are_imported_only_by_their_owner() -> None:
    report(
        [
            f"{where(path)}: only {sorted(owners) or 'tests and benchmarks'} may import {package}"
            for path in library_files()
            for package, owners in OWNERS.items()
            if module_name(path) not in owners
            if any(re.match(rf"{package}(\.|_|$)", name) for name in imports(parse(path)))
        ]
    )


def test_the_configuration_needs_the_standard_library_alone() -> None:
    program = (
        "import sys; import mesh_transformer.config;"
        "names = {name.partition('.')[0] for name in sys.modules};"
        "print(*sorted(names - sys.stdlib_module_names - {'__main__', 'mesh_transformer'}))"
    )
    # Isolated and without `site`: start-up files of installed packages would add their own modules.
    isolated = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; {program}"
    command = [sys.executable, "-I", "-S", "-c", isolated]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_files_and_functions_are_short() -> None:
    problems = []
    for path in python_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = SCRIPT_LINES if path.parent == ROOT else FILE_LINES
        if lines > limit:
            problems.append(f"{where(path)}: {lines} lines; at most {limit}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    size = f"{node.name} has {length} lines"
                    problems.append(f"{where(path, node)}: {size}; at most {FUNCTION_LINES}")
    report(problems)


def test_no_module_is_named_utils() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|misc|common|v2)(_|$)", re.IGNORECASE)
    report(
        [
            f"{where(path)}: name it after what it gives"
            for path in python_files()
            if any(vague.search(part) for part in path.relative_to(ROOT).with_suffix("").parts)
        ]
    )


def suffix(node: ast.AST) -> str | None:
    """Return the dimensions that a name ends in: "BTD" for x_BTD and cache.x_BTD; None without."""
    name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")
    match = re.fullmatch(r"_*[a-z][a-z0-9_]*_((?:[A-Z]1?)+)", name)
    return match and match[1]


def einsum_problems(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield each `einsum` whose subscripts are not the letters of its arrays."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            call, target = node.value, node.targets[0]
        elif isinstance(node, ast.Call):
            call, target = node, None
        else:
            continue
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "einsum"):
            continue
        subscripts = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
        if not isinstance(subscripts, str) or "->" not in subscripts:
            yield node, "write the subscripts out, as in 'btd,df->btf'"
            continue
        left, right = subscripts.upper().split("->")
        if target is not None:
            arrays, letters = [target], [right]
        else:
            arrays, letters = list(call.args[1:]), left.split(",")
        for array, dims in zip(arrays, letters, strict=True):
            if isinstance(array, ast.Name | ast.Attribute) and suffix(array) != dims:
                yield node, f"{ast.unparse(array)} stands where the subscripts say {dims}"


def shard_problems(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield each `shard(x_BTD, "BTD")` whose letters differ from the array's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            array, dims = node.args
            written = dims.value if isinstance(dims, ast.Constant) else None
            if node.func.id == "shard" and written and suffix(array) not in (None, written):
                yield node, f"{ast.unparse(array)} is sharded as {written!r}"


@functools.cache
def alphabet() -> frozenset[str]:
    """Return the letters that the legend at the top of `sharding` gives a meaning."""
    legend = ast.get_docstring(parse(PACKAGE / "sharding.py")) or ""
    return frozenset(re.findall(r"(?<!\S)([A-Z])  \w", legend))


def alphabet_problems(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield each array suffix with a letter that names no dimension."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.arg):
            named = ast.Name(node.arg) if isinstance(node, ast.arg) else node
            unknown = set(suffix(named) or "") - alphabet() - {"1"}
            if unknown:
                yield (
                    node,
                    f"{ast.unparse(named)}: {sorted(unknown)} are not in sharding.py's alphabet",
                )


def test_subscripts_and_shardings_use_the_letters_of_the_arrays() -> None:
    report(
        [
            f"{where(path, node)}: {problem}"
            for path in python_files()
            for check in (einsum_problems, shard_problems, alphabet_problems)
            for node, problem in check(parse(path))
        ]
    )


@pytest.mark.parametrize(
    "line",
    [
        'y_BTF = jnp.einsum("btd,df->btv", x_BTD, w_DF)',
        'y_BTF = jnp.einsum("btd,fd->btf", x_BTD, w_DF)',
        'y_BTF = jnp.einsum("btd,df->btf", x, w_DF)',
        'y_BTF = jnp.einsum("btd,df->btf", state.x_BTF, w_DF)',
        "y_BTF = jnp.einsum(subscripts, x_BTD, w_DF)",
        'y_BTD = shard(x_BTD, "BTH")',
        "def scale(x_BQD): ...",
    ],
)
def test_a_wrong_letter_is_found(line: str) -> None:
    tree = ast.parse(line)
    assert [*einsum_problems(tree), *shard_problems(tree), *alphabet_problems(tree)]


def test_right_letters_pass() -> None:
    line = 'y_BTF = shard(jnp.einsum("btd,df->btf", x_BTD, self.w_DF), "BTF"); T1 = MAX_T'
    tree = ast.parse(line)
    assert not [*einsum_problems(tree), *shard_problems(tree), *alphabet_problems(tree)]


def swallows(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler catches everything and lets nobody know."""
    broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
    return broad and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def test_no_error_is_swallowed() -> None:
    report(
        [
            f"{where(path, node)}: name the exceptions expected, or raise with what is known"
            for path in python_files()
            for node in ast.walk(parse(path))
            if isinstance(node, ast.ExceptHandler) and swallows(node)
        ]
    )


@pytest.mark.parametrize(
    ("handler", "bad"),
    [
        ("except: pass", True),
        ("except Exception: log.warning('lost')", True),
        ("except Exception as error: raise ValueError('host 3') from error", False),
        ("except OSError: pass", False),
    ],
)
def test_a_swallowed_error_is_found(handler: str, bad: bool) -> None:
    tree = ast.parse(f"try: f()\n{handler}")
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert swallows(handlers[0]) is bad


def test_the_library_does_not_print() -> None:
    report(
        [
            f"{where(path, node)}: use logging; only scripts print"
            for path in library_files()
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
    )


def test_no_file_names_a_machine_or_a_registry() -> None:
    from pip._internal.models.index import PyPI  # the host is looked up, not written down

    folders = "|".join(("home", "root", "Users", "work", "farm"))
    machine = re.compile(rf"(?<![\w./*-])/(?:{folders})/\w|{re.escape(PyPI.netloc)}")
    problems = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data:
            for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
                if found := machine.search(line):
                    problems.append(f"{where(path)}:{number}: {found[0]!r}")
    report(problems)
