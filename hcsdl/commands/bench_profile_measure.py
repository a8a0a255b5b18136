"""Where a network's training step spends its time, measured in one process: its operators, the rates of its convolutions, the machine's own rates.

In: a task of `bench_step_worker`. Out: a plain dict, for `bench_profile` to judge and print. Ways to run a convolution take turns in rounds; medians.

Ways: `stock`, torch's convolution and its backward on bf16 tensors in channels_last; `ipex`, the module `ipex.optimize` makes of it, where installed;
`hcsdl`, what the chosen kernels make of it; `matmul`, the weight gradient of a 1×1 convolution as a matrix product over the pixels.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hcsdl.commands.bench_step_worker import CHANNELS, CLASSES, Product, Step, turn
from hcsdl.config import ModelConfig
from hcsdl.kernels import Kernels, choose_kernels, ipex_problem
from hcsdl.machine.process import held_back_output
from hcsdl.models import build_model
from hcsdl.models.counts import Convolution, count

KINDS = ("forward", "input_gradient", "weight_gradient")
COPIED_BYTES = 256 * 2**20  # far beyond the caches
REPEATS = 5
WATCHED = 3  # steps
PRODUCTS = ("conv", "columnbackward", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "aten::baddbmm", "onednn")
"""What operators are called (or a part of it) that are convolutions or matrix products; M-CNN's columns have the backward passes of three in one."""
Ways = dict[str, dict[str, Callable[[], object]]]  # way → kind → call


def profile(task: dict[str, Any]) -> dict[str, Any]:
    """Return rates of matrix product and copy, a row per operator, and a row per distinct convolution of a network (see `bench_profile`)."""
    kernels = choose_kernels(task["kernels"])
    model = build_model(ModelConfig(name=task["model"], width=task["width"]), CHANNELS, CLASSES, tuple(task["image_size"]))
    counts = count(model, (CHANNELS, *task["image_size"]))
    product = Product(task)
    matrix_s = statistics.median(product() for _ in range(REPEATS))
    operators, copy_bytes_per_s, step_s = profile_step(task)
    convolutions = [
        {"convolution": str(one), "count": number, "flop": one.flop, "pointwise": one.pointwise, "deep": is_deep(one, task["image_size"])}
        | {"seconds": convolution_seconds(one, task["mini_batch_size"], kernels, task["rounds"])}
        for one, number in Counter(counts.convolutions).items()
    ]
    return {
        "kernels": kernels.name,
        "precision": kernels.precision,
        "matrix_flop_per_s": product.told["flop"] / matrix_s,
        "copy_bytes_per_s": copy_bytes_per_s,
        "step_s": step_s,
        "step_bytes": counts.step_bytes(task["mini_batch_size"]),
        "moved_bytes": counts.moved_bytes,
        "linear_flop": counts.linear_flop,
        "training_flop": counts.training_flop,
        "operators": operators,
        "convolutions": convolutions,
    }


def is_deep(convolution: Convolution, image_size: list[int]) -> bool:
    """Return whether a convolution works at a sixteenth of the image's rows or less: the last two stages of a ResNet."""
    return convolution.in_size[0] * 16 <= image_size[0]


def copy_rate() -> float:
    """Return the bytes a second that copying moves, those read and those written."""
    source = torch.ones(COPIED_BYTES // 2, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begun)
    return 2 * COPIED_BYTES / statistics.median(seconds[1:])


def convolution_seconds(one: Convolution, mini_batch_size: int, kernels: Kernels, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each product of a convolution over a mini-batch, {way: {kind: seconds}}, the ways in turn each round."""
    ways = _ways(one, mini_batch_size, kernels)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):  # the first is not counted
        for way, calls in ways.items():
            for kind, call in calls.items():
                begun = time.perf_counter()
                call()
                if number:
                    times.setdefault((way, kind), []).append(time.perf_counter() - begun)
    return {way: {kind: statistics.median(times[way, kind]) for kind in calls} for way, calls in ways.items()}


def _ways(one: Convolution, mini_batch_size: int, kernels: Kernels) -> Ways:
    images = _random(mini_batch_size, one.in_channels, *one.in_size, dtype=kernels.dtype)
    gradient = _random(mini_batch_size, one.out_channels, *one.out_size, dtype=kernels.dtype)
    weight = _random(one.out_channels, one.in_channels, *one.kernel, dtype=kernels.dtype)
    geometry = (one.stride, one.padding, (1, 1), False, (0, 0), 1)

    def backward(mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(gradient, images, weight, None, *geometry, mask)

    ways: Ways = {
        "stock": {
            "forward": lambda: torch.ops.aten.convolution(images, weight, None, *geometry),
            "input_gradient": lambda: backward([True, False, False]),
            "weight_gradient": lambda: backward([False, True, False]),
        }
    }
    if kernels.precision == "bf16" and not ipex_problem():
        ways["ipex"] = _of_module(_with_ipex(_module(one)), images, gradient)
    module = nn.Sequential(_module(one))
    prepared, _ = kernels.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    ways["hcsdl"] = _of_module(prepared, images, gradient, kernels)
    if one.pointwise:
        columns, pixels = (
            images.permute(0, 2, 3, 1).reshape(-1, one.in_channels),
            gradient.permute(0, 2, 3, 1).reshape(-1, one.out_channels),
        )
        ways["matmul"] = {"weight_gradient": lambda: pixels.t() @ columns}
    if not one.input_gradient:
        for calls in ways.values():
            calls.pop("input_gradient", None)
    return ways


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def _module(one: Convolution) -> nn.Conv2d:
    return nn.Conv2d(one.in_channels, one.out_channels, one.kernel, one.stride, one.padding, bias=False)


def _with_ipex(module: nn.Module) -> nn.Module:
    import intel_extension_for_pytorch as ipex

    with held_back_output():
        return ipex.optimize(module.train(), optimizer=torch.optim.SGD(module.parameters(), lr=0.1), dtype=torch.bfloat16)[0]


def _of_module(module: nn.Module, images: torch.Tensor, gradient: torch.Tensor, kernels: Kernels | None = None) -> dict[str, Callable]:
    """Return the three products as autograd runs them for `module`; each backward pass is asked for one gradient only."""
    autocast = kernels.autocast if kernels else lambda: torch.autocast("cpu", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        with autocast():
            return module(images)

    def graph(of_images: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        wanted = [images.detach().requires_grad_()] if of_images else [p for p in module.parameters() if p.numel()]
        for parameter in module.parameters():
            parameter.requires_grad_(not of_images)
        with autocast():
            output = module(wanted[0] if of_images else images)
        for parameter in module.parameters():
            parameter.requires_grad_()
        return output, wanted

    def gradient_of(of_images: bool) -> Callable[[], object]:
        output, wanted = graph(of_images)
        like = gradient.to(output.dtype)
        return lambda: torch.autograd.grad(output, wanted, like, retain_graph=True, allow_unused=True)

    def without_graph() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    return {"forward": without_graph, "input_gradient": gradient_of(True), "weight_gradient": gradient_of(False)}


def profile_step(task: dict[str, Any]) -> tuple[list[dict[str, Any]], float, float]:
    """Return a row per operator of one step with the chosen kernels, by their own time, the copy rate beside it, and the median seconds of steps unwatched.

    How fast memory is changes from minute to minute on a shared machine: copying and a watched step take turns, and the turn counts whose operators
    other than convolutions and products took the median number of such copies.
    """
    variant = {"auto": "hcsdl_best", "native": "hcsdl_native", "ipex": "hcsdl_ipex"}.get(task["kernels"], "hcsdl_best")
    step = Step(task | {"variant": variant})
    step_s = statistics.median(turn(step, REPEATS - 2, warm=False)["step_s"])
    step()  # which fetches the memory that a turn gives back
    turns = [(copy_rate(), watched(step)) for _ in range(WATCHED)]
    rate, operators = sorted(turns, key=lambda one: one[0] * sum(row["seconds"] for row in one[1] if not row["product"]))[WATCHED // 2]
    return operators, rate, step_s


def watched(step: Step) -> list[dict[str, Any]]:
    """Return a row per operator of one step."""
    with (
        held_back_output(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True) as seen,
    ):
        step()
    return own_times(seen.profiler.kineto_results.events())  # torch's own tables know no element types, hence no bytes


def own_times(events: Any) -> list[dict[str, Any]]:
    """Return a row per operator, the longest first: its own seconds (without those of the operators it calls), calls, and bytes of its tensors."""
    rows: dict[str, dict[str, Any]] = {}
    open_events: dict[int, list[tuple[int, dict[str, Any]]]] = {}  # by thread
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        name = event.name()
        row = rows.setdefault(name, {"operator": name, "calls": 0, "seconds": 0.0, "bytes": 0, "product": is_product(name)})
        stack = open_events.setdefault(event.start_thread_id(), [])
        while stack and stack[-1][0] <= event.start_ns():
            stack.pop()
        seconds = event.duration_ns() / 1e9
        if stack:
            stack[-1][1]["seconds"] -= seconds
        row["calls"] += 1
        row["seconds"] += seconds
        row["bytes"] += _argument_bytes(event)
        stack.append((event.start_ns() + event.duration_ns(), row))
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def is_product(operator: str) -> bool:
    """Return whether an operator is a convolution or a matrix product, by its name."""
    return any(part in operator.lower() for part in PRODUCTS)


ITEM_BYTES = {
    "float": 4,
    "c10::BFloat16": 2,
    "long int": 8,
    "long": 8,
    "int": 4,
    "unsigned char": 1,
    "bool": 1,
    "double": 8,
    "signed char": 1,
}


def _argument_bytes(event: Any) -> int:
    total = 0
    for shape, kind in zip(event.shapes(), event.dtypes(), strict=False):
        size = ITEM_BYTES.get(kind, 0)
        if shape and size and all(isinstance(length, int) for length in shape):
            for length in shape:
                size *= length
            total += size
    return total
