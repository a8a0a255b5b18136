"""The ccl backend beyond single collectives: DistributedDataParallel, futures, groups, gradients, errors, time-outs, and how a process ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn

from hcsdl.distributed import oneccl
from hcsdl.distributed import oneccl_library as library
from hcsdl.distributed.oneccl import settings
from hcsdl.distributed.oneccl.meeting import meet
from hcsdl.distributed.oneccl.settings import Whereabouts
from tests.distributed.oneccl_ranks import end_codes, finish, on_ranks, start


def lines_of(script: str, **env: str) -> list[str]:
    """Return what a Python of its own prints for `script`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("CCL_", "FI_"))}
    done = subprocess.run([sys.executable, "-c", script], env=clean | env, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()


# Registering and loading.


def test_the_import_alone_registers_and_the_users_environment_wins() -> None:
    """`import hcsdl.distributed.oneccl` registers ccl and fills in what the user has not set; no library is loaded by it."""
    said = lines_of(
        "import os, hcsdl.distributed.oneccl as o, torch.distributed as d\n"
        "print(d.is_backend_available('ccl'), o.missing() == '', 'libccl' in open('/proc/self/maps').read())\n"
        "print(os.environ['CCL_ATL_SHM'], os.environ['CCL_PLUGIN'])",
        CCL_ATL_SHM="0",
    )
    assert said == ["True True False", "0 ONECCL_LEGACY_CPU"]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Without the libraries `missing` says what to install, and where was looked."""
    monkeypatch.delenv("CCL_ROOT", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(library.metadata, "files", lambda _: [])
    assert "pip install" in oneccl.missing() and str(tmp_path) in oneccl.missing()


@pytest.mark.skipif(not torch.__version__.startswith("2.8."), reason="IPEX 2.8 belongs to torch 2.8")
def test_ipex_and_oneccl_share_a_process() -> None:
    """A collective and an IPEX kernel work in one process, whichever was imported first."""
    pytest.importorskip("intel_extension_for_pytorch")
    for ranks in [start(function, 1) for function in (ipex_first, ipex_last)]:
        assert [one.get("value") for one in finish(ranks)] == [True]


def ipex_first() -> bool:
    """Import IPEX before the library is loaded by a second group."""
    return _with_ipex()


def ipex_last() -> bool:
    """Import IPEX after a collective."""
    dist.all_reduce(torch.ones(3))
    return _with_ipex()


def _with_ipex() -> bool:
    import intel_extension_for_pytorch as ipex

    model = ipex.optimize(torch.nn.Conv2d(3, 4, 3).eval(), dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(torch.ones(1, 3, 8, 8))
    dist.all_reduce(found)
    return bool(torch.isfinite(found).all())


def test_neighbours_share_memory_only_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are counted by host; two of one host name that cannot share memory turn it off for all."""
    for name in ("CCL_LOCAL_RANK", "CCL_LOCAL_SIZE", "CCL_ATL_SHM", "FI_TCP_IFACE", "CCL_KVS_IFACE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("CCL_ATL_SHM", "1")
    two_nodes = [Whereabouts("a", "1", 1000), Whereabouts("b", "2", 1000), Whereabouts("a", "1", 1000)]
    settings.before_first_communicator(2, two_nodes)
    assert (os.environ["CCL_LOCAL_RANK"], os.environ["CCL_LOCAL_SIZE"], os.environ["CCL_ATL_SHM"]) == ("1", "2", "1")
    assert "FI_TCP_IFACE" not in os.environ  # the loopback does not reach the other node
    settings.before_first_communicator(0, [Whereabouts("a", "1", 1000), Whereabouts("a", "2", 1000)])
    assert os.environ["CCL_ATL_SHM"] == "0"


# Training.


def gradients(wrap: object) -> list[torch.Tensor]:
    """Return the gradients of a small network whose parameters fill several buckets."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256), torch.nn.Linear(256, 8))
    wrapped = wrap(model)  # type: ignore[operator]
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs = torch.randn(4 * size, 64, generator=torch.Generator().manual_seed(1))
    for part in (inputs[4 * rank : 4 * rank + 4],) if wrapped is not model else (inputs,):
        wrapped(part).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def train_three_ways() -> dict:
    """Return how far ccl's gradients are from gloo's and from one process's, and how DDP's buckets were reduced."""
    gloo = dist.new_group(backend="gloo")
    over_ccl = gradients(lambda m: torch.nn.parallel.DistributedDataParallel(m, bucket_cap_mb=0.1))
    over_gloo = gradients(lambda m: torch.nn.parallel.DistributedDataParallel(m, bucket_cap_mb=0.1, process_group=gloo))
    alone = gradients(lambda m: m)
    largest = max(float(g.abs().max()) for g in alone)
    far = [max(float((a - b).abs().max()) for a, b in zip(over_ccl, other, strict=True)) / largest for other in (over_gloo, alone)]
    return {"from_gloo": far[0], "from_one": far[1]}


def test_ddp_over_ccl_is_ddp_over_gloo_is_one_process() -> None:
    """Gradients averaged over two ranks equal gloo's and those of one process with the whole mini-batch, to rounding."""
    for said in on_ranks(train_three_ways, 2):
        assert said["value"]["from_gloo"] < 1e-6 and said["value"]["from_one"] < 1e-5


def overlap() -> bool:
    """Rank 1 calls only after rank 0 has come back from its call: return whether rank 0's collective was still going on then."""
    store, tensor = dist.distributed_c10d._get_default_store(), torch.ones(100_000)
    if dist.get_rank() == 1:
        store.wait(["rank 0 is back"])
    work = dist.all_reduce(tensor, async_op=True)
    pending = not work.is_completed()
    store.set("rank 0 is back", "")
    work.wait()
    return pending and tensor[0].item() == 2.0


def test_an_asynchronous_collective_goes_on_behind_the_caller() -> None:
    """The call returns before the peer has come, which is what lets the backward pass go on."""
    assert on_ranks(overlap, 2)[0]["value"]


def in_flight() -> dict:
    """Hand several collectives in, drop every tensor but the outputs, wait in reverse order."""
    rank = dist.get_rank()
    pending = []
    for number in range(30):
        kept = torch.full((20_000,), float(number + rank))
        pending.append((dist.all_reduce(kept, async_op=True), kept, 2 * number + 1))
        dist.all_reduce(torch.ones(50_000 + number), async_op=True)  # nobody holds this one
    gc.collect()
    scribble = [torch.full((50_000,), -7.0) for _ in range(20)]  # takes memory that was given back too early
    right = True
    for work, kept, expected in reversed(pending):
        work.wait()
        right &= bool((kept == expected).all()) and work.is_completed() and work.is_success()
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    return {
        "right": right,
        "future": future.wait()[0].tolist(),
        "then": future.then(lambda f: f.value()[0].sum().item()).wait(),
        "n": len(scribble),
    }


def test_collectives_in_flight_keep_order_and_tensors() -> None:
    """Many at once are done in order; tensors nobody else holds live until then; futures carry the outputs."""
    for said in on_ranks(in_flight, 2):
        assert said["value"] == {"right": True, "future": [2.0, 2.0, 2.0], "then": 6.0, "n": 20}


def groups_objects_gradients() -> dict:
    """Do what needs more than one group, more than tensors, or autograd."""
    rank = dist.get_rank()
    pair, alone = dist.new_group([0, 2]), [dist.new_group([r]) for r in range(3)]
    found = torch.tensor([float(rank)])
    if rank != 1:
        dist.all_reduce(found, group=pair)
        dist.destroy_process_group(pair)
    mine = torch.ones(1)
    dist.all_reduce(mine, group=alone[rank])
    objects: list = [None] * 3
    dist.all_gather_object(objects, {"rank": rank, "text": "ü" * rank})
    box = [f"from {rank}"]
    dist.broadcast_object_list(box, src=1)
    dist.barrier()

    weight = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    gathered = torch.cat(torch.distributed.nn.all_gather(weight))
    (gathered * torch.arange(6.0)).sum().backward()
    uneven = [torch.empty(length) for length in (1, 2, 3)]
    dist.all_gather(uneven, torch.full((rank + 1,), float(rank)))
    return {
        "pair": found.item(),
        "objects": objects,
        "box": box,
        "grad": weight.grad.tolist(),
        "uneven": torch.cat(uneven).tolist(),
    }


def test_groups_objects_and_gradients_through_gathers() -> None:
    """new_group, object collectives, and the gradient of torch.distributed.nn.all_gather, which sums over the ranks."""
    for rank, said in enumerate(on_ranks(groups_objects_gradients, 3)):
        assert said["value"] == {
            "pair": [2.0, 1.0, 2.0][rank],
            "objects": [{"rank": r, "text": "ü" * r} for r in range(3)],
            "box": ["from 1"],
            "grad": [3.0 * 2 * rank, 3.0 * (2 * rank + 1)],
            "uneven": [0.0, 1.0, 1.0, 2.0, 2.0, 2.0],
        }


def pairs() -> dict:
    """Two ranks that send to each other at once, tags out of order, and a receive from any source."""
    rank = dist.get_rank()
    sent, received = torch.full((300_000,), float(rank)), torch.empty(300_000)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]):
        work.wait()
    if rank == 0:
        pending = [dist.isend(torch.full((2,), float(tag)), 1, tag=tag) for tag in (5, 6)]
        source, tags = None, []
        for work in pending:
            work.wait()
    else:
        tags = [torch.empty(2), torch.empty(4)[::2]]
        dist.recv(tags[1], 0, tag=6)
        source = dist.recv(tags[0], tag=5)
    return {"crossed": received[-1].item(), "source": source, "tags": [t.tolist() for t in tags]}


def test_sends_and_receives() -> None:
    """Sends that cross do not wait for each other; tags and the source are respected."""
    zero, one = (said["value"] for said in on_ranks(pairs, 2))
    assert zero["crossed"] == 1.0
    assert one == {"crossed": 0.0, "source": 0, "tags": [[5.0, 5.0], [6.0, 6.0]]}


# What goes wrong.


def refusals() -> list[str]:
    """Return what is said to collectives that cannot be."""
    said = []
    for attempt in (
        lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.BXOR),
        lambda: dist.all_reduce(torch.ones(2, dtype=torch.bool), dist.ReduceOp.AVG),
        lambda: dist.all_gather_into_tensor(torch.ones(3), torch.ones(2)),
        lambda: dist.all_gather([torch.ones(2)] * 2, torch.ones(2)),
        lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2), [2], [1]),
    ):
        try:
            attempt()
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def test_impossible_collectives_are_refused_before_anything_is_sent() -> None:
    """Operations, types and sizes that cannot be are refused, in a sentence with what was found."""
    for said in on_ranks(refusals, 1):
        texts = said["value"]
        assert len(texts) == 5
        for text, part in zip(texts, ("BXOR", "bool has no average", "Got 3", "Got", "add up to"), strict=False):
            assert part in text


def broken_communicator() -> str:
    """Return the text of an error code that oneCCL itself gives."""
    group = dist.group.WORLD
    group._on._communicator._handle.value = None
    try:
        dist.all_reduce(torch.ones(5, dtype=torch.bfloat16))
    except oneccl.CclError as error:
        return str(error)
    return ""


def test_an_error_code_becomes_an_exception_with_onecclls_text() -> None:
    """The exception names oneCCL's text and code, the collective, rank, dtype and size."""
    text = on_ranks(broken_communicator, 1)[0]["value"]
    assert "rank 0 of 1" in text and "all_reduce" in text and "bfloat16 10 B" in text and "oneCCL says" in text and "(code " in text


def one_rank_stays_away() -> None:
    """Rank 1 comes as far as the third collective and no further; rank 0 waits for it in a backward pass."""
    dist.all_reduce(torch.ones(4))
    dist.broadcast(torch.ones(6), 0)
    if dist.get_rank() == 1:
        time.sleep(100)
    gradients(lambda m: torch.nn.parallel.DistributedDataParallel(m, bucket_cap_mb=0.1, init_sync=False))


def test_a_time_out_names_the_collective_and_who_has_not_reached_it() -> None:
    """A collective inside DDP's backward that outlasts the time-out raises there, in a sentence; the process ends with code 5."""
    ranks = start(one_rank_stays_away, 2, timeout_s=4)
    ranks[0].wait(100)
    ranks[1].kill()
    waiting, _ = finish(ranks)
    assert waiting["code"] == 5
    assert "rank 0 of 2" in waiting["text"] and "all_reduce #" in waiting["text"] and "time-out of 4 s" in waiting["text"]
    assert "not reached by rank 1 (" in waiting["text"] and "last in broadcast #3 float32 24 B" in waiting["text"]


def test_who_does_not_come_to_the_meeting_is_named() -> None:
    """Two of three ranks have come: within the time-out it is said that rank 2 is missing, and from where the others came."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("place/1", '["node7", "memory"]')
    with pytest.raises(oneccl.CclError, match=r"rank 0 of 3 .* After 0.5 s rank 2 had not come; the other 2 came from .*node7"):
        meet(store, 0, 3, 0.5)


# How a process ends.


def leave_at_once() -> int:
    """Do a collective, and end without destroying the group: the interpreter's exit is all there is."""
    dist.all_reduce(torch.ones(10), async_op=True).wait()
    dist.new_group([0])
    dist.distributed_c10d.GroupMember.WORLD = None  # the runner must not destroy it
    return 1


def test_processes_end_by_themselves() -> None:
    """Five pairs with and five without destroy_process_group: every process ends with code 0 within the time that is waited."""
    assert end_codes([leave_at_once, in_flight], 5) == [0] * 20


def test_a_meeting_without_a_store_names_rank_0() -> None:
    """Where the store has gone, the process that held it is named."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
    del store
    gc.collect()
    with pytest.raises(oneccl.CclError, match="rank 0's as a rule"):
        meet(client, 1, 2, 1.0)
