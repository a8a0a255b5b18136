"""The `ccl` process group of torch.distributed.

In: torch's calls, with CPU tensors. Out: a `Work` each, done in the order of the calls. Promised: outputs are right for strided and zero-length
tensors and in place; tensors live until their collective is done; a peer that is lost or late is named.

torch 2.8 and 2.13 call some methods by different names; both are defined.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from hcsdl.distributed import heartbeat, segments
from hcsdl.distributed.oneccl import meeting, settings
from hcsdl.distributed.oneccl.api import CclError, Communicator, unique_id
from hcsdl.distributed.oneccl.collectives import Collectives, Reducing, kind
from hcsdl.distributed.oneccl.point_to_point import PointToPoint
from hcsdl.distributed.oneccl.work import Work, lane
from hcsdl.machine.process import held_back_output

# From this size on ranks meet over gloo before an all_reduce, where who waits sleeps: oneCCL's waiting takes a core from the backward pass.
MEET_BYTES = 2**18  # a step of ResNet-18 took 16 % less processor time so, measured here; the size is a guess
LEAVE_S = 5.0  # what the others have for leaving, before rank 0 takes the rendezvous store with it; a guess


class ProcessGroupCCL(dist.ProcessGroup):
    """`size` ranks; this is the `rank`-th. Made by all of them at once; raises CclError where one does not come."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._timeout_s = timeout.total_seconds()
        self._number, self._name, self._description, self._closed = 0, "", "", False
        self._is_default = not dist.is_initialized()
        self._store = store = meeting.attempt(store, rank)
        places = meeting.meet(store, rank, size, self._timeout_s)
        self._hosts = [place.host for place in places]
        self._prefix = f"rank {rank} of {size} ({self._hosts[rank]}): "
        self._heart = self._watch_others()
        settings.before_first_communicator(rank, places, whole=self._is_default or size == dist.get_world_size())
        if self._hosts.index(self._hosts[rank]) == rank:  # one rank a host
            segments.remove_stale()
        self._progress = meeting.Progress(store, rank, size, self._timeout_s)
        with held_back_output():  # both libraries greet
            self._issue("start of oneCCL", None, self._connect, []).wait()
            self._pairs = PointToPoint(dist.PrefixStore("pairs", store), rank, size, timeout, self._prefix)

    def _watch_others(self) -> heartbeat.Heartbeat | None:
        """Return the process's heartbeat, told to fail every collective when a rank is lost. None where there are no others."""
        if self._is_default:
            store, rank, size = self._store, self.rank(), self.size()
        else:
            store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        if size == 1:
            return None
        heart = heartbeat.watch(store, rank, size)
        heart.on_lost(lane().fail)
        return heart if self.size() == size else None

    def _connect(self) -> None:
        shared = meeting.share_id(self._store, self.rank(), unique_id, self._timeout_s)
        self._on = Collectives(Communicator(shared, self.rank(), self.size()), self.rank(), self.size())
        segments.hold_own()

    def _issue(
        self, name: str, like: torch.Tensor | None, run: Callable[[], None], outputs: list, timeout: timedelta | None = None
    ) -> Work:
        """Hand `run` in; `like` gives dtype and size for messages."""
        self._number += 1
        number, label = self._number, f"{name} #{self._number}{kind(like)}"
        if self._heart is not None:
            self._heart.note(label)
        given_s = timeout.total_seconds() if timeout is not None else 0

        def go() -> None:
            self._progress.reached(number, label)
            run()

        return lane().submit(Work(go, self._prefix + label, outputs, given_s if given_s > 0 else self._timeout_s, self._overdue))

    def _overdue(self, work: Work) -> str:
        """Return a sentence on a collective that outlasts its time-out: what, for how long, and who has not reached it."""
        sentence = f"{work.label} took longer than its time-out of {work.timeout_s:g} s. "
        number = int(work.label.rpartition("#")[2].split()[0])
        reached = self._progress.others()
        if reached is None:
            return (
                sentence
                + f"The rendezvous store does not answer, so the process that holds it, as a rule rank 0 ({self._hosts[0]}), is lost."
            )
        late = [f"rank {rank} ({self._hosts[rank]}, last in {label or 'nothing'})" for rank, (n, label) in reached.items() if n < number]
        if late:
            return sentence + f"It was not reached by {meeting.listed(late)}."
        return sentence + "Every rank has reached it, so the network between them is down or slow, or their tensors differ in size."

    def _meet(self) -> None:
        """Return once all ranks have come here. gloo hears of a dead peer before the heartbeat does, but knows no names: those are asked for."""
        try:
            self._pairs.meet()
        except RuntimeError as error:
            if self._heart is None:  # some of the ranks only: the heartbeat will tell, in its own time
                raise
            why = self._heart.blame() or f"another rank is lost or stuck. {error}"
            lane().fail(f"{self._prefix}an all_reduce failed: {why}")  # for good: not even oneCCL's end would go well now
            raise CclError(why) from error

    def _must(self, holds: bool, sentence: str) -> None:
        if not holds:
            raise ValueError(self._prefix + sentence)

    def _must_hold(self, name: str, whole: torch.Tensor, part: torch.Tensor) -> None:
        self._must(
            whole.numel() == self.size() * part.numel() and whole.dtype == part.dtype,
            f"{name} needs one tensor with {self.size()} times the elements of the other, of the same dtype. "
            f"Got {whole.numel()} of {whole.dtype} and {part.numel()} of {part.dtype} instead.",
        )

    def _parts(self, tensor: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
        """Return views of a tensor's rows, one a rank."""
        rows = tensor.shape[0] if tensor.dim() else 0
        if not splits:
            self._must(
                rows % self.size() == 0, f"all_to_all_single without splits needs rows that divide by {self.size()}. Got {rows} instead."
            )
            splits = [rows // self.size()] * self.size()
        self._must(
            sum(splits) == rows and len(splits) == self.size(),
            f"all_to_all_single needs {self.size()} splits that add up to the tensor's {rows} rows. Got {list(splits)} instead.",
        )
        return list(tensor.detach().split(list(splits)))

    # What torch.distributed and DistributedDataParallel call.

    def allreduce(self, tensors: list, opts: dist.AllreduceOptions) -> Work:
        """Reduce each tensor over the ranks, in place."""
        reducing = [Reducing(opts.reduceOp, tensor.dtype) for tensor in tensors]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        def run() -> None:
            if num_bytes >= MEET_BYTES:
                self._meet()
            for tensor, one in zip(tensors, reducing, strict=True):
                self._on.all_reduce(tensor, one)

        return self._issue("all_reduce", tensors[0], run, tensors, opts.timeout)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list, opts: dist.ReduceOptions) -> Work:
        """Reduce over the ranks into the root's tensor."""
        reducing, root = Reducing(opts.reduceOp, tensors[0].dtype), opts.rootRank
        return self._issue("reduce", tensors[0], lambda: self._on.reduce(tensors[0], reducing, root), tensors, opts.timeout)

    def broadcast(self, tensors: list, opts: dist.BroadcastOptions) -> Work:
        """Copy the root's tensor to every rank."""
        root = opts.rootRank
        return self._issue("broadcast", tensors[0], lambda: self._on.broadcast(tensors[0], root), tensors, opts.timeout)

    def allgather(self, outputs: list, inputs: list, opts: dist.AllgatherOptions) -> Work:
        """Collect every rank's tensor into a list on every rank."""
        self._must(
            len(outputs[0]) == self.size(), f"all_gather needs a list of {self.size()} tensors, one a rank. Got {len(outputs[0])} instead."
        )
        return self._issue("all_gather", inputs[0], lambda: self._on.all_gather_list(outputs[0], inputs[0]), outputs, opts.timeout)

    def _allgather_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: dist.AllgatherOptions) -> Work:
        """Collect every rank's tensor into one."""
        return self.allgather_into_tensor_coalesced([output], [tensor], opts)

    def allgather_into_tensor_coalesced(self, outputs: list, inputs: list, opts: dist.AllgatherOptions) -> Work:
        """Collect several tensors of every rank, each into one."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._must_hold("all_gather_into_tensor", output, tensor)

        def run() -> None:
            for output, tensor in zip(outputs, inputs, strict=True):
                self._on.all_gather(output, tensor)

        return self._issue("all_gather_into_tensor", inputs[0], run, outputs, opts.timeout)

    def reduce_scatter(self, outputs: list, inputs: list, opts: dist.ReduceScatterOptions) -> Work:
        """Reduce a list of tensors over the ranks; rank i keeps the i-th."""
        self._must(
            len(inputs[0]) == self.size(),
            f"reduce_scatter needs a list of {self.size()} tensors, one a rank. Got {len(inputs[0])} instead.",
        )
        reducing = Reducing(opts.reduceOp, outputs[0].dtype)
        run = lambda: self._on.reduce_scatter_list(outputs[0], inputs[0], reducing)  # noqa: E731
        return self._issue("reduce_scatter", outputs[0], run, outputs, opts.timeout)

    def _reduce_scatter_base(self, output: torch.Tensor, tensor: torch.Tensor, opts: dist.ReduceScatterOptions) -> Work:
        """Reduce a tensor over the ranks; rank i keeps the i-th part."""
        return self.reduce_scatter_tensor_coalesced([output], [tensor], opts)

    def reduce_scatter_tensor_coalesced(self, outputs: list, inputs: list, opts: dist.ReduceScatterOptions) -> Work:
        """Reduce several tensors over the ranks; rank i keeps the i-th part of each."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self._must_hold("reduce_scatter_tensor", tensor, output)
        reducing = [Reducing(opts.reduceOp, output.dtype) for output in outputs]

        def run() -> None:
            for output, tensor, one in zip(outputs, inputs, reducing, strict=True):
                self._on.reduce_scatter(output, tensor, one)

        return self._issue("reduce_scatter_tensor", inputs[0], run, outputs, opts.timeout)

    def alltoall(self, outputs: list, inputs: list, opts: dist.AllToAllOptions) -> Work:
        """Send the j-th input to rank j, receive the i-th output from rank i."""
        return self._issue("all_to_all", inputs[0], lambda: self._on.all_to_all(outputs, inputs), outputs, opts.timeout)

    def alltoall_base(
        self, output: torch.Tensor, tensor: torch.Tensor, output_splits: list, input_splits: list, opts: dist.AllToAllOptions
    ) -> Work:
        """Send the j-th rows to rank j, receive the i-th from rank i; without splits, equally many each."""
        sent = self._parts(tensor, input_splits)
        received = output if output.is_contiguous() else output.detach().contiguous()
        parts = self._parts(received, output_splits)

        def run() -> None:
            self._on.all_to_all(parts, sent)
            if received is not output:
                output.copy_(received)

        return self._issue("all_to_all_single", tensor, run, [output], opts.timeout)

    def gather(self, outputs: list, inputs: list, opts: dist.GatherOptions) -> Work:
        """Collect every rank's tensor into a list on the root."""
        into = outputs[0] if outputs else []
        return self._issue("gather", inputs[0], lambda: self._on.gather(into, inputs[0]), outputs, opts.timeout)

    def scatter(self, outputs: list, inputs: list, opts: dist.ScatterOptions) -> Work:
        """Hand the root's list out, a tensor a rank."""
        root, parts = opts.rootRank, inputs[0] if inputs else []
        return self._issue("scatter", outputs[0], lambda: self._on.scatter(outputs[0], parts, root), outputs, opts.timeout)

    def barrier(self, opts: dist.BarrierOptions) -> Work:
        """Wait for every rank."""
        return self._issue("barrier", None, self._on.barrier, [], opts.timeout)

    def send(self, tensors: list, peer: int, tag: int = 0) -> dist.distributed_c10d.Work:
        """Send to a rank."""
        return self._pairs.send(tensors[0], peer, tag)

    def recv(self, tensors: list, peer: int, tag: int = 0) -> dist.distributed_c10d.Work:
        """Receive from a rank."""
        return self._pairs.receive(tensors[0], peer, tag)

    def recv_anysource(self, tensors: list, tag: int = 0) -> dist.distributed_c10d.Work:
        """Receive from whoever sends."""
        return self._pairs.receive(tensors[0], None, tag)

    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = _reduce_scatter_base, reduce_scatter_tensor_coalesced
    all_to_all_single = alltoall_base

    def shutdown(self) -> None:
        """End the group: `destroy_process_group` calls this."""
        if self._closed:
            return
        self._closed = True
        with suppress(CclError):
            self._issue("end of oneCCL", None, self._end, []).wait(timedelta(seconds=2 * LEAVE_S))
        self._progress.stop()
        if self._is_default:
            self._leave_store()

    def _end(self) -> None:
        """Part with the others, after everything that was issued before.

        oneCCL ends a communicator only together: a rank whose peers work on, or have gone, keeps its own until the process ends.
        """
        self._pairs.close()
        if meeting.leave_together(self._store, self.size(), LEAVE_S):
            self._on.close()
        else:
            atexit.register(segments.remove_own)

    def _leave_store(self) -> None:
        """Take leave in the store, so that nobody misses this rank; rank 0 waits for the others, because the store goes with it."""
        heartbeat.take_leave()
        keys = [f"left/{rank}" for rank in range(self.size())]
        with suppress(dist.DistError):
            self._store.set(keys[self.rank()], "")
            if self.rank() == 0 and lane().broken is None:
                self._store.wait(keys, timedelta(seconds=LEAVE_S))

    def getBackendName(self) -> str:
        """Return `ccl`."""
        return "ccl"

    def getGroupName(self) -> str:
        """Return torch's name for this group."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Keep torch's name for this group."""
        self._name = name

    def getGroupDesc(self) -> str:
        """Return torch's description of this group."""
        return self._description

    def setGroupDesc(self, description: str) -> None:
        """Keep torch's description of this group."""
        self._description = description
