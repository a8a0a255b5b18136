"""The clock of a step: parts that add up, exposed communication against passes without it, and a probe that leaves no trace."""

from __future__ import annotations

import time

import pytest
import torch

from hcsdl.config import DistributedConfig
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.training.step_time import StepClock, over_ranks, probe


def one_step(clock: StepClock, passes_s: float, norm_s: float, agreement_s: float, optimizer_s: float) -> list[float]:
    clock.start()
    time.sleep(passes_s)
    clock.passes_done()
    time.sleep(norm_s)
    clock.norm_done()
    seconds = clock.seconds()
    time.sleep(agreement_s)
    clock.agreed()
    time.sleep(optimizer_s)
    clock.step_done()
    return seconds


def test_communication_is_what_passes_take_longer_than_alone_and_the_wait_before() -> None:
    clock = StepClock()
    clock.alone_s, clock.data_s = 0.05, 0.7
    data, passes, exposed, optimizer = one_step(clock, 0.15, 0.02, 0.06, 0.04)
    assert (data, optimizer) == (0.7, 0.0) and passes == pytest.approx(0.05)
    assert exposed >= 0.1, "no step before: only what the passes took longer"
    data, passes, exposed, optimizer = one_step(clock, 0.0, 0.0, 0.0, 0.0)
    assert passes < 0.05 and exposed == pytest.approx(0.06, abs=0.04), "the wait of the step before"
    assert optimizer >= 0.06, "norm and optimizer of the step before"


def test_one_rank_communicates_nothing() -> None:
    assert one_step(StepClock(), 0.02, 0.0, 0.0, 0.0)[2] == 0.0


def test_parts_are_told_as_mean_and_largest() -> None:
    told = over_ranks(torch.tensor([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 1.0, 0.0]], dtype=torch.float64))
    assert told == {
        "data_s": 2.0, "forward_backward_s": 2.0, "exposed_communication_s": 0.5, "optimizer_s": 2.0,
        "data_max_s": 3.0, "forward_backward_max_s": 2.0, "exposed_communication_max_s": 1.0, "optimizer_max_s": 4.0,
    }  # fmt: skip


def test_a_probe_leaves_no_trace() -> None:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
    before = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    calls = []

    def one_pass() -> None:
        calls.append(torch.rand(1).item())
        time.sleep(0.01)
        model(torch.rand(6, 4)).sum().backward()

    found = probe(model, Group(Identity(), DistributedConfig()), one_pass)
    assert 0.01 <= found.alone_s < 5 and found.together_s == found.alone_s and len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    after = torch.rand(1).item()
    torch.manual_seed(5)
    assert after == torch.rand(1).item()
