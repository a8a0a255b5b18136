"""How a model's operators run on this processor or GPU: precision, memory format, IPEX, our own.

In: a kernels setting, then a model and its optimizer. Out: both, prepared, and the autocast context to run them under.
`choose_kernels` resolves `auto` once, says why, and never changes numbers silently: what it fell back to stands in `reason`.
"""

from __future__ import annotations

import importlib.metadata
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from hcsdl.config import ConfigError
from hcsdl.kernels.device import CPU, device_name
from hcsdl.kernels.native.build import NoLibrary
from hcsdl.kernels.replacement import compile_operators, replace_operators
from hcsdl.machine.cores import bf16_flags
from hcsdl.machine.process import held_back_output

log = logging.getLogger(__name__)
FIRST_WITH_BF16 = (8, 0)  # compute capability: Ampere


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels: `name` is reference, native, ipex or fused; `precision` is fp32 or bf16; `reason` a sentence; `warning` may be empty.

    Equal are those of the same name and precision: why they were chosen may differ from node to node. `device` is where they run.
    """

    name: str
    precision: str
    reason: str = field(compare=False)
    warning: str = field(default="", compare=False)
    device: torch.device = field(default=CPU, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type convolutions take and give."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def image_dtype(self) -> torch.dtype:
        """The type the loader makes images in: `dtype`, to which the network rounds them first of all; on a GPU float32, which scales them itself."""
        return self.dtype if self.device.type == "cpu" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """Return the context under which forward passes run: bf16 autocast, or nothing in fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple:
        """Return the model and optimizer as these kernels want them; the caller keeps no other reference to either.

        The model's parameters stay plain fp32 tensors under their own names, so that a `state_dict` needs no translation. Optimizer state
        loaded before this call resumes bit-exactly. reference leaves everything as it is; the others use channels_last. What fused replaces is
        counted by `hcsdl.kernels.replacement.replaced`.
        """
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise TypeError("kernels prepare a bare model: call prepare() before wrapping the model in DistributedDataParallel.")
        if self.name == "reference":
            return model, optimizer
        model = model.to(memory_format=torch.channels_last)
        if self.name == "fused":
            if not replace_operators(model):
                log.warning("warning: kernels=fused: %s has nothing to replace: it runs as with kernels=native.", type(model).__name__)
            if optimizer is not None and "fused" in optimizer.defaults:
                _fuse(optimizer)
        if self.name == "ipex" and optimizer is not None:
            import intel_extension_for_pytorch as ipex

            with held_back_output():
                model, optimizer = ipex.optimize(model, optimizer=optimizer, dtype=torch.float32, weights_prepack=False, inplace=True)
        return model, optimizer


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's SGD or AdamW read and write each weight once a step.

    They copy a gradient that is not contiguous, and leave the copy unused (2.8, 2.13); so for the step torch sees its dimensions in memory's order.
    The step must have no closure, which would meet the weights like that.
    """
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
    turned: list[torch.Tensor] = []

    def before(moving: torch.optim.Optimizer, *_: object) -> None:
        after(moving)  # a step that failed
        _lay_out_alike(moving)
        turned[:] = [
            weight for group in moving.param_groups for weight in group["params"] if weight.grad is not None and _is_turned(weight)
        ]
        _turn(moving, turned, (0, 2, 3, 1))

    def after(moving: torch.optim.Optimizer, *_: object) -> None:
        _turn(moving, turned, (0, 3, 1, 2))
        turned.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _is_turned(weight: torch.Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _turn(optimizer: torch.optim.Optimizer, weights: list[torch.Tensor], order: tuple[int, ...]) -> None:
    """Permute the dimensions of weights, their gradients and their state, where they are in memory."""
    for weight in weights:
        gradient, state = weight.grad, optimizer.state.get(weight, {})
        state |= {key: value.permute(order) for key, value in state.items() if torch.is_tensor(value) and value.shape == weight.shape}
        weight.grad = None
        weight.data = weight.data.permute(order)
        weight.grad = None if gradient is None else gradient.permute(order)


@torch.no_grad()
def _lay_out_alike(optimizer: torch.optim.Optimizer) -> None:
    """Bring gradients and state into their weights' memory format: torch's fused optimizers go through memory and take it to be the same."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None and _steps(weight.grad) != _steps(weight):
                weight.grad = torch.empty_like(weight).copy_(weight.grad)
            state = optimizer.state.get(weight, {})
            for key, value in state.items():
                if torch.is_tensor(value) and value.shape == weight.shape and _steps(value) != _steps(weight):
                    state[key] = torch.empty_like(weight).copy_(value)


def _steps(tensor: torch.Tensor) -> list[int]:
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def choose_kernels(name: str, device: torch.device = CPU) -> Kernels:
    """Return the kernels for a setting (`auto`, `reference`, `native`, `ipex`, `fused`) on this processor and these packages, or on a GPU.

    `auto` is fused, which was the fastest for each of our networks where it was measured (BENCHMARKS.md). Where our operators cannot be
    compiled or run, fused is native, and auto is ipex or native, with a warning. bf16 convolutions without AVX512_BF16 or AMX are 4 to 16 times
    slower than fp32 (pytorch/pytorch#183815), so without them every choice runs in fp32, with a warning. Raises ConfigError where IPEX is asked
    for by name and cannot be had. On a GPU there are reference and native, which auto is.
    """
    if name == "reference":
        return Kernels("reference", "fp32", "asked for", device=device)
    if device.type == "cuda":
        return _on_gpu(name, device)
    if name == "ipex" and (problem := ipex_problem()):
        raise ConfigError(f"kernels=ipex needs intel-extension-for-pytorch and a torch of the same version. {problem} Use kernels=native.")
    chosen, reasons, warnings = name, [], []
    if name in ("auto", "fused"):
        try:
            chosen, reason = "fused", f"our operators compiled for {compile_operators()}"
        except NoLibrary as error:
            chosen, reason = "native", f"no operators of our own: {error}"
            warnings.append(f"kernels={name}: our own operators cannot be had, since {error}: those of PyTorch run in their place, slower.")
        reasons.append(reason)
    flags = bf16_flags()
    if not flags:
        warnings.append(
            f"kernels={name}: this processor has neither AVX512_BF16 nor AMX, where bf16 is slower than fp32: training in fp32."
        )
        return Kernels(chosen, "fp32", "; ".join(["no bf16 instructions", *reasons]), " ".join(warnings))
    if name == "auto":
        reasons.insert(0, f"the processor has {' and '.join(f.upper() for f in flags)}")
        if chosen == "native":
            problem = ipex_problem()
            chosen = "native" if problem else "ipex"
            reasons.append(problem or "IPEX imports")
    else:
        reasons.insert(0, "asked for")
    return Kernels(chosen, "bf16", "; ".join(reasons), " ".join(warnings))


def _on_gpu(name: str, device: torch.device) -> Kernels:
    reason = "torch's own are what a GPU has" if name == "auto" else "asked for"
    if torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16:
        return Kernels("native", "bf16", reason, device=device)
    warning = f"kernels={name}: {device_name(device)} has no bf16 (compute capability 8.0 has): training in fp32."
    return Kernels("native", "fp32", f"no bf16; {reason}", warning, device)


def ipex_problem() -> str:
    """Return why IPEX cannot be used, as a sentence; empty where it can. Importing a mismatched IPEX ends the process, so versions first."""
    try:
        version = importlib.metadata.version("intel-extension-for-pytorch")
    except importlib.metadata.PackageNotFoundError:
        return "IPEX is not installed."
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"IPEX {version} is for torch {'.'.join(version.split('.')[:2])}, and torch is {torch.__version__}."
    try:
        with held_back_output():
            import intel_extension_for_pytorch  # noqa: F401
    except Exception as error:  # whatever the import of a native library may raise
        return f"IPEX {version} does not import: {error}."
    return ""
