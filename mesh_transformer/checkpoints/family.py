"""What a family of `transformers` is described by: rows of arrays and rows of keys.

A row of keys translates a part of a config.json into keys of our configuration by `read`, and back
by `write`; what it cannot translate it refuses by a `ValueError` that says so.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from mesh_transformer import relations, rules
from mesh_transformer.config import ModelConfig

Json = Mapping[str, Any]


class Row(NamedTuple):
    """An array, which is in a checkpoint if what it holds of ours is in our model.

    Attributes:
        theirs: Name in the family; {} is the layer's number.
        ours: Path below "decoder/", or below "encoder/" with that before it; "[qkv]" in it stands
            for three arrays in one: those of queries, of keys and of values, one beside the other
            along the features that they make.
        transposed: Whether theirs is `[n_out, n_in]`, as PyTorch's linear layers are.
        by_head: Of three in one: whether each head's three stand together.
        pairs: Of queries and keys: whether the features that are turned together are neighbours,
            where ours, of "rotary-half", are half a head apart.
        gated: Whether it is of models with a gate (`gated`), or of those without; None: of both.
    """

    theirs: str
    ours: str
    transposed: bool = False
    by_head: bool = False
    pairs: bool = False
    gated: bool | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of our arrays that it holds, in order."""
        several = re.search(r"\[(\w+)\]", self.ours)
        names = several[1] if several else "-"
        ours = self.ours if self.ours.startswith("encoder/") else f"decoder/{self.ours}"
        return tuple(re.sub(r"\[\w+\]", name, ours) for name in names)


class Keys(Protocol):
    """A row of keys."""

    @property
    def ours(self) -> str:
        """The keys of our configuration that it speaks of, with a space between."""
        ...

    def read(self, config: Json, keys: Json) -> Json:
        """Translate theirs.

        Args:
            config: A config.json.
            keys: What rows before this one have made of it.

        Raises:
            ValueError: This library does not compute what it says.
        """
        ...

    def write(self, model: ModelConfig) -> Json:
        """Translate ours.

        Raises:
            ValueError: The family does not have what it says.
        """
        ...


class Size(NamedTuple):
    """A whole number.

    Attributes:
        theirs: Key of config.json.
        ours: The key of our configuration.
        nullable: Whether it may be null or absent, which means what our key means when left out.
        default: What it is if it is absent; None: it must be there.
        also: Names that it has in older files.
    """

    theirs: str
    ours: str
    nullable: bool = False
    default: int | None = None
    also: tuple[str, ...] = ()

    def read(self, config: Json, keys: Json) -> Json:
        name = next((it for it in (self.theirs, *self.also) if it in config), self.theirs)
        value = config.get(name, self.default)
        if type(value) is int and value > 0:
            return {self.ours: value}
        if value is None and self.nullable:
            return {}
        raise ValueError(f"{name} is {shown(config, name)}; needed is a whole number above 0")

    def write(self, model: ModelConfig) -> Json:
        value = getattr(model, self.ours)
        usual = self.nullable and value == relations.apply(rules.DERIVED[self.ours], vars(model))
        return {self.theirs: None if usual else value}


class Number(NamedTuple):
    """A number above 0.

    Attributes:
        default: What it is if it is absent.
    """

    theirs: str
    ours: str
    default: float

    def read(self, config: Json, keys: Json) -> Json:
        return {self.ours: number(config, self.theirs, self.default)}

    def write(self, model: ModelConfig) -> Json:
        return {self.theirs: getattr(model, self.ours)}


class Choice(NamedTuple):
    """One of several values.

    Attributes:
        ours: The key of our configuration, or several with a space between, which are all alike.
        values: What ours is for each value of theirs; the first of those that mean the same is
            the one that is written.
        default: What theirs is if it is absent.
    """

    theirs: str
    ours: str
    values: Mapping[Any, Any]
    default: Any

    def read(self, config: Json, keys: Json) -> Json:
        value = config.get(self.theirs, self.default)
        for theirs, ours in self.values.items():
            if type(theirs) is type(value) and theirs == value:  # 1 is not true
                return dict.fromkeys(self.ours.split(), ours)
        listed = ", ".join(map(as_json, self.values))
        raise ValueError(f"{self.theirs} is {shown(config, self.theirs)}; computed here: {listed}")

    def write(self, model: ModelConfig) -> Json:
        names = self.ours.split()
        ours = {name: getattr(model, name) for name in names}
        for theirs, value in self.values.items():
            if all(it == value for it in ours.values()):
                return {self.theirs: theirs}
        held = " and ".join(f"{name} is {value!r}" for name, value in ours.items())
        listed = ", ".join(sorted({repr(value) for value in self.values.values()}))
        raise ValueError(f"{held}; {{}} has {listed}{' for all of them' if names[1:] else ''}")


class Derived(NamedTuple):
    """Keys that are not translated one by one, by functions that do what `Keys` says."""

    ours: str
    read: Callable[[Json, Json], Json]
    write: Callable[[ModelConfig], Json]


BOOLEAN = {False: False, True: True}

ACTIVATIONS = {
    **{"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"},
    **{"gelu_python_tanh": "gelu_new", "gelu_accurate": "gelu_new"},
    **{"gelu": "gelu", "gelu_python": "gelu", "quick_gelu": "quick_gelu"},
    **{"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu_squared"},
    **{"mish": "mish", "sigmoid": "sigmoid", "tanh": "tanh"},
}
"""The tanh approximation has many names: the rounding of its constants is all that differs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
        name: For people.
        model_type: Of config.json.
        architecture: Class in `transformers`.
        prefix: Of the names of all arrays but the head's; files may lack it.
        keys: What differs from model to model.
        same: Keys of config.json that must have these values, which they also have if absent.
        ours: Keys of our configuration that must have these values. Those that neither this nor
            `keys` speaks of must be as they are when left out.
        also: What else config.json says when it is written, and nothing depends on.
        begin_id: The token that begins a text in the published models; None: there is none.
        eot_id: The token that ends one.
        rows: Its arrays.
        constants: A regular expression of what weights' files may hold beside them, computed anew
            by whoever reads it.
    """

    name: str
    model_type: str
    architecture: str
    prefix: str
    keys: tuple[Keys, ...]
    same: Json
    ours: Json
    also: Json
    begin_id: int | None
    eot_id: int
    rows: tuple[Row, ...]
    constants: str


USUAL_SIZES = (
    Size("vocab_size", "n_vocab"),
    Size("max_position_embeddings", "seq"),
    Size("hidden_size", "d_model"),
    Size("num_hidden_layers", "layers"),
    Size("num_attention_heads", "n_heads"),
)
"""By the names that `transformers` came to agree on."""

HEAD = Row("lm_head.weight", "unembed/w", transposed=True)


def tied(default: bool) -> Choice:
    """Return the row of keys that says whether the head is the embeddings."""
    return Choice("tie_word_embeddings", "tie_embeddings", BOOLEAN, default)


def pair(theirs: str, ours: str, *, by_head: bool = False) -> tuple[Row, Row]:
    """Return the weight and the bias of one of PyTorch's linear layers."""
    weight = Row(f"{theirs}.weight", f"{ours}/w", transposed=True, by_head=by_head)
    return weight, Row(f"{theirs}.bias", f"{ours}/b", by_head=by_head)


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/offset")


def conv(theirs: str, ours: str) -> tuple[Row, Row]:
    """Return the weight and the bias of one of GPT-2's layers, whose weights are as ours."""
    return Row(f"{theirs}.weight", f"{ours}/w"), Row(f"{theirs}.bias", f"{ours}/b")


def number(config: Json, name: str, default: float) -> float:
    """Return a number above 0.

    Raises:
        ValueError: It is none.
    """
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {shown(config, name)}; needed is a number above 0")
    return float(value)


def shown(config: Json, key: str) -> str:
    return as_json(config[key]) if key in config else "absent"


def as_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
