"""Stored pixels → a GPU → scaled float32 pixels there: half the bytes on the way, and no processor's time for the scaling.

In: a stored field and its `Conversion`. Out: float32 on the device, in a given place, and an event that tells when. Promised: the numbers of
`Preprocessing.apply`, bit for bit on a device with IEEE arithmetic, because each step is one operation of float32 there as here and none are joined;
copies and conversions run on a stream of their own from page-locked memory, beside the network's work; any thread may call.

It works on the processor, too, where it is tested; there `Preprocessing.apply` is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from hcsdl.data.conversion import Conversion, ShadingView


class Sender:
    """Sends fields to `device`. What is made here belongs to its own stream until `receive` hands it to the caller's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return float32 (N, C, H, W) in channels_last, to be filled by `send` image by image."""
        with self._on_stream():
            return torch.empty(tuple(shape), device=self.device, memory_format=torch.channels_last)

    def send(self, image: np.ndarray, conversion: Conversion, out: Tensor) -> torch.cuda.Event | None:
        """Start `image` (C, H, W), uint8 or uint16, on its way into `out` (C, H', W'), float32; return what tells when it is there."""
        window = conversion.window(image)
        with self._on_stream():
            # torch can do little with uint16, so its bits travel as int16. Page-locked memory is kept by torch, and not used again before it is copied.
            dtype = torch.uint8 if window.dtype == np.uint8 else torch.int16
            stored = torch.empty(window.shape, dtype=dtype, pin_memory=self._stream is not None)
            stored.numpy().view(window.dtype)[...] = window
            self._convert(stored.to(self.device, non_blocking=True), conversion, out)
            return self._stream.record_event() if self._stream else None

    def receive(self, images: Tensor, sent: Iterable[torch.cuda.Event | None]) -> None:
        """Let the caller's stream wait until `images` are there; its later work may use them."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        for event in sent:
            if event is not None:
                current.wait_event(event)
        images.record_stream(current)

    def _on_stream(self) -> AbstractContextManager:
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self.device)  # of this thread: else torch would go back to the first GPU, and take memory of it, in each rank
        return torch.cuda.stream(self._stream)

    def _there(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.pin_memory() if self._stream else tensor).to(self.device, non_blocking=True)

    def _convert(self, stored: Tensor, conversion: Conversion, out: Tensor) -> None:
        """Do what `hcsdl.data.conversion.convert` does, on the device, a channel at a time."""
        turned = stored.transpose(1, 2) if conversion.transpose else stored
        turned = turned.flip([dim for dim, flipped in ((1, conversion.flip_rows), (2, conversion.flip_columns)) if flipped])
        lower, weight = None, None
        if conversion.shading is not None:
            lower, weight = self._there(conversion.shading.lower), self._there(conversion.shading.weight)
        for channel, source in enumerate(turned):
            values = _averaged(source, conversion.downsample)
            if conversion.shading is not None:
                self._correct(values, conversion.shading, channel, lower, weight)
            values *= float(conversion.gain[channel])
            values += float(conversion.shift[channel])
            out[channel] = values

    def _correct(self, values: Tensor, shading: ShadingView, channel: int, lower: Tensor, weight: Tensor) -> None:
        """Do what `ShadingView.correct` does, to a whole channel."""
        across, slopes = self._there(shading.across[channel]), self._there(shading.slopes[channel])
        values -= float(shading.dark[channel])
        function = weight[:, None] * slopes[lower]
        function += across[lower]
        values /= function


def _averaged(source: Tensor, downsample: int) -> Tensor:
    """Return the means of the `downsample` × `downsample` squares of a stored channel (H, W), as float32."""
    if downsample == 1:
        return _unsigned(source)
    total = torch.zeros([side // downsample for side in source.shape], device=source.device)
    for row in range(downsample):
        for column in range(downsample):
            total += _unsigned(source[row::downsample, column::downsample])
    total /= torch.full((), float(downsample**2), device=source.device)  # dividing by a number, CUDA would multiply by its rounded inverse
    return total


def _unsigned(bits: Tensor) -> Tensor:
    """Return uint8, or uint16 whose bits are held as int16, as float32; exact."""
    return bits.float() if bits.dtype == torch.uint8 else bits.int().bitwise_and_(0xFFFF).float()
