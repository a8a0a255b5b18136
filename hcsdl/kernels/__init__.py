"""How a model's operators run on this processor: precision, memory format, IPEX.

In: a kernels setting, then a model and its optimizer. Out: both, prepared, and the autocast context to run them under.
`choose_kernels` resolves `auto` once, says why, and never changes numbers silently: what it fell back to stands in `reason`.
"""

from __future__ import annotations

import importlib.metadata
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from hcsdl.config import ConfigError
from hcsdl.machine.cores import bf16_flags
from hcsdl.machine.process import held_back_output


@dataclass(frozen=True)
class Kernels:
    """The chosen kernels: `name` is reference, native or ipex; `precision` is fp32 or bf16; `reason` a sentence; `warning` may be empty."""

    name: str
    precision: str
    reason: str
    warning: str = ""

    def autocast(self) -> AbstractContextManager:
        """Return the context under which forward passes run: bf16 autocast, or nothing in fp32."""
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> tuple:
        """Return the model and optimizer as these kernels want them; the caller keeps no other reference to either.

        The model's parameters stay plain fp32 tensors under their own names, so that a `state_dict` needs no translation. Optimizer state
        loaded before this call resumes bit-exactly. reference leaves everything as it is; native and ipex use channels_last.
        """
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise TypeError("kernels prepare a bare model: call prepare() before wrapping the model in DistributedDataParallel.")
        if self.name == "reference":
            return model, optimizer
        model = model.to(memory_format=torch.channels_last)
        if self.name == "ipex" and optimizer is not None:
            import intel_extension_for_pytorch as ipex

            with held_back_output():
                model, optimizer = ipex.optimize(model, optimizer=optimizer, dtype=torch.float32, weights_prepack=False, inplace=True)
        return model, optimizer


def choose_kernels(name: str) -> Kernels:
    """Return the kernels for a setting (`auto`, `reference`, `native`, `ipex`) on this processor and these packages.

    bf16 convolutions without AVX512_BF16 or AMX are 4 to 16 times slower than fp32 (pytorch/pytorch#183815), so without them every choice
    runs in fp32, with a warning. Raises ConfigError where IPEX is asked for by name and cannot be had.
    """
    if name == "reference":
        return Kernels("reference", "fp32", "asked for")
    flags, problem = bf16_flags(), ipex_problem() if name in ("auto", "ipex") else ""
    if name == "ipex" and problem:
        raise ConfigError(f"kernels=ipex needs intel-extension-for-pytorch and a torch of the same version. {problem} Use kernels=native.")
    if not flags:
        warning = f"kernels={name}: this processor has neither AVX512_BF16 nor AMX, where bf16 is slower than fp32: training in fp32."
        return Kernels("native" if name == "auto" else name, "fp32", "no bf16 instructions", warning)
    having = f"the processor has {' and '.join(f.upper() for f in flags)}"
    if name != "auto":
        return Kernels(name, "bf16", "asked for")
    if problem:
        return Kernels("native", "bf16", f"{having}; {problem}")
    return Kernels("ipex", "bf16", f"{having} and IPEX imports")


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
