"""Each collective on tensors, as calls on buffers.

In: CPU tensors of any stride and length, zero too. Out: the same tensors, filled. Called by one thread at a time, by every rank in the same order.

Reductions go through oneCCL in the tensor's own type, bool and int16 as int32. What only moves data goes as bytes, whatever its type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ReduceOp

from hcsdl.distributed.oneccl.api import Communicator, DataType, Reduction

TYPES = {
    torch.float32: DataType.FLOAT32,
    torch.float64: DataType.FLOAT64,
    torch.float16: DataType.FLOAT16,
    torch.bfloat16: DataType.BFLOAT16,
    torch.int8: DataType.INT8,
    torch.uint8: DataType.UINT8,
    torch.int32: DataType.INT32,
    torch.int64: DataType.INT64,
}
WIDER = {torch.bool: torch.int32, torch.int16: torch.int32}
REDUCTIONS = (  # torch's operations compare, but are no keys
    (ReduceOp.SUM, Reduction.SUM),
    (ReduceOp.AVG, Reduction.SUM),
    (ReduceOp.MAX, Reduction.MAX),
    (ReduceOp.MIN, Reduction.MIN),
    (ReduceOp.PRODUCT, Reduction.PRODUCT),
)


def kind(tensor: torch.Tensor | None) -> str:
    """Return dtype and size of a tensor for messages, ` float32 400 B`."""
    if tensor is None:
        return ""
    return f" {str(tensor.dtype).removeprefix('torch.')} {tensor.numel() * tensor.element_size()} B"


class Reducing:
    """A reduction that oneCCL can do: torch's operation on one dtype. Raises TypeError or ValueError, before anything is sent, where it cannot."""

    def __init__(self, operation: ReduceOp, dtype: torch.dtype) -> None:
        found = [mine for torchs, mine in REDUCTIONS if operation == torchs]
        name = next((name for name in ReduceOp.RedOpType.__members__ if operation == getattr(ReduceOp, name)), "another")
        if not found:
            raise ValueError(f"ccl reduces with SUM, PRODUCT, MIN, MAX and AVG. Got {name} instead; gloo has the bitwise ones.")
        self.reduction, self.average = found[0], operation == ReduceOp.AVG
        self.dtype = WIDER.get(dtype, dtype)
        if self.dtype not in TYPES or (dtype == torch.bool and self.average):
            names = ", ".join(str(one).removeprefix("torch.") for one in [*TYPES, *WIDER])
            raise TypeError(f"ccl reduces {names}; bool has no average. Got {name} of {dtype} instead.")

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, or a contiguous copy of the type that is reduced."""
        return tensor.detach().to(self.dtype).contiguous()

    def finish(self, buffer: torch.Tensor, size: int) -> torch.Tensor:
        """Return the sum as it is, or divided by the number of ranks (whole numbers: towards zero), in place."""
        if self.average:
            buffer.div_(size, rounding_mode=None if buffer.is_floating_point() else "trunc")
        return buffer


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _store(buffer: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a contiguous buffer into the tensor it stands for, unless it is that tensor's own memory."""
    if buffer.data_ptr() != tensor.data_ptr():
        tensor.copy_(buffer.view(tensor.shape))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().contiguous()
    return flat.as_strided((flat.numel(),), (1,), flat.storage_offset()).view(torch.uint8)  # one element may be contiguous with any stride


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the memory of tensors of one size that lie side by side, as bytes (tensors, bytes); None where they do not."""
    length, start = _num_bytes(tensors[0]), tensors[0].data_ptr()
    if all(t.is_contiguous() and _num_bytes(t) == length and t.data_ptr() == start + i * length for i, t in enumerate(tensors)):
        first = _bytes(tensors[0])
        storage = first.untyped_storage()
        if first.storage_offset() + length * len(tensors) <= storage.nbytes():
            return first.as_strided((len(tensors), length), (length, 1))
    return None


class Collectives:
    """Rank `rank` of `size` on one communicator."""

    def __init__(self, communicator: Communicator, rank: int, size: int) -> None:
        self._communicator, self.rank, self.size = communicator, rank, size

    def all_reduce(self, tensor: torch.Tensor, reducing: Reducing) -> None:
        """Every rank's tensor becomes the reduction."""
        if tensor.numel() == 0:
            return
        buffer = reducing.readable(tensor)
        pointer = buffer.data_ptr()
        self._communicator.all_reduce(pointer, pointer, buffer.numel(), TYPES[buffer.dtype], reducing.reduction)
        _store(reducing.finish(buffer, self.size), tensor)

    def reduce(self, tensor: torch.Tensor, reducing: Reducing, root: int) -> None:
        """The root's tensor becomes the reduction; the others keep theirs."""
        if tensor.numel() == 0:
            return
        buffer = reducing.readable(tensor)
        received = buffer if self.rank == root else torch.empty_like(buffer)
        self._communicator.reduce(buffer.data_ptr(), received.data_ptr(), buffer.numel(), TYPES[buffer.dtype], reducing.reduction, root)
        if self.rank == root:
            _store(reducing.finish(received, self.size), tensor)

    def reduce_scatter(self, output: torch.Tensor, inputs: torch.Tensor, reducing: Reducing) -> None:
        """The i-th of `size` equal parts of the reduction of `inputs` becomes rank i's `output`."""
        if inputs.numel() == 0:
            return
        buffer = reducing.readable(inputs)
        received = output if output.is_contiguous() and output.dtype == buffer.dtype else torch.empty(output.shape, dtype=buffer.dtype)
        self._communicator.reduce_scatter(buffer.data_ptr(), received.data_ptr(), received.numel(), TYPES[buffer.dtype], reducing.reduction)
        _store(reducing.finish(received, self.size), output)

    def reduce_scatter_list(self, output: torch.Tensor, inputs: Sequence[torch.Tensor], reducing: Reducing) -> None:
        """The reduction of the i-th inputs becomes rank i's output; inputs of one rank may differ in size."""
        if len({t.numel() for t in inputs}) == 1:
            self.reduce_scatter(output, torch.cat([t.detach().reshape(-1) for t in inputs]), reducing)
            return
        for root, tensor in enumerate(inputs):
            mine = tensor.detach().clone()
            self.reduce(mine, reducing, root)
            if root == self.rank:
                output.copy_(mine.view(output.shape))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Every rank's tensor becomes the root's."""
        if tensor.numel() == 0:
            return
        buffer = tensor.detach().contiguous()
        self._communicator.broadcast(buffer.data_ptr(), _num_bytes(buffer), root)
        _store(buffer, tensor)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """The ranks' tensors, one after the other, become every rank's output."""
        if tensor.numel() == 0:
            return
        sent, received = tensor.detach().contiguous(), output.detach().contiguous()
        self._communicator.all_gather(sent.data_ptr(), received.data_ptr(), _num_bytes(sent))
        _store(received, output)

    def all_gather_list(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Rank i's tensor becomes every rank's i-th output; the ranks' sizes may differ."""
        if len({_num_bytes(t) for t in outputs}) > 1:
            for root, output in enumerate(outputs):
                if root == self.rank:
                    output.copy_(tensor.view(output.shape))
                self.broadcast(output, root)
            return
        joined = _joined(outputs)
        gathered = torch.empty(self.size, _num_bytes(tensor), dtype=torch.uint8) if joined is None else joined
        self.all_gather(gathered, tensor)
        if joined is None:
            self._hand_out(gathered, outputs)

    def gather(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Rank i's tensor becomes the root's i-th output; the others give no outputs."""
        gathered = torch.empty(self.size, _num_bytes(tensor), dtype=torch.uint8)
        self.all_gather(gathered, tensor)
        self._hand_out(gathered, outputs)

    def scatter(self, output: torch.Tensor, inputs: Sequence[torch.Tensor], root: int) -> None:
        """The root's i-th input becomes rank i's output; the others give no inputs."""
        parts = torch.empty(self.size, _num_bytes(output), dtype=torch.uint8)
        for part, tensor in zip(parts, inputs, strict=False):
            part.copy_(_bytes(tensor))
        self.broadcast(parts, root)
        self._hand_out(parts[self.rank : self.rank + 1], [output])

    def all_to_all(self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Rank i's j-th input becomes rank j's i-th output; sizes may differ. Goes as parts of the largest size, which the ranks agree on first."""
        largest = torch.tensor([max(_num_bytes(t) for t in [*inputs, *outputs])])
        self.all_reduce(largest, Reducing(ReduceOp.MAX, largest.dtype))
        length = int(largest)
        if length == 0:
            return
        sent = _joined(inputs) if all(_num_bytes(t) == length for t in inputs) else None
        if sent is None:
            sent = torch.empty(self.size, length, dtype=torch.uint8)
            for part, tensor in zip(sent, inputs, strict=True):
                part[: _num_bytes(tensor)] = _bytes(tensor)
        joined = _joined(outputs) if all(_num_bytes(t) == length for t in outputs) else None
        received = torch.empty(self.size, length, dtype=torch.uint8) if joined is None else joined
        self._communicator.all_to_all(sent.data_ptr(), received.data_ptr(), length)
        if joined is None:
            self._hand_out(received, outputs)

    def barrier(self) -> None:
        """Return once every rank has come."""
        self.all_reduce(torch.zeros(1), Reducing(ReduceOp.SUM, torch.float32))

    def close(self) -> None:
        """Free the communicator."""
        self._communicator.destroy()

    @staticmethod
    def _hand_out(parts: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the bytes at the head of each part into its tensor."""
        for part, tensor in zip(parts, tensors, strict=False):
            if tensor.numel():
                tensor.copy_(part[: _num_bytes(tensor)].view(tensor.dtype).view(tensor.shape))
