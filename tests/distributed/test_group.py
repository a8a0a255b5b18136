"""Collectives over real ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time

import pytest
import torch

from hcsdl.config import DistributedConfig
from hcsdl.distributed.backends import missing
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.training.step_time import probe
from tests.distributed.ranks import on_ranks


def collectives(group: Group) -> dict:
    total = group.all_reduce(torch.tensor([1.0, group.rank]))
    model = torch.nn.BatchNorm1d(3)
    model.running_mean.fill_(float(group.rank))
    averaged = group.averaged_buffers(model)
    return {
        "sum": total.tolist(),
        "objects": group.all_gather_object({"rank": group.rank}),
        "mean": averaged["running_mean"].tolist(),
        "own": model.running_mean.tolist(),
        "names": sorted(averaged),
    }


def test_collectives_over_three_ranks() -> None:
    told = [one["value"] for one in on_ranks(collectives, 3)]
    for rank, value in enumerate(told):
        assert value["sum"] == [3.0, 3.0]
        assert value["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert value["mean"] == [1.0] * 3
        assert value["own"] == [float(rank)] * 3, "the model's own buffers must be left alone"
        assert value["names"] == ["running_mean", "running_var"]


def unequal(group: Group) -> None:
    group.check_equal("kernels", "ipex" if group.rank == 0 else "native")


def test_a_difference_between_ranks_is_told_on_all_of_them() -> None:
    for one in on_ranks(unequal, 2):
        assert one["error"] == "ConfigError"
        host = socket.gethostname()
        assert f"Rank 0 on {host} has 'ipex', rank 1 on {host} has 'native'" in one["text"]


def unequal_versions(group: Group) -> None:
    group.check_equal("versions", {"torch": "2.8.0", "numpy": "2.4.0" if group.rank == 0 else "2.3.0"})


def test_of_many_values_only_those_that_differ_are_told() -> None:
    for one in on_ranks(unequal_versions, 2):
        assert "has {'numpy': '2.4.0'}, rank 1" in one["text"] and "torch" not in one["text"]


def peer_dies(group: Group) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    group.all_reduce(torch.ones(4))


def test_a_dead_peer_is_a_lost_rank() -> None:
    told = on_ranks(peer_dies, 2)
    assert told[0]["error"] == "LostRank" and "rank 0 of 2: all_reduce #" in told[0]["text"]
    assert "failed: rank 1 on" in told[0]["text"] and re.search(r"is lost: not heard of for \d+ s", told[0]["text"])
    assert told[1] == {}


def peer_stalls(group: Group) -> None:
    if group.rank == 1:
        time.sleep(8)
        return
    group.all_reduce(torch.ones(4))


def test_a_stalled_peer_is_a_lost_rank_after_the_timeout() -> None:
    assert on_ranks(peer_stalls, 2, timeout_s=3)[0]["error"] == "LostRank"


def peer_dies_in_backward(group: Group) -> None:
    wrapped = group.wrap(torch.nn.Linear(4, 4))
    loss = wrapped(torch.ones(2, 4)).sum()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if group.backend == "ccl":  # as the heartbeat does, after a longer silence
        from hcsdl.distributed.oneccl.work import lane

        threading.Timer(0.5, lane().fail, ["rank 1 is lost"]).start()
    group.guard("averaging of the gradients", loss.backward)


@pytest.mark.parametrize("backend", ["gloo", pytest.param("ccl", marks=pytest.mark.skipif(bool(missing("ccl")), reason="no oneCCL"))])
def test_a_peer_lost_in_the_backward_pass_is_a_lost_rank(backend: str) -> None:
    told = on_ranks(peer_dies_in_backward, 2, backend=backend)[0]
    assert told["error"] == "LostRank" and "averaging of the gradients #" in told["text"] and "rank 1 on" in told["text"]


def bug_in_backward(group: Group) -> None:
    images = torch.ones(2, 4, requires_grad=True)
    images.register_hook(lambda gradient: gradient.reshape(3, 3))
    wrapped = group.wrap(torch.nn.Linear(4, 4))
    group.guard("averaging of the gradients", wrapped(images).sum().backward)


def test_a_bug_in_the_backward_pass_is_no_lost_rank() -> None:
    for one in on_ranks(bug_in_backward, 2):
        assert one["error"] == "RuntimeError" and "shape '[3, 3]' is invalid" in one["text"]


def gradients(group: Group) -> dict:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    wrapped = group.wrap(model)
    images = torch.arange(24, dtype=torch.float32).reshape(6, 4).sin()
    before = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    found = probe(wrapped, group, lambda: wrapped(images).sum().backward())
    settled = all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)) and all(
        p.grad is None for p in model.parameters()
    )
    share = images.chunk(group.world_size)[group.rank]
    model.eval()
    wrapped(share).pow(2).mean().backward()
    alone = torch.nn.Sequential(*model)
    shared = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    alone(images).pow(2).mean().backward()
    return {
        "settled": settled,
        "probe": [found.alone_s, found.together_s],
        "far": max(float((a - p.grad).abs().max()) for a, p in zip(shared, model.parameters(), strict=True)),
        "next": torch.rand(1).item(),
    }


def test_gradients_are_those_of_the_joined_batch() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    told = on_ranks(gradients, 3)
    for one in told:
        assert one["value"]["far"] < 1e-6
        assert one["value"]["settled"], "the throw-away passes must leave no trace"
        assert min(one["value"]["probe"]) > 0 and one["value"]["probe"] == told[0]["value"]["probe"], (
            "all ranks know the slowest one's times"
        )
        assert one["value"]["next"] == expected, "the throw-away passes must not move the random state"


def test_one_rank_needs_no_process_group() -> None:
    group = Group(Identity(), DistributedConfig())
    assert group.backend == "none" and not torch.distributed.is_initialized()
    assert group.all_gather_object(3) == [3]
    assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
    model = torch.nn.Linear(1, 1)
    assert group.wrap(model) is model
