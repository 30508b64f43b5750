"""Rows of keys that are not translated one by one: rotary positions, windows, OPT's norms."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from mesh_transformer.checkpoints.family import Derived, Json, Size, as_json, number, shown
from mesh_transformer.config import ModelConfig
from mesh_transformer.position_rules import FURTHER_FACTORS, SCALING_FACTORS

_WINDOW = "window window_every"
_TRAINED, _PART = "original_max_position_embeddings", "partial_rotary_factor"


def rotary(
    theta: str = "rope_theta", part: str | None = None, usual_theta: float = 10_000.0
) -> Derived:
    """Return the row of rotary positions.

    Releases of `transformers` before 5 write keys of the family's own and `rope_scaling`, later
    ones all of it as `rope_parameters`. The older form is written, which all of them read.

    Args:
        theta: Key of the wavelengths' base.
        part: Key of the part of a head's features that is turned; None: all are.
        usual_theta: What theta is if it is absent.
    """
    ours = "pe_theta pe_scaling pe_scaling_factors" + (" pe_rotary_dims" if part else "")
    return Derived(
        ours,
        functools.partial(_read_rotary, theta, part, usual_theta),
        functools.partial(_write_rotary, theta, part),
    )


def _read_rotary(theta: str, part: str | None, usual: float, config: Json, keys: Json) -> Json:
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{name} is {shown(config, name)}; needed is an object or null")
    parameters = _of_all_layers(config.get("rope_parameters") or {})
    given = {**(config.get("rope_scaling") or {}), **parameters}
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in list(SCALING_FACTORS):  # a list, of what may not be hashed
        where = "rope_parameters" if parameters else "rope_scaling"
        listed = ", ".join(map(as_json, SCALING_FACTORS)).replace('"none"', '"default"')
        raise ValueError(f"{where} has rope_type {as_json(kind)}; computed here: {listed}")
    bases = {**config, theta: given["rope_theta"]} if "rope_theta" in given else config
    result: dict[str, Any] = {"pe_theta": number(bases, theta, usual), "pe_scaling": scaling}
    result["pe_scaling_factors"] = _factors(scaling, given, config)
    outside = config.get(_PART)
    fraction = given.get(_PART, 1.0 if outside is None else outside)
    if part is None and fraction != 1:
        raise ValueError(f"{_PART} is {as_json(fraction)}; all of a head is turned")
    if part is not None and {"d_model", "n_heads"} <= keys.keys():
        fraction = given[_PART] if _PART in given else config.get(part, 0.25)
        if outside not in (None, fraction):
            raise ValueError(
                f"{_PART} is {as_json(outside)}, but {as_json(fraction)} is what {part} or "
                "rope_parameters say; take one of them away"
            )
        fraction = number({part: fraction}, part, 0.25)
        result["pe_rotary_dims"] = int(keys["d_model"] // keys["n_heads"] * fraction)
    return result


def _of_all_layers(parameters: Json) -> Json:
    """Return what is said of all layers, where each kind of layer has parameters of its own."""
    if not any(isinstance(it, dict) for it in parameters.values()):
        return parameters
    by_kind = [it for it in parameters.values() if it is not None]
    if any(it != by_kind[0] for it in by_kind):
        raise ValueError(
            f"rope_parameters is {as_json(parameters)}; all layers' positions are computed alike "
            "here"
        )
    return dict(by_kind[0])


def _factors(scaling: str, given: Json, config: Json) -> dict[str, float]:
    """Return by how much positions are stretched, with what follows from other keys."""
    trained = config.get(_TRAINED, given.get(_TRAINED, config.get("max_position_embeddings")))
    given = {**given, _TRAINED: trained}
    if scaling == "yarn" and "factor" in given and given["factor"] is None:
        longest = number(config, "max_position_embeddings", 0)
        given = {**given, "factor": longest / number(given, _TRAINED, 0)}
    names = [*SCALING_FACTORS[scaling], *FURTHER_FACTORS.get(scaling, ())]
    factors = {name: number(given, name, 0) for name in names if given.get(name) is not None}
    for name in SCALING_FACTORS[scaling]:
        if name not in factors:
            raise ValueError(f"{scaling} positions lack {name}")
    if scaling == "yarn":
        if given.get("truncate", True) is not True:
            raise ValueError(f"truncate is {shown(given, 'truncate')}; YaRN is computed with true")
        whole, part = given.get("mscale"), given.get("mscale_all_dim")
        if whole and part and "attention_factor" not in factors:
            growth = math.log(max(factors["factor"], 1.0))
            size, size_of_part = (0.1 * scale * growth + 1 for scale in (whole, part))
            factors["attention_factor"] = size / size_of_part
    return factors


def _write_rotary(theta: str, part: str | None, model: ModelConfig) -> Json:
    written: dict[str, Any] = {theta: model.pe_theta, "rope_scaling": None}
    if model.pe_scaling != "none":
        # "type" is what releases before 4.43 read.
        names = {"rope_type": model.pe_scaling, "type": model.pe_scaling}
        written["rope_scaling"] = names | dict(model.pe_scaling_factors)
        if _TRAINED in model.pe_scaling_factors:
            trained = model.pe_scaling_factors[_TRAINED]
            written["rope_scaling"][_TRAINED] = int(trained) if trained % 1 == 0 else trained
    if part is not None:
        fraction = model.pe_rotary_dims / model.d_head
        exact = int(model.d_head * fraction) == model.pe_rotary_dims
        written[part] = fraction if exact else math.nextafter(fraction, 1)
    return written


def _every(is_local: Sequence[bool], window: int, what: str) -> Json:
    """Return our keys of a window that some layers have."""
    if not any(is_local):
        return {"window": 0, "window_every": 1}
    every = is_local.index(True) + 1
    if list(is_local) != [i % every == 0 for i in range(1, len(is_local) + 1)]:
        raise ValueError(f"{what} has local layers that are not every n-th one; computed here are")
    return {"window": window, "window_every": every}


def _read_mistral_window(config: Json, keys: Json) -> Json:
    window = config.get("sliding_window", 4096)
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {as_json(window)}; needed is a whole number or null")
    kinds, kind = config.get("layer_types"), "sliding_attention" if window else "full_attention"
    n_layers, seq = keys.get("layers", 0), keys.get("seq", 0)
    if window and window >= seq and kinds == ["full_attention"] * n_layers:
        return {"window": 0, "window_every": 1}  # which is wide enough for all that there is
    if kinds is not None and kinds != [kind] * n_layers:
        raise ValueError(f"layer_types is {as_json(kinds)}; all layers are computed alike here")
    return {"window": window or 0, "window_every": 1}


MISTRAL_WINDOW = Derived(
    _WINDOW, _read_mistral_window, lambda model: {"sliding_window": model.window or None}
)


def _read_qwen_window(config: Json, keys: Json) -> Json:
    n_layers, window = keys.get("layers", 0), config.get("sliding_window", 4096)
    if config.get("use_sliding_window", False) is not True or window is None:
        return {"window": 0, "window_every": 1}
    if type(window) is not int or window < 1:
        raise ValueError(f"sliding_window is {as_json(window)}; needed is a whole number or null")
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types")
    if kinds is None:
        if type(first) is not int:
            raise ValueError(f"max_window_layers is {as_json(first)}; needed is a whole number")
        return _every([i >= first for i in range(n_layers)], window, "max_window_layers")
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise ValueError(f"layer_types is {as_json(kinds)}; needed is one for each of {n_layers}")
    return _every([kind == "sliding_attention" for kind in kinds], window, "layer_types")


def _write_qwen_window(model: ModelConfig) -> Json:
    numbers = range(1, model.layers + 1)
    is_local = [bool(model.window) and i % model.window_every == 0 for i in numbers]
    return {
        "use_sliding_window": any(is_local),
        "sliding_window": model.window or None,
        "max_window_layers": is_local.index(True) if any(is_local) else model.layers,
        "layer_types": [f"{'sliding' if local else 'full'}_attention" for local in is_local],
    }


QWEN_WINDOW = Derived(_WINDOW, _read_qwen_window, _write_qwen_window)


def _read_neo_window(config: Json, keys: Json) -> Json:
    types = config.get("attention_types", [[["global", "local"], 12]])
    try:
        kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    except (TypeError, ValueError):
        kinds = []
    n_layers = keys.get("layers", len(kinds))
    if not all(it in ("global", "local") for it in kinds) or len(kinds) != n_layers:
        raise ValueError(
            f"attention_types is {shown(config, 'attention_types')}; needed is global or local for "
            f"each of {n_layers} layers"
        )
    window = int(number(config, "window_size", 256))
    return _every([kind == "local" for kind in kinds], window, "attention_types")


def _write_neo_window(model: ModelConfig) -> Json:
    if not model.window:
        return {"attention_types": [[["global"], model.layers]], "window_size": 256}
    times, rest = divmod(model.layers, model.window_every)
    pattern = ["global"] * (model.window_every - 1) + ["local"]
    types = [[pattern, times], [["global"], rest]]
    return {"attention_types": [it for it in types if it[1]], "window_size": model.window}


NEO_WINDOW = Derived(_WINDOW, _read_neo_window, _write_neo_window)


def _read_opt_norms(config: Json, keys: Json) -> Json:
    before = config.get("do_layer_norm_before", True)
    removed = config.get("_remove_final_layer_norm", False)
    for name in ("do_layer_norm_before", "_remove_final_layer_norm"):
        if name in config and type(config[name]) is not bool:
            raise ValueError(f"{name} is {shown(config, name)}; needed is true or false")
    residual = "sequential" if before else "post-norm"
    return {"residual": residual, "final_norm": before and not removed}


def _write_opt_norms(model: ModelConfig) -> Json:
    if model.residual not in ("sequential", "post-norm"):
        raise ValueError(
            f"residual is {model.residual!r}; {{}} has 'sequential' or, without a final norm, "
            "'post-norm'"
        )
    before = model.residual == "sequential"
    return {
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not model.final_norm,
    }


OPT_NORMS = Derived("residual final_norm", _read_opt_norms, _write_opt_norms)


def _read_head_dim(config: Json, keys: Json) -> Json:
    return Size("head_dim", "d_head", nullable=True).read(config, keys)


def _write_head_dim(model: ModelConfig) -> Json:
    return {} if model.d_head * model.n_heads == model.d_model else {"head_dim": model.d_head}


HEAD_DIM = Derived("d_head", _read_head_dim, _write_head_dim)
"""Of families that read the key where it is there, and take no null."""


def _read_root_scale(config: Json, keys: Json) -> Json:
    return {"embed_scale": keys["d_model"] ** 0.5} if "d_model" in keys else {}


ROOT_SCALE = Derived("embed_scale", _read_root_scale, lambda model: {})
"""Embeddings are multiplied by the root of their number of features."""
