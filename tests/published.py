"""Published models of transformers: their config.json and how many parameters they have.

A model of which only the size differs from another's is said by what differs from that one, which
it is `like`. Tied heads are counted once, as in the files of weights.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

_LISTED: dict[str, Any] = json.loads(
    (pathlib.Path(__file__).parent / "data" / "published_models.json").read_text()
)


def published(name: str, **changed: Any) -> dict[str, Any]:
    """Return a published model's config.json, with some keys changed."""
    listed = _LISTED[name]
    like = published(listed["like"]) if "like" in listed else {}
    return {**like, **listed["config"], **changed}


N_PARAMETERS: dict[str, int] = {name: it["n_parameters"] for name, it in _LISTED.items()}
