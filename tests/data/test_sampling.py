"""Sampler: what a pass holds, how it is cut, and that nothing but fields, settings, seed and step counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcsdl.config import ConfigError
from hcsdl.data.sampling import Sampler, evaluation_rows


def make(
    n: int = 20, sampling: str = "all", size: int = 4, seed: int = 0, cap: int = 2, *, classes=None, treatments=None, rows=None
) -> Sampler:
    rows = list(range(n)) if rows is None else rows
    classes = [row % 3 for row in rows] if classes is None else classes
    treatments = [f"t{row % 5}" for row in rows] if treatments is None else treatments
    return Sampler(
        rows, [f"p/{row:04d}/1" for row in rows], classes, treatments, sampling=sampling, cap=cap, global_batch_size=size, seed=seed
    )


def stream(sampler: Sampler, steps: int, first: int = 0) -> np.ndarray:
    return np.concatenate([sampler.global_batch(step)[0] for step in range(first, first + steps)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes_every_field_once_a_pass_and_shares_make_the_global_batch(data):
    """For any number of fields, ranks dividing the global batch, and step: passes are permutations laid end to end."""
    world = data.draw(st.integers(1, 6), "world")
    size = world * data.draw(st.integers(1, 5), "share")
    n = data.draw(st.integers(size, 80), "fields")
    sampler = make(n, size=size, seed=data.draw(st.integers(0, 2**32), "seed"))
    passes = data.draw(st.integers(1, 4), "passes")
    order = stream(sampler, -(-passes * n // size))
    for number in range(passes):
        assert sorted(order[number * n : (number + 1) * n]) == list(range(n))
    step = data.draw(st.integers(0, 10**6), "step")
    rows, epochs = sampler.global_batch(step)
    shares = [sampler.rank_share(step, rank, world) for rank in range(world)]
    assert {len(share[0]) for share in shares} == {size // world}
    np.testing.assert_array_equal(np.concatenate([share[0] for share in shares]), rows)
    np.testing.assert_array_equal(np.concatenate([share[1] for share in shares]), epochs)
    np.testing.assert_array_equal(epochs, np.arange(step * size, (step + 1) * size) // n)


def test_a_pass_may_end_inside_a_global_batch():
    rows, epochs = make(10, size=4).global_batch(2)
    assert epochs.tolist() == [0, 0, 1, 1]
    assert rows.dtype == epochs.dtype == np.int64


def test_a_step_is_the_same_whatever_was_asked_before():
    """So a resumed run needs the number of the step, no more."""
    fresh, used = make(), make()
    stream(used, 40)
    for step in (7, 31, 3, 7):
        np.testing.assert_array_equal(fresh.global_batch(step)[0], used.global_batch(step)[0])


def test_passes_and_seeds_differ():
    order = stream(make(40), 20).reshape(2, 40)
    assert (order[0] != order[1]).any()
    assert (order[0] != stream(make(40, seed=1), 10)).any()
    assert (order[0] != np.arange(40)).any()


def test_the_order_of_the_table_does_not_matter():
    """The fields drawn are the same fields when the rows are given in another order."""
    shuffled = np.random.default_rng(0).permutation(20).tolist()
    for sampling in ("all", "capped", "balanced"):
        np.testing.assert_array_equal(stream(make(sampling=sampling), 9), stream(make(sampling=sampling, rows=shuffled), 9))


def test_rows_need_not_be_numbered_from_zero():
    assert set(stream(make(rows=[5, 900, 17, 42], size=2), 2)) == {5, 17, 42, 900}


def test_capped_takes_so_many_fields_a_treatment_and_others_next_pass():
    treatments = ["DMSO"] * 30 + ["a"] * 5 + ["b"] * 1
    sampler = make(36, "capped", 2, cap=3, treatments=treatments, classes=[0] * 36)
    assert sampler.pass_length == 3 + 3 + 1
    seen = []
    for number in range(6):
        order = stream(sampler, 21)[number * 7 : (number + 1) * 7]
        assert len(set(order)) == 7
        assert Counter(treatments[row] for row in order) == {"DMSO": 3, "a": 3, "b": 1}
        seen.append(frozenset(order))
    assert len(set(seen)) > 1


def test_balanced_gives_every_class_equally_often_and_repeats_evenly():
    classes = [0] * 40 + [1] * 7 + [2] * 1
    sampler = make(48, "balanced", 4, classes=classes)
    assert sampler.pass_length == 48
    rows, epochs = (np.concatenate(part) for part in zip(*(sampler.global_batch(step) for step in range(24)), strict=True))
    for number in range(2):
        order = rows[number * 48 : (number + 1) * 48]
        assert Counter(classes[row] for row in order) == {0: 16, 1: 16, 2: 16}
        counts = Counter(order)
        assert {counts[row] for row in range(40)} <= {0, 1}
        assert {counts[row] for row in range(40, 47)} == {2, 3}
    assert len({*zip(rows, epochs, strict=True)}) == len(rows), "every visit to a field has its own augmentation"


def test_balanced_pass_is_as_long_as_classes_allow():
    assert make(20, "balanced").pass_length == 18
    assert make(20, "balanced").describe()["fields_per_class_and_pass"] == 6


@pytest.mark.parametrize(
    ("sampling", "text"), [("all", "at most the 20 fields"), ("capped", "at most the 10 fields of a pass .20 training")]
)
def test_fewer_fields_than_a_global_batch_is_explained(sampling, text):
    with pytest.raises(ConfigError, match=text):
        make(20, sampling, size=21)


def test_more_ranks_than_fields_and_uneven_shares_are_explained():
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 3. Got 4"):
        make(size=4).rank_share(0, 0, 3)
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 8. Got 4 instead, of 5 training fields"):
        make(5, size=4).rank_share(0, 0, 8)


def test_no_field_and_unknown_sampling_are_explained():
    with pytest.raises(ConfigError, match="at least one field"):
        make(rows=[])
    with pytest.raises(ConfigError, match="data.sampling must be one of"):
        make(sampling="some")


@given(st.integers(0, 50), st.integers(1, 9))
def test_evaluation_covers_each_field_once(n, world):
    parts = [evaluation_rows(n, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_summary_says_what_was_sampled():
    assert make(20, "capped").describe() == {"sampling": "capped", "num_train_fields": 20, "fields_per_pass": 10, "cap": 2, "treatments": 5}
    assert make(20).describe() == {"sampling": "all", "num_train_fields": 20, "fields_per_pass": 20}
