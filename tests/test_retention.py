"""Which checkpoints a run keeps."""

import pytest

from mesh_transformer.checkpoints.retention import superseded


def test_the_newest_n_are_kept():
    assert superseded([10, 20, 30, 40, 50], keep_n=3, keep_every=None) == [10, 20]


def test_fewer_than_n_are_all_kept():
    assert superseded([10, 20], keep_n=3, keep_every=None) == []
    assert superseded([], keep_n=3, keep_every=None) == []


def test_multiples_of_keep_every_are_kept_for_good():
    steps = list(range(0, 1001, 50))
    gone = superseded(steps, keep_n=2, keep_every=200)
    assert sorted(set(steps) - set(gone)) == [0, 200, 400, 600, 800, 950, 1000]


def test_a_kept_multiple_does_not_use_up_a_place_among_the_newest():
    assert superseded([100, 110, 120, 130], keep_n=2, keep_every=100) == [110]


def test_order_and_repeats_of_the_steps_do_not_matter():
    assert superseded([50, 10, 40, 10, 30, 20], keep_n=3, keep_every=None) == [10, 20]


def test_steps_deleted_one_save_at_a_time_end_where_one_pass_would():
    kept: set[int] = set()
    for step in range(5, 101, 5):
        kept.add(step)
        kept -= set(superseded(kept, keep_n=3, keep_every=25))
    assert sorted(kept) == [25, 50, 75, 90, 95, 100]


def test_settings_that_would_delete_the_newest_are_refused_together():
    with pytest.raises(ValueError, match=r"keep_n is 0.*keep_every is 0"):
        superseded([1], keep_n=0, keep_every=0)
