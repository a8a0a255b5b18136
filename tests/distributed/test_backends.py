"""What gradients go through: the choice of a backend, buckets, and gradients sent as bf16."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hcsdl.config import ConfigError, DistributedConfig
from hcsdl.distributed import backends
from hcsdl.distributed.backends import largest_bucket, missing, time_backends
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from tests.distributed.ranks import on_ranks


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def test_nccl_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="distributed.backend=nccl cannot be used: .*machine.device=cpu"):
        Group(Identity(0, 2, 0, 2, "torchrun"), DistributedConfig(backend="nccl"))


@pytest.mark.parametrize("bucket_mib", [1e-5, 1e-4, 1.0])
def test_the_largest_bucket_is_ddps(bucket_mib: float) -> None:
    model = network()
    parameters = list(reversed(list(model.parameters())))
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, [max(1, int(bucket_mib * 2**20))])
    expected = max(sum(parameters[i].numel() * 4 for i in bucket) for bucket in buckets)
    assert largest_bucket(model, bucket_mib) == expected


def choice(group: Group) -> dict:
    group.choose_backend(network())
    wrapped = group.wrap(network())
    wrapped(torch.ones(3, 4)).sum().backward()
    return {"backend": group.backend, "reason": group.backend_reason, "grad": float(next(wrapped.parameters()).grad.sum())}


def test_auto_times_both_and_says_so_or_why_not() -> None:
    first, second = (one["value"] for one in on_ranks(choice, 2, backend="auto"))
    assert first == second, "every rank must choose alike"
    if missing("ccl"):
        assert first["backend"] == "gloo" and missing("ccl") in first["reason"]
    else:
        assert first["backend"] in ("gloo", "ccl")
        assert "gloo" in first["reason"] and "ccl" in first["reason"] and "ms" in first["reason"]


def unstartable(group: Group) -> dict:
    from hcsdl.distributed.oneccl import process_group

    def refuse(*_: object) -> None:
        raise process_group.CclError("no provider found")

    process_group.ProcessGroupCCL.__init__ = refuse
    group.choose_backend(network())
    group.wrap(network())(torch.ones(3, 4)).sum().backward()
    return {"backend": group.backend, "reason": group.backend_reason}


@pytest.mark.skipif(bool(missing("ccl")), reason=missing("ccl"))
def test_auto_goes_on_without_a_oneccl_that_does_not_start() -> None:
    for one in on_ranks(unstartable, 2, backend="auto"):
        assert one["value"] == {"backend": "gloo", "reason": "ccl did not start: no provider found"}


class Clock:
    """Time that passes in all_reduces alone, as they would take over fabrics of made-up speeds."""

    def __init__(self) -> None:
        self.now, self.rounds, self.all_reduce = 0.0, 0, dist.all_reduce
        backends.time, dist.all_reduce = self, self.passing

    def monotonic(self) -> float:
        return self.now

    def passing(self, tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
        self.all_reduce(tensor, group=group)
        latency_s, bytes_per_s = self.gloo if group is None else self.ccl
        self.now += latency_s + tensor.nbytes / bytes_per_s
        self.rounds += group is None


SPEEDS = {  # latency in s and bytes/s of gloo, then of ccl: the faster comes last, since once chosen it stays
    "between hosts": ((1e-3, 1e8), (2e-3, 5e7)),
    "slow link": ((5e-3, 2.5e7), (5e-3, 1.5e7)),
    "one host, ccl faster": ((1e-4, 2e9), (1e-4, 4e9)),
}


def clocked(group: Group) -> dict:
    """Choose over fabrics of several speeds; return what each choice took of the clock, and what was chosen."""
    clock, found = Clock(), {}
    large = torch.nn.Linear(2000, 2000)  # 15 MiB
    for name, (clock.gloo, clock.ccl) in SPEEDS.items():
        begun, clock.rounds = clock.now, 0
        group.choose_backend(large)
        found[name] = [clock.now - begun, clock.rounds, group.backend, dist.get_backend(group.gradient_group)]
    return found


@pytest.mark.skipif(bool(missing("ccl")), reason=missing("ccl"))
def test_auto_takes_the_faster_and_two_seconds_at_most() -> None:
    """Slow links are timed with less than the whole bucket and less often; never less than three times each."""
    first, second = (one["value"] for one in on_ranks(clocked, 2, backend="auto"))
    assert first == second
    for name, (seconds, rounds, backend, over) in first.items():
        assert seconds <= 2.0 and rounds >= 4, name
        assert backend == over == ("ccl" if name == "one host, ccl faster" else "gloo")


def kept_ccl(group: Group) -> dict:
    clock = Clock()
    group.choose_backend(network(), before="ccl")
    group.wrap(network())(torch.ones(3, 4)).sum().backward()
    return {"backend": group.backend, "reason": group.backend_reason, "over": dist.get_backend(group.gradient_group), "timed": clock.rounds}


@pytest.mark.skipif(bool(missing("ccl")), reason=missing("ccl"))
def test_a_resumed_run_keeps_ccl_without_timing() -> None:
    for one in on_ranks(kept_ccl, 2, backend="auto"):
        assert one["value"] == {"backend": "ccl", "reason": "as before the resume", "over": "ccl", "timed": 0}


def kept(group: Group) -> dict:
    group.choose_backend(network(), before="gloo")
    return {"backend": group.backend, "reason": group.backend_reason}


def test_a_resumed_run_keeps_its_backend() -> None:
    for one in on_ranks(kept, 2, backend="auto"):
        assert one["value"]["backend"] == "gloo"
        assert missing("ccl") or one["value"]["reason"] == "as before the resume"


def timed(group: Group) -> dict:
    slow = dist.new_group(backend="gloo")
    size, seconds = time_backends({"one": None, "other": slow}, 3 * 2**20, torch.float32, group.largest)
    return {"size": size, "seconds": seconds}


def test_timing_gives_every_rank_the_same_figures() -> None:
    first, second = (one["value"] for one in on_ranks(timed, 2))
    assert first == second
    assert 2**20 <= first["size"] <= 3 * 2**20 and all(value > 0 for value in first["seconds"].values())


def rounded(group: Group) -> dict:
    images = torch.linspace(-1, 1, 24).reshape(6, 4).chunk(group.world_size)[group.rank]
    gradients = {}
    for dtype in ("fp32", "bf16"):
        group.config.gradient_dtype = dtype
        wrapped = group.wrap(network())
        wrapped(images).pow(2).mean().backward()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in wrapped.parameters()])
    exact, sent = gradients["fp32"], gradients["bf16"]
    return {
        "far": float(((sent - exact).abs() / exact.abs().amax()).max()),
        "grad": sent.tolist(),
        "bf16": bool((sent.bfloat16() == sent).all()),
    }


@pytest.mark.parametrize("backend", ["gloo", pytest.param("ccl", marks=pytest.mark.skipif(bool(missing("ccl")), reason="no oneCCL"))])
def test_gradients_sent_as_bf16_are_the_mean_to_rounding_and_alike_on_all_ranks(backend: str) -> None:
    first, second = (one["value"] for one in on_ranks(rounded, 2, backend=backend))
    assert first["grad"] == second["grad"] and first["bf16"]
    assert 0 < first["far"] < 2**-7, "rounded, by two roundings of 8 bits at most"
