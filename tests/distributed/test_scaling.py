"""The formulas of scaling, against values by hand and against a slow simulation in small steps of time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hcsdl.distributed.scaling import (
    Overlap,
    Timeline,
    at_mini_batch,
    bus_bandwidth,
    exposed_s,
    hierarchical,
    measured_s,
    median_timeline,
    on_peers,
    predict,
    ring_s,
)

pytestmark = pytest.mark.xeon_only
FREE = Overlap(1.0, 1.0)


def per_byte(num_bytes: float) -> float:
    """An all_reduce of a second a byte."""
    return float(num_bytes)


@pytest.mark.parametrize(("operation", "factor"), [("all_reduce", 1.5), ("all_gather", 0.75), ("broadcast", 1.0)])
def test_bus_bandwidth_of_four_ranks(operation: str, factor: float) -> None:
    assert bus_bandwidth(operation, 8e9, 2.0, 4) == pytest.approx(factor * 4e9)


@pytest.mark.parametrize("peers", [1, 2, 3, 8])
def test_ring_is_the_sum_of_its_steps(peers: int) -> None:
    one_step = 1e-5 + 1e6 / peers / 1e9  # every peer sends its part of the data to the next
    assert ring_s(1e6, peers, 1e-5, 1e9) == pytest.approx(2 * (peers - 1) * one_step)


def test_measured_sizes_come_back_and_between_them_lies_the_line() -> None:
    curve = measured_s([1000, 2000, 10000], [1.0, 3.0, 4.0])
    assert [curve(size) for size in (1000, 2000, 10000)] == [1.0, 3.0, 4.0]
    assert (curve(1), curve(1500), curve(6000)) == (1.0, 2.0, 3.5)
    assert curve(19000) == pytest.approx(7.0)  # a latency of 1, and twice the 3 that 9000 bytes more than the smallest took


@pytest.mark.parametrize("wanted", [1, 2, 3, 64])
def test_a_ring_measured_on_four_peers_predicts_any_number(wanted: int) -> None:
    measured = on_peers(lambda size: ring_s(size, 4, 2e-5, 1e9), 4, wanted)
    assert measured(1e8) == pytest.approx(ring_s(1e8, wanted, 2e-5, 1e9), rel=1e-4)
    assert measured(1) == pytest.approx(ring_s(1, wanted, 2e-5, 1e9), rel=1e-3)


def test_hierarchical_is_one_after_the_other() -> None:
    assert hierarchical(per_byte, lambda size: 10 * size)(3) == 33
    assert hierarchical(None, per_byte)(3) == 3


def test_communication_that_has_its_own_time_is_hidden_up_to_the_end_of_the_backward_pass() -> None:
    assert exposed_s(Timeline(12, 10, (1.0, 10.0), (4, 3)), per_byte, FREE) == pytest.approx(3)  # the last bucket is never hidden
    assert exposed_s(Timeline(12, 10, (1.0, 6.0), (4, 3)), per_byte, FREE) == pytest.approx(0)
    assert exposed_s(Timeline(12, 10, (), ()), per_byte, FREE) == 0


def test_buckets_wait_for_each_other() -> None:
    # the first is on its way from 1 to 9, the second, ready at 2, from 9 to 14
    assert exposed_s(Timeline(12, 10, (1.0, 2.0), (8, 5)), per_byte, FREE) == pytest.approx(4)


def test_one_huge_first_bucket_hides_the_rest_of_the_backward_pass_only() -> None:
    # as in M-CNN on a slow link: 100 s from 0.5 on, then 1 s for the rest
    assert exposed_s(Timeline(2.5, 2, (0.5, 2.0), (100, 1)), per_byte, FREE) == pytest.approx(99.5)


def test_computing_and_communicating_hold_each_other_up() -> None:
    # both at half speed for 4 s: 2 s of computing done, 8 left
    assert exposed_s(Timeline(12, 10, (0.0,), (2,)), per_byte, Overlap(0.5, 0.5)) == pytest.approx(2)
    # from 8 on, computing (2 left) at half speed ends at 12, with 1 of 5 sent at a quarter of the speed; the other 4 alone, until 16
    assert exposed_s(Timeline(12, 10, (8.0,), (5,)), per_byte, Overlap(0.5, 0.25)) == pytest.approx(6)


def stepped(timeline: Timeline, overlap: Overlap, dt: float) -> float:
    """The same step played in small steps of time."""
    now = done = sent = 0.0
    bucket = 0
    while done < timeline.backward_s or bucket < len(timeline.ready_s):
        computing = done < timeline.backward_s
        sending = bucket < len(timeline.ready_s) and done >= min(timeline.ready_s[bucket], timeline.backward_s)
        if computing:
            done += dt * (overlap.compute_rate if sending else 1.0)
        if sending:
            sent += dt * (overlap.communication_rate if computing else 1.0)
            if sent >= timeline.num_bytes[bucket]:
                sent, bucket = 0.0, bucket + 1
        now += dt
    return now - timeline.backward_s


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_a_simulation_in_small_steps(seed: int) -> None:
    random = np.random.default_rng(seed)
    buckets = int(random.integers(1, 6))
    ready = tuple(sorted(random.uniform(0, 3, buckets)))
    timeline = Timeline(4.0, 3.0, ready, tuple(random.uniform(0.01, 1.5, buckets)))
    overlap = Overlap(*random.uniform(0.2, 1.0, 2))
    assert exposed_s(timeline, per_byte, overlap) == pytest.approx(stepped(timeline, overlap, 1e-4), abs=2e-3)


def test_disturbance_is_less_where_a_rank_has_more_cores() -> None:
    assert Overlap(0.6, 0.2).with_cores(2, 8) == Overlap(pytest.approx(0.9), pytest.approx(0.8))
    assert Overlap(0.6, 0.2).with_cores(2, 1) == Overlap(pytest.approx(0.6), pytest.approx(0.2))


def test_mini_batches_lie_on_a_line() -> None:
    one, three = Timeline(3.0, 2.0, (1.0, 2.0), (7, 8)), Timeline(7.0, 6.0, (2.0, 6.0), (7, 8))
    assert at_mini_batch({1: one, 3: three}, 2) == Timeline(5.0, 4.0, (1.5, 4.0), (7, 8))
    assert at_mini_batch({1: one, 3: three}, 5) == Timeline(11.0, 10.0, (3.0, 10.0), (7, 8))
    assert at_mini_batch({3: three}, 3) is three
    with pytest.raises(ValueError, match="two mini-batch sizes"):
        at_mini_batch({3: three}, 4)


def test_medians_are_of_each_time_by_itself() -> None:
    many = [Timeline(3.0, 2.0, (1.0, 2.0), (7, 8)), Timeline(5.0, 1.0, (0.5, 1.0), (7, 8)), Timeline(4.0, 9.0, (3.0, 1.5), (7, 8))]
    assert median_timeline(many) == Timeline(4.0, 2.0, (1.0, 1.5), (7, 8))


def test_a_prediction_adds_up() -> None:
    found = predict(Timeline(12, 10, (10.0,), (3,)), per_byte, FREE, ranks=8, mini_batch=2)
    assert (found.step_s, found.exposed_s) == (15, 3)
    assert found.images_per_s == pytest.approx(16 / 15)
    assert found.efficiency == pytest.approx(12 / 15)
    alone = predict(Timeline(12, 10, (10.0,), (3,)).times(0.5), None, FREE, ranks=1, mini_batch=2)
    assert math.isclose(alone.images_per_s, 2 / 6) and alone.efficiency == 1
