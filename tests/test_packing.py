from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from original_data import FOLDER

from mesh_transformer.data import packing


def documents(lengths: list[int], begin: int = 0) -> packing.Documents:
    """Documents of these lengths, holding the numbers 0, 1, 2, ..."""
    return packing.Documents(
        np.arange(begin, begin + sum(lengths)), np.cumsum(lengths, dtype=np.int64)
    )


def lists(passes: list[packing.Pass]) -> list[list[list[int]]]:
    return [[sequence.tolist() for sequence in one] for one in passes]


CASES = json.loads((FOLDER / "arrays_to_sequences.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[str(case["lens"]) for case in CASES])
def test_sequences_and_trailing_tokens_are_the_originals(case: dict[str, Any]) -> None:
    length = case["sequence_length"]
    (one,) = packing.passes(documents(case["lens"]), length, 1, None)
    full = [sequence for sequence in case["out"] if len(sequence) == length]
    # The original takes a last sequence that is full for trailing tokens; it is kept here.
    assert lists([one])[0] == full
    assert one.n_trailing == sum(case["lens"]) - length * len(full)


def reference(
    texts: list[list[int]], length: int, n_passes: int, rng: random.Random | None
) -> list[list[list[int]]]:
    """Pack by lists, as plainly as can be."""
    texts, passes = list(texts), []
    for _ in range(n_passes):
        if rng:
            rng.shuffle(texts)
        chain = [token for text in texts for token in text]
        end = len(chain) // length * length
        sequences = [chain[i : i + length] for i in range(0, end, length)]
        if rng:
            rng.shuffle(sequences)
        else:
            texts = [chain[end:], chain[:end]]
        passes.append(sequences)
    return passes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shuffle", [True, False])
def test_packing_equals_the_plain_way(seed: int, shuffle: bool) -> None:
    choose = random.Random(seed)
    lengths = [choose.randint(1, 12) for _ in range(choose.randint(1, 30))]
    length = choose.randint(1, 9)
    packed = documents(lengths)
    texts = [part.tolist() for part in np.split(packed.tokens[:], packed.ends[:-1])]
    rng = (random.Random(seed), random.Random(seed)) if shuffle else (None, None)
    passes = list(packing.passes(packed, length, 3, rng[0]))
    assert lists(passes) == reference(texts, length, 3, rng[1])
    if sum(lengths) >= length:
        assert [len(one) for one in passes] == [sum(lengths) // length] * 3


def test_every_pass_without_shuffling_begins_with_what_the_last_one_left_out() -> None:
    passes = lists(list(packing.passes(documents([4, 3]), 3, 3, None)))
    assert passes == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 0, 1], [2, 3, 4]],
        [[5, 6, 0], [1, 2, 3]],
    ]


def test_a_filter_leaves_out_sequences_of_each_pass_on_its_own() -> None:
    """What one pass leaves out is there again in the next, and the cuts do not depend on it."""
    passes = list(packing.passes(documents([4, 3]), 3, 3, None, keep=lambda s: 0 not in s))
    assert lists(passes) == [[[3, 4, 5]], [[2, 3, 4]], [[1, 2, 3]]]
    assert [(one.n_excluded, one.n_trailing) for one in passes] == [(1, 1)] * 3


def test_shuffled_passes_differ_and_hold_every_document() -> None:
    packed = documents([10] * 50)
    first, second = packing.passes(packed, 10, 2, random.Random(0))
    flat = [np.concatenate(list(one)).tolist() for one in (first, second)]
    assert flat[0] != flat[1] and sorted(flat[0]) == sorted(flat[1]) == list(range(500))


def test_nothing_gives_nothing() -> None:
    empty = packing.Documents(np.empty(0, np.uint16), np.empty(0, np.int64))
    for rng in (None, random.Random(0)):
        (one,) = packing.passes(empty, 5, 1, rng)
        assert len(one) == 0 and list(one) == [] and one.n_trailing == 0
