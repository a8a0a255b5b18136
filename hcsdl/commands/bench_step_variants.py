"""The ways to run a training step that `hcsdl bench step` compares: what each is, and the environment its processes start in.

In: a variant's name, the place of each rank. Out: a `Variant`, environments. What a variant does in its processes stands in `bench_step_worker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hcsdl.machine.binding import place_environment
from hcsdl.machine.placement import Place
from hcsdl.machine.preloading import HOW_TO_GET, find_allocator, launcher_environment

LEAN = {"checkpoint_activations": "selective"}
"""What hcsdl's lean mode sets of `ModelConfig`."""


@dataclass(frozen=True)
class Variant:
    """`letter` as the table has it; `kernels`: hcsdl's name for them, empty where hcsdl is not asked; `base`: the stock way otherwise."""

    name: str
    letter: str
    title: str
    base: str = ""
    kernels: str = ""
    once: bool = False
    preloaded: bool = False
    lean: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is hcsdl's own: then it runs with hcsdl's allocator setting and places."""
        return bool(self.kernels)


VARIANTS = {
    one.name: one
    for one in (
        Variant("fp32", "a", "PyTorch, fp32, as it comes", base="fp32", once=True),
        Variant("bf16", "b", "PyTorch, bf16 autocast, channels_last", base="bf16"),
        Variant("ipex_recipe", "c", "IPEX's documented training recipe, bf16", base="ipex"),
        Variant("bf16_preloaded", "d", "b, allocator preloaded, threads pinned", base="bf16", preloaded=True),
        Variant("ipex_recipe_preloaded", "d", "c, allocator preloaded, threads pinned", base="ipex", preloaded=True),
        Variant("compiled", "e", "torch.compile of b", base="compiled", once=True),
        Variant("hcsdl_native", "f", "hcsdl, kernels=native", kernels="native"),
        Variant("hcsdl_ipex", "f", "hcsdl, kernels=ipex", kernels="ipex"),
        Variant("hcsdl_best", "g", "hcsdl, kernels=auto", kernels="auto"),
        Variant("hcsdl_lean", "g", "hcsdl, kernels=auto, checkpoint_activations=selective", kernels="auto", lean=True),
    )
}


def chosen(asked: Sequence[str] | None, model: str, targets: bool) -> list[Variant]:
    """Return the variants to measure for `model`, in the table's order."""
    lean = targets and model == "resnet50"
    return [one for one in VARIANTS.values() if (one.name in asked if asked is not None else lean or not one.lean)]


def missing(variant: Variant, preload: str | None, device: str = "cpu") -> str:
    """Return why a variant cannot be started here; empty where it can. (That IPEX is not installed its own process finds out.)"""
    if device == "cuda" and (variant.preloaded or "ipex" in (variant.base, variant.kernels)):
        return "it is for processors"
    if device == "cuda" and variant.kernels == "native":
        return "on GPUs it is what kernels=auto is"
    return HOW_TO_GET if variant.preloaded and find_allocator(preload) is None else ""


def environments(variant: Variant | None, places: Sequence[Place], preload: str | None, cache: Path) -> list[dict[str, str]]:
    """Return the variables each rank's process starts with: threads; of hcsdl's own where they run; of a preloaded one what launchers set.

    `cache` is where compilers keep what they made: a folder of this variant alone, so that a start-up pays for compiling.
    """
    caches = {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    if variant is None or variant.ours:
        return [place_environment(place) | caches for place in places]
    allocator = find_allocator(preload) if variant.preloaded else None
    if allocator is not None:
        return [launcher_environment(place, allocator) | caches for place in places]
    return [{"OMP_NUM_THREADS": str(place.threads)} | caches for place in places]
