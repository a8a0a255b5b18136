"""Whether the largest mini-batch that fits is found, from passes that are known to fit, and one too large refused in time."""

from __future__ import annotations

import pytest

from hcsdl.config import ConfigError, TrainingConfig
from hcsdl.training.mini_batch import Footprint, Need, fullest, largest_fitting, measured, settle


class Process:
    """A rank whose passes take `fixed` + fields × `field` GiB beside the `before` it held; two such are on one node of `limit` GiB."""

    def __init__(self, limit: float, before: float = 1.0, fixed: float = 0.5, field: float = 2.0) -> None:
        self.limit, self.before, self.fixed, self.field = limit, before, fixed, field
        self.passes: list[int] = []

    def peak_after(self, fields: int) -> float:
        if fields:
            self.passes.append(fields)
        return self.before + (self.fixed + fields * self.field if fields else 0)

    def gather(self, own: Footprint) -> list[Need]:
        peaks = [own.peak_gib(fields) for fields in range(1, 13)]
        return [Need("a", peaks, self.limit), Need("a", peaks, self.limit), Need("b", peaks, 1000.0)]

    def settle(self, asked: int | None, share: int = 12) -> int:
        return settle(asked, share, 0.8, self.peak_after, self.gather)[0]


@pytest.mark.parametrize(
    ("limit", "fields"),
    [(1000, 12), (64, 12), (63, 6), (34, 6), (33, 4), (9, 1)],
    ids="much, just enough for all, a little less, enough for 6, a little less, one".split(", "),
)
def test_auto_takes_the_largest_divisor_that_the_fullest_node_holds(limit: float, fields: int) -> None:
    """Two ranks of 1.5 + 2 n GiB within 0.8 × limit."""
    process = Process(limit)
    assert process.settle(None) == fields
    assert 2 * (1.5 + 2 * fields) <= 0.8 * limit
    assert fields == 12 or 2 * (1.5 + 2 * {1: 2, 4: 6, 6: 12}[fields]) > 0.8 * limit


def test_no_pass_is_made_that_may_not_fit() -> None:
    """With room for one field but not for two, taken for 1 + 2 × 2.5 a rank, the second pass is not made; nor for what was asked for and surely fits."""
    for limit, asked, passes in ((9, None, [1]), (16, None, [1, 2]), (1000, None, [1, 2]), (1000, 12, [1])):
        process = Process(limit)
        process.settle(asked)
        assert process.passes == passes, limit


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(
        ConfigError, match=r"With 12 fields a rank the node would hold about 51 GiB, and it may hold 40: training.mini_batch_size=6"
    ):
        Process(40).settle(12)
    with pytest.raises(ConfigError, match="With 1 field a rank.* would hold about 7 GiB, and it may hold 4.8: take fewer ranks a node or"):
        Process(6).settle(None)
    assert Process(52).settle(12) == 12, "what is asked for may fill the node"


def test_the_peak_of_any_mini_batch_follows_from_one_and_two() -> None:
    assert measured(1.0, 3.5, 5.5) == Footprint(1.5, 2.0)
    assert measured(1.0, 3.5, 5.5).peak_gib(6) == 13.5
    assert measured(1.0, 3.5).peak_gib(2) == 6.0, "more than it will be, without the second pass"


def test_every_node_counts() -> None:
    needs = [Need("a", [2, 3, 4, 5], 10), Need("b", [3, 5, 7, 9], 10), Need("b", [2, 3, 4, 5], 10)]
    assert fullest(needs, 2) == (8, 10)
    assert largest_fitting(needs, 4, 0.8) == 2
    assert largest_fitting(needs, 4, 0.4) == 0


@pytest.mark.parametrize("value", [0, -1, "most", True, 2.5])
def test_a_mini_batch_size_is_a_number_null_or_auto(value: object) -> None:
    with pytest.raises(ConfigError, match="training.mini_batch_size must be a number from 1, null or auto. Got"):
        TrainingConfig(mini_batch_size=value)  # type: ignore[arg-type]
    assert TrainingConfig(mini_batch_size="auto").fixed_mini_batch is None
    assert TrainingConfig(mini_batch_size=4).fixed_mini_batch == 4
