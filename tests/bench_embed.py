"""By hand: how much faster is a network at embedding than at learning?

    python tests/bench_embed.py [model …] [rounds=5] [kernels=auto]

Whole training steps (mini-batch 2) and passes of the network for inference (mini-batch 4) take turns in one process, at 3 × 1024 × 1280, on images in
memory; prints the median images/s of both and their ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from hcsdl.config import ModelConfig, ObjectiveConfig, TrainingConfig
from hcsdl.kernels import Kernels, choose_kernels
from hcsdl.kernels.inference import for_inference
from hcsdl.machine.memory import keep_freed_memory, peak_rss_gib
from hcsdl.models import build_model
from hcsdl.training.objectives import build_objective
from hcsdl.training.optimizers import build_optimizer

CHANNELS, CLASSES, SIZE, LEARNING, EMBEDDING = 3, 13, (1024, 1280), 2, 4


def images(count: int) -> torch.Tensor:
    """Return images like those a loader gives."""
    return torch.randn(count, CHANNELS, *SIZE).contiguous(memory_format=torch.channels_last)


def learning(name: str, kernels: Kernels) -> Callable[[], None]:
    """Return a training step."""
    model = build_model(ModelConfig(name=name), CHANNELS, CLASSES, SIZE).train()
    model, optimizer = kernels.prepare(model, build_optimizer(model, TrainingConfig(learning_rate=1e-3)))
    loss, batch, labels = build_objective(ObjectiveConfig()).loss, images(LEARNING), torch.arange(LEARNING)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with kernels.autocast():
            logits = model(batch)
        loss(logits, labels).backward()
        optimizer.step()

    return step


def embedding(name: str, kernels: Kernels) -> Callable[[], None]:
    """Return a pass as `hcsdl embed` makes it."""
    network, batch = for_inference(build_model(ModelConfig(name=name), CHANNELS, CLASSES, SIZE), kernels), images(EMBEDDING)

    @torch.no_grad()
    def step() -> None:
        with kernels.autocast():
            network(batch)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Return how long it takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def main() -> None:
    """Measure each model."""
    options = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
    kernels = choose_kernels(options.get("kernels", "auto"))
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels {kernels.name} ({kernels.precision})", flush=True)
    for name in [word for word in sys.argv[1:] if "=" not in word] or ["resnet50", "resnet18", "mcnn"]:
        torch.manual_seed(0)
        steps = {LEARNING: learning(name, kernels), EMBEDDING: embedding(name, kernels)}
        for step in steps.values():
            step(), step()
        taken = {count: [] for count in steps}
        for _ in range(int(options.get("rounds", 5))):
            for count, step in steps.items():
                taken[count].append(count / seconds(step))
        learned, embedded = (statistics.median(taken[count]) for count in steps)
        print(
            f"{name}: training {learned:.3f}, embedding {embedded:.3f} images/s, ratio {embedded / learned:.2f}, peak {peak_rss_gib():.1f} GiB"
        )


if __name__ == "__main__":
    main()
