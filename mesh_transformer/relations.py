"""Rules that relate several keys of a configuration, and how they are applied.

Every rule names the keys that it relates as its parameters. That is how it is known when it can
run: when all of them are given and each is sound by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Rule = Callable[..., str | None]


@functools.cache
def _parameters(rule: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(rule).parameters.values())


def apply(rule: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call `rule` with the keys that it names, or with all if it takes any (`**keys`).

    Returns None if one that it needs is absent.
    """
    named = [p for p in _parameters(rule) if p.kind is not p.VAR_KEYWORD]
    if any(p.default is p.empty and p.name not in values for p in named):
        return None
    if len(named) < len(_parameters(rule)):
        return rule(**values)
    return rule(**{p.name: values[p.name] for p in named if p.name in values})


def broken(table: Iterable[Rule], values: Mapping[str, Any]) -> list[str]:
    """What the rules of a table have to say against `values`."""
    return [text for rule in table if (text := apply(rule, values)) is not None]


def unless(holds: bool, problem: str) -> str | None:
    """Return the problem, unless all is well."""
    return None if holds else problem


def divisors(number: int) -> str:
    """List the numbers that divide one, as messages offer them."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def next_multiple(number: int, unit: int) -> int:
    """Return the least multiple of a unit that is not below a number."""
    return number + -number % unit
