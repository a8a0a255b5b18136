"""The clock of a step: parts that add up, exposed communication against passes without it, and a probe that leaves no trace."""

from __future__ import annotations

import pytest
import torch

from hcsdl.config import DistributedConfig
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.training import step_time
from hcsdl.training.step_time import StepClock, over_ranks, probe


class Time:
    """What the module takes for `time`: stands still until it is told to go on, so that nobody's load changes a figure."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def go_on(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    own = Time()
    monkeypatch.setattr(step_time, "time", own)
    return own


def one_step(clock: StepClock, time: Time, passes_s: float, norm_s: float, agreement_s: float, optimizer_s: float) -> list[float]:
    clock.start()
    time.go_on(passes_s)
    clock.passes_done()
    time.go_on(norm_s)
    clock.norm_done()
    seconds = clock.seconds()
    time.go_on(agreement_s)
    clock.agreed()
    time.go_on(optimizer_s)
    clock.step_done()
    return seconds


def test_communication_is_what_passes_take_longer_than_alone_and_the_wait_before(time: Time) -> None:
    clock = StepClock()
    clock.alone_s, clock.data_s = 0.5, 0.75
    first = one_step(clock, time, passes_s=1.5, norm_s=0.25, agreement_s=4.0, optimizer_s=2.0)
    assert first == pytest.approx([0.75, 0.5, 1.0, 0.0]), "no step before: only what the passes took longer"
    second = one_step(clock, time, passes_s=0.125, norm_s=0.0, agreement_s=8.0, optimizer_s=0.0)
    assert second == pytest.approx([0.75, 0.125, 4.0, 2.25]), "passes quicker than alone; wait, norm and optimizer of the step before"
    third = one_step(clock, time, passes_s=0.75, norm_s=0.0, agreement_s=0.0, optimizer_s=0.0)
    assert third == pytest.approx([0.75, 0.5, 0.25 + 8.0, 0.0])


def test_one_rank_communicates_nothing(time: Time) -> None:
    assert one_step(StepClock(), time, 0.5, 0.0, 0.0, 0.0) == [0.0, 0.5, 0.0, 0.0]


def test_parts_are_told_as_mean_and_largest() -> None:
    told = over_ranks(torch.tensor([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 1.0, 0.0]], dtype=torch.float64))
    assert told == {
        "data_s": 2.0, "forward_backward_s": 2.0, "exposed_communication_s": 0.5, "optimizer_s": 2.0,
        "data_max_s": 3.0, "forward_backward_max_s": 2.0, "exposed_communication_max_s": 1.0, "optimizer_max_s": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("passes_s", "alone_s"), [([7.0, 0.5, 0.125, 0.25], 0.25), ([7.0, 3.0], 3.0)], ids=["the median of three", "a long one once"]
)
def test_a_probe_times_passes_but_the_first_and_leaves_no_trace(time: Time, passes_s: list[float], alone_s: float) -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    before = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    left = list(passes_s)

    def one_pass() -> None:
        time.go_on(left.pop(0))
        model(torch.rand(6, 4)).sum().backward()

    found = probe(model, Group(Identity(), DistributedConfig()), one_pass)
    assert found.alone_s == found.together_s == pytest.approx(alone_s) and not left
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    after = torch.rand(1).item()
    torch.manual_seed(5)
    assert after == torch.rand(1).item()
