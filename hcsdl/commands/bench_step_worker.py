"""One process of `hcsdl bench step`: a rank of one variant, of the matrix product, or of a network's profile.

In: a task, as JSON in the first argument; commands, a JSON object a line, on standard input. Out: an answer a line. Between commands the process
sleeps, its freed memory given back. Stock variants run as their projects document it, on the very network hcsdl trains, with no setting of hcsdl's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcsdl.commands.bench_step_variants import LEAN, VARIANTS, Variant
from hcsdl.config import DistributedConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from hcsdl.distributed.identity import launcher_process, who_am_i
from hcsdl.machine.binding import affinity_kept
from hcsdl.machine.memory import keep_freed_memory, peak_rss_gib, release_freed_memory
from hcsdl.machine.process import die_with_parent, held_back_output

if TYPE_CHECKING:
    import torch

CHANNELS, CLASSES = 3, 13  # of BBBC021
RATE, MOMENTUM = 1e-3, 0.9
# 137 GFLOP a product, 32 MiB a matrix: far beyond the caches, a fraction of a second; of a GPU 9 TFLOP, some 10 ms
MATRIX_SIZE = {"cpu": 4096, "cuda": 16384}


class Missing(Exception):
    """What this variant needs is not there; the text is the reason."""


def device_of(task: dict[str, Any], ours: bool) -> torch.device:
    """Return the device of this process, as hcsdl sets it up where the variant is `ours`, else as torch comes."""
    import torch

    from hcsdl.kernels.device import own_device

    if ours or task["device"] == "cpu":
        return own_device(task["device"], who_am_i().local_rank)
    device = torch.device("cuda", who_am_i().local_rank)
    torch.cuda.set_device(device)
    return device


class Step:
    """A network with all a training step needs, as `variant` has it."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        from hcsdl.kernels.device import wait_for
        from hcsdl.models import build_model
        from hcsdl.training.objectives import build_objective
        from hcsdl.training.optimizers import build_optimizer

        self.variant: Variant = VARIANTS[task["variant"]]
        self.wait_for = wait_for
        torch.manual_seed(task["seed"])
        rows, columns = task["image_size"]
        lean = LEAN if self.variant.lean else {}
        model = build_model(ModelConfig(name=task["model"], width=task["width"], **lean), CHANNELS, CLASSES, (rows, columns))
        self.loss = build_objective(ObjectiveConfig()).loss
        self.device = device_of(task, self.variant.ours)
        model.to(self.device)
        self.images = torch.randn(task["mini_batch_size"], CHANNELS, rows, columns).to(self.device)
        self.labels = torch.arange(len(self.images), device=self.device) % CLASSES
        self.autocast: Any = nullcontext
        self.told: dict[str, object] = {}
        if self.variant.base != "fp32":
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        if self.variant.ours:
            optimizer = build_optimizer(model, TrainingConfig(learning_rate=RATE, momentum=MOMENTUM))
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.model, self.optimizer = self._prepare(model.train(), optimizer)
        self._share_gradients(task)
        if self.variant.base == "compiled":
            self.model = torch.compile(self.model)

    def _prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        import torch

        from hcsdl.kernels import choose_kernels, ipex_problem

        if self.variant.ours:
            if self.variant.kernels == "ipex" and (problem := ipex_problem()):
                raise Missing(problem)
            kernels = choose_kernels(self.variant.kernels, self.device)
            self.autocast = kernels.autocast
            self.images = self.images.to(kernels.image_dtype)  # as our loader gives them
            self.told = {"kernels": kernels.name, "precision": kernels.precision, "reason": kernels.reason}
            return kernels.prepare(model, optimizer)
        if self.variant.base == "fp32":
            return model, optimizer
        self.autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)
        if self.variant.base == "ipex":
            if problem := ipex_problem():
                raise Missing(problem)
            import intel_extension_for_pytorch as ipex

            with held_back_output():
                return ipex.optimize(model, optimizer=optimizer, dtype=torch.bfloat16)
        return model.to(memory_format=torch.channels_last), optimizer

    def _share_gradients(self, task: dict[str, Any]) -> None:
        """Wrap the network where there are several ranks: hcsdl's by its group, the others by plain DistributedDataParallel over gloo or NCCL."""
        identity = who_am_i()
        if identity.world_size == 1:
            return
        import torch

        from hcsdl.distributed.group import Group

        on_gpu = self.device.type == "cuda"
        settings = task["distributed"] if self.variant.ours else {"backend": "nccl" if on_gpu else "gloo"}
        self.group = Group(identity, DistributedConfig(**settings), self.device)
        if self.variant.ours:
            self.group.choose_backend(self.model)
            self.model = self.group.wrap(self.model)
            self.told["backend"] = self.group.backend
        else:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=[self.device] if on_gpu else None)

    def __call__(self) -> float:
        """Take one step; return its seconds."""
        begun = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        context: AbstractContextManager = self.autocast()
        with context:
            logits = self.model(self.images)
        self.loss(logits, self.labels).backward()
        self.optimizer.step()
        self.wait_for(self.device)
        return time.monotonic() - begun


class Product:
    """The device's bf16 matrix product: a large square one, fp32 where it has no bf16 (`precision` tells)."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        from hcsdl.kernels import choose_kernels
        from hcsdl.kernels.device import device_name, wait_for

        self.device, self.wait_for = device_of(task, ours=True), wait_for
        kernels, size = choose_kernels("native", self.device), MATRIX_SIZE[self.device.type]
        self.left, self.right = (torch.randn(size, size, device=self.device).to(kernels.dtype) for _ in range(2))
        self.told: dict[str, object] = {"precision": kernels.precision, "flop": 2 * size**3, "device_name": device_name(self.device)}

    def __call__(self) -> float:
        """Multiply once; return the seconds."""
        begun = time.monotonic()
        self.left @ self.right
        self.wait_for(self.device)
        return time.monotonic() - begun


def turn(call: Any, steps: int, warm: bool) -> dict[str, Any]:
    """Return the seconds of `steps` calls, after one that is not counted (unless `warm`), and when that was."""
    from hcsdl.kernels.memory import release_freed_tensors

    began = time.monotonic()
    if not warm:
        call()
    seconds = [call() for _ in range(steps)]
    answer = {"step_s": seconds, "began_s": began, "ended_s": time.monotonic()} | peaks(call.device)
    release_freed_memory()
    release_freed_tensors()
    if call.device.type == "cuda":
        importlib.import_module("torch").cuda.empty_cache()
    return answer


def peaks(device: torch.device) -> dict[str, float]:
    """Return the most memory and GPU memory of this process so far, in GiB."""
    from hcsdl.kernels.device import peak_device_gib

    return {"peak_rss_gib": peak_rss_gib(), "peak_device_gib": peak_device_gib(device)}


def answers(task: dict[str, Any], command: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Do one command: `start` builds and takes the first step; `turn` times steps; `profile` measures a network's operators and convolutions."""
    if command["do"] == "profile":
        from hcsdl.commands.bench_profile_measure import profile

        return profile(task)
    if command["do"] == "start":
        state["call"] = (Product if task["kind"] == "product" else Step)(task)
        state["call"]()
        return {"told": state["call"].told} | peaks(state["call"].device)
    return turn(state["call"], command["steps"], command["warm"])


def main() -> int:
    """Answer commands until standard input ends."""
    task = json.loads(sys.argv[1])
    die_with_parent(launcher_process())
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    ours = task["kind"] != "step" or VARIANTS[task["variant"]].ours
    if ours and task["allocator"] == "keep":
        keep_freed_memory()
    with affinity_kept() if ours else nullcontext():
        importlib.import_module("torch")
    if ours and task["allocator"] == "keep":
        importlib.import_module("hcsdl.kernels.memory").keep_tensors_in_huge_pages()
    if task.get("preload") and Path(task["preload"]).name not in Path("/proc/self/maps").read_text():
        print(f"{task['preload']} was not loaded: it must be a shared library for this processor (bench.preload).", file=sys.stderr)
        return 1
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = answers(task, json.loads(line), state)
        except Missing as error:
            answer = {"missing": str(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()
    os._exit(0)  # collectives' threads of several ranks need not end in any order


if __name__ == "__main__":
    sys.exit(main())
