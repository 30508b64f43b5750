"""Plain values against annotated types, and JSON or YAML files read without losing a repeated key.

Nothing is coerced: 28 is not "28", true is not 1, and only a whole number may stand for a float.
This module knows no key of any configuration; `config` does.
"""

from __future__ import annotations

import collections
import difflib
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from mesh_transformer.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot run; `problems` holds every reason, one sentence each."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source, self.problems = source, tuple(problems)
        super().__init__(source, self.problems)

    def __str__(self) -> str:
        heading = f"{self.source}: {len(self.problems)} problem(s)"
        return "\n  - ".join((heading, *self.problems))


class ConfigWarning(UserWarning):
    """A configuration that runs, but perhaps not as its author thinks."""


class Limit(NamedTuple):
    """What a value must satisfy beyond its type, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Limit(lambda n: n >= 1, "1 or more")]
Natural = Annotated[int, Limit(lambda n: n >= 0, "0 or more")]
Positive = Annotated[float, Limit(lambda x: x > 0, "a number above 0")]
NonNegative = Annotated[float, Limit(lambda x: x >= 0, "0 or more")]
Fraction = Annotated[float, Limit(lambda x: 0 < x <= 1, "a number above 0 and at most 1")]
Rate = Annotated[float, Limit(lambda x: 0 <= x < 1, "0 or more, below 1")]
Text = Annotated[str, Limit(lambda text: text.strip() != "", "some text")]


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


TpuType = Annotated[
    str, Limit(_matches(r"[a-z][a-z0-9]*-[1-9][0-9]*"), "an accelerator type such as 'v3-8'")
]
LabelKey = Annotated[
    str,
    Limit(
        _matches(r"[a-z][a-z0-9_-]{0,62}"),
        "a label of a small letter, then small letters, digits, - and _, 63 in all at most",
    ),
]
LabelValue = Annotated[
    str,
    Limit(
        _matches(r"[a-z0-9_-]{0,63}"),
        "a label's value of small letters, digits, - and _, 63 in all at most",
    ),
]

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: 'an object of names and values such as {"name": "path"}',
}


def convert(kind: Any, value: Any) -> Any:
    """Return `value` as the annotated type `kind`, lists as tuples and whole numbers as floats.

    Raises:
        ValueError: `value` is of another type or beyond a limit; the text has no name of a key.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = convert(args[0], value)
        for limit in args[1:]:
            if not limit.holds(value):
                raise ValueError(f"expected {limit.words}, got {value!r}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else convert(args[0], value)
    if origin is Literal:
        return _choose(args, value)
    if origin is tuple and args[-1] is not Ellipsis:
        items = _expect(list, value, (list, tuple))
        if len(items) != len(args):
            raise ValueError(f"expected a list of {len(args)}, got {shown(value)}")
        return tuple(map(convert, args, items))
    if origin is tuple:
        items = tuple(convert(args[0], item) for item in _expect(list, value, (list, tuple)))
        for item in repeated(items):
            raise ValueError(f"{item!r} is listed more than once")
        return items
    if origin is collections.abc.Mapping:
        pairs = _expect(dict, value, (Mapping,)).items()
        return {convert(args[0], name): convert(args[1], item) for name, item in pairs}
    if kind is float:
        number = float(_expect(float, value, (float, int)))
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number, got {number}")
        return number
    return _expect(kind, value, (kind,))


def _expect(kind: type, value: Any, accepted: tuple[type, ...]) -> Any:
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        return value
    of_type = "" if value is None or isinstance(value, bool) else f" ({type(value).__name__})"
    hint = _number_hint(value, whole=kind is int) if kind in (int, float) else ""
    raise ValueError(f"expected {_WORDS[kind]}, got {shown(value)}{of_type}{hint}")


def shown(value: Any) -> str:
    """A value as its author wrote it."""
    for word, constant in (("null", None), ("true", True), ("false", False)):
        if value is constant:
            return word
    return repr(value)


def _number_hint(value: Any, *, whole: bool) -> str:
    """What to write instead of a number in quotes, with a fraction, or that YAML takes for text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number) or (whole and not number.is_integer()):
        return ""
    plain = str(int(number) if whole else number)
    if "e" in plain and "." not in plain:
        plain = plain.replace("e", ".0e")  # YAML takes 1e-05 for text
    if not isinstance(value, str):
        return f"; write {plain}"
    bare = "e" in value.lower() and "." not in value
    why = f" (YAML takes {value} for text: it lacks a dot)" if bare else ""
    return f"; write {plain} without quotes{why}"


def _choose(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value
    names = {str(choice): choice for choice in choices}
    hints = [f"; did you mean {names[name]!r}?" for name in closest(value, names)]
    listed = ", ".join(map(repr, choices))
    raise ValueError(f"{shown(value)} is not one of {listed}{''.join(hints)}")


def closest(name: Any, names: Iterable[str]) -> list[str]:
    """The one of `names` that `name` may be a slip of; empty if none is close."""
    return difflib.get_close_matches(str(name).lower(), list(names), n=1)


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """The end of a sentence that offers the closest of `names`; empty if none is close."""
    return "".join(f"; did you mean {match!r}?" for match in closest(name, names))


def repeated(names: Iterable[Any]) -> list[Any]:
    """Those of `names` that occur more than once, in order."""
    return [name for name, count in collections.Counter(names).items() if count > 1]


def read_file(path: pathlib.Path) -> tuple[Any, list[str]]:
    """Read a .json, .yaml or .yml file: its value, and the keys that an object in it repeats.

    Raises:
        ConfigError: there is no such file, or it cannot be parsed.
    """
    readers = {".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(str(path), [f"expected a name that ends in {', '.join(readers)}"])
    try:
        return reader(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        siblings = sorted(item.name for item in path.parent.glob("*"))
        hint = did_you_mean(path.name, siblings)
        raise ConfigError(str(path), [f"there is no such file{hint}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise ConfigError(str(path), [" ".join(str(error).split())]) from error


def _parse_json(text: str) -> tuple[Any, list[str]]:
    repeats: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeats.extend(repeated(key for key, _ in pairs))
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=collect), repeats
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _parse_yaml(text: str) -> tuple[Any, list[str]]:
    try:
        import yaml  # only here: a JSON file needs nothing beyond the standard library
    except ImportError as error:
        raise ValueError("YAML needs the package pyyaml; install it, or write JSON") from error

    repeats: list[str] = []

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            repeats.extend(key for key in repeated(keys) if key != "<<")
            return super().construct_mapping(node, deep=deep)

    try:
        return yaml.load(text, Loader=Loader), repeats
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
