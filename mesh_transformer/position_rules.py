"""What the keys of position encodings must satisfy together, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from mesh_transformer.relations import Rule, unless
from mesh_transformer.schema import did_you_mean

# What each stretching of rotary positions needs to be told, as Hugging Face names it, and what else
# it takes.
SCALING_FACTORS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_TURNS = {"beta_slow": 1.0, "beta_fast": 32.0}  # unless they are given
FURTHER_FACTORS = {"yarn": ("attention_factor", *YARN_TURNS)}

_BELOW = (("llama3", "low_freq_factor", "high_freq_factor"), ("yarn", "beta_slow", "beta_fast"))


def _unknown(pe_scaling: str, pe_scaling_factors: Mapping[str, float]) -> str | None:
    taken = [*SCALING_FACTORS[pe_scaling], *FURTHER_FACTORS.get(pe_scaling, ())]
    unknown = [name for name in pe_scaling_factors if name not in taken]
    if unknown and not taken:
        return (
            f"pe_scaling_factors has {', '.join(unknown)}, and pe_scaling is {pe_scaling!r}, which "
            "takes none; set pe_scaling, or leave pe_scaling_factors out"
        )
    hints = [f"{name}{did_you_mean(name, taken)}" for name in unknown]
    return unless(
        not unknown,
        f"pe_scaling {pe_scaling!r} takes pe_scaling_factors {', '.join(taken)}, not "
        f"{', not '.join(hints)}",
    )


def _too_small(pe_scaling_factors: Mapping[str, float]) -> str | None:
    small = [f"{name} {value}" for name, value in pe_scaling_factors.items() if value <= 0]
    return unless(
        not small,
        f"pe_scaling_factors has {' and '.join(small)}; each must be a number above 0",
    )


def _in_order(pe_scaling: str, pe_scaling_factors: Mapping[str, float]) -> str | None:
    given = {**YARN_TURNS, **pe_scaling_factors}
    for scaling, low, high in _BELOW:
        if scaling != pe_scaling or not {low, high} <= given.keys():
            continue
        least, most = given[low], given[high]
        if least >= most:
            return (
                f"pe_scaling_factors has {low} {least} and {high} {most}, between which "
                f"{scaling!r} stretches little by little; {low} must be the lower one"
            )
    return None


POSITION_RULES: tuple[Rule, ...] = (
    _unknown,
    _too_small,
    _in_order,
    lambda pe, pe_rotary_dims, d_head: unless(
        not pe.startswith("rotary") or (2 <= pe_rotary_dims <= d_head and pe_rotary_dims % 2 == 0),
        f"pe_rotary_dims {pe_rotary_dims} must be an even number from 2 to d_head {d_head}, "
        "since rotary positions turn pairs of features within a head",
    ),
    lambda pe_scaling, pe_scaling_factors: unless(
        set(SCALING_FACTORS[pe_scaling]) <= set(pe_scaling_factors),
        f"pe_scaling {pe_scaling!r} needs pe_scaling_factors with "
        f"{', '.join(SCALING_FACTORS[pe_scaling])}",
    ),
    lambda pe, pe_offset: unless(
        pe == "fixed" or pe_offset == 0,
        f"pe_offset {pe_offset} is of the table that pe 'fixed' has, and pe is {pe!r}; leave "
        "pe_offset out",
    ),
    lambda pe, pe_buckets, pe_max_distance: unless(
        pe == "t5" or (pe_buckets, pe_max_distance) == (32, 128),
        f"pe_buckets {pe_buckets} and pe_max_distance {pe_max_distance} are of pe 't5', and pe is "
        f"{pe!r}; leave them out",
    ),
    lambda pe, pe_theta: unless(
        pe.startswith("rotary") or pe_theta == 10_000,
        f"pe_theta {pe_theta} is of rotary positions, and pe is {pe!r}; leave pe_theta out",
    ),
    lambda pe, pe_scaling: unless(
        pe.startswith("rotary") or pe_scaling == "none",
        f"pe_scaling {pe_scaling!r} is of rotary positions, and pe is {pe!r}; leave pe_scaling out",
    ),
    lambda pe_scaling, pe_theta: unless(
        pe_scaling != "yarn" or pe_theta > 1,
        f"pe_scaling 'yarn' finds pairs of features by their wavelengths, which pe_theta {pe_theta}"
        " does not make grow; raise pe_theta above 1",
    ),
)
