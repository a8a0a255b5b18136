"""How many fields a rank takes at once: the largest mini-batch that its node's memory holds, or its GPU's, known before the first step.

In: what a forward and backward pass over one field, and over two, made of this process, and what a node's ranks may hold together. Out: the number of
fields, the same on every rank, or a ConfigError. Promised: no pass is made that is not known to fit, but the first, over one field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hcsdl.config import ConfigError
from hcsdl.training.budget import gib


@dataclass(frozen=True)
class Footprint:
    """Peak of resident or GPU memory that one rank's passes reach, in GiB: `fixed_gib`, and `field_gib` more for each field of its mini-batch.

    What a pass keeps grows with its fields in proportion; what does not (weights, gradients, code) is the rest.
    """

    fixed_gib: float
    field_gib: float

    def peak_gib(self, fields: int) -> float:
        """Return the peak with a mini-batch of so many fields."""
        return self.fixed_gib + fields * self.field_gib


@dataclass(frozen=True)
class Need:
    """One rank: the node it is on (a GPU counts as one), its peak with a mini-batch of 1, 2, … fields, and what its node may hold, in GiB.

    Whole trainings of ResNet-18, ResNet-50 and M-CNN, scores and checkpoints included, stayed within 3 % of these peaks (BENCHMARKS.md).
    """

    node: str
    peaks_gib: Sequence[float]
    limit_gib: float


def measured(before_gib: float, one_gib: float, two_gib: float | None = None) -> Footprint:
    """Return the footprint told by the peaks before the first pass, after one over one field, and after one over two.

    Without the last, the whole of the first pass is taken to be the field's: more than it will need.
    """
    if two_gib is None:
        return Footprint(before_gib, one_gib - before_gib)
    return Footprint(2 * one_gib - two_gib, two_gib - one_gib)


def fullest(needs: Sequence[Need], fields: int) -> tuple[float, float]:
    """Return (GiB needed, GiB allowed) of the node that a mini-batch of `fields` on every rank fills most."""
    nodes = []
    for name in sorted({need.node for need in needs}):
        here = [need for need in needs if need.node == name]
        nodes.append((sum(need.peaks_gib[fields - 1] for need in here), min(need.limit_gib for need in here)))
    return max(nodes, key=lambda node: node[0] / node[1])


def largest_fitting(needs: Sequence[Need], share: int, memory_share: float) -> int:
    """Return the largest divisor of `share` fields that takes at most `memory_share` of every node's memory; 0 where not even one field does."""
    for fields in (n for n in range(share, 0, -1) if share % n == 0):
        if _fits(needs, fields, memory_share):
            return fields
    return 0


def settle(
    asked: int | None,
    share: int,
    memory_share: float,
    peak_after: Callable[[int], float],
    gather: Callable[[Footprint], list[Need]],
    whose: str = "node",
) -> tuple[int, float]:
    """Return the mini-batch that all ranks will take, and the peak in GiB that is predicted for the node it fills most.

    Parameters
    ----------
    asked : fields asked for; None: as many as fit.
    share : fields of a step that fall to this rank; the mini-batch divides it.
    memory_share : part of a node's memory that may be filled, where it is ours to choose.
    peak_after : makes a throw-away pass over so many fields, none for 0; returns this process's peak in GiB.
    gather : footprint of this rank's passes → `Need` of all ranks, in their order, for up to `share` fields, with all else that a rank will hold.
    whose : node or GPU: what the memory is called.

    Raises ConfigError where the mini-batch asked for, or a single field, does not fit.
    """
    before, one = peak_after(0), peak_after(1)
    needs = gather(measured(before, one))
    wanted = asked or share
    unsure = asked is None or largest_fitting(needs, wanted, memory_share) < wanted
    if unsure and wanted > 1 and _fits(needs, 2, memory_share):
        needs = gather(measured(before, one, peak_after(2)))
    fields = asked or largest_fitting(needs, share, memory_share)
    memory_share = 1.0 if asked else memory_share
    if fields and _fits(needs, fields, memory_share):
        return fields, fullest(needs, fields)[0]
    fitting, refused = largest_fitting(needs, share, memory_share), asked or 1
    needed, allowed = fullest(needs, refused)
    less = f"take {'fewer ranks a node or ' * (whose == 'node')}model.checkpoint_activations=full"
    less += ", or a larger training.memory_share" * (asked is None and memory_share < 1)
    remedy = f"training.mini_batch_size={fitting} would fit" if fitting else less
    raise ConfigError(
        f"a mini-batch must fit into its {whose}'s memory. With {refused} field{'s' * (refused > 1)} a rank the {whose} would hold about "
        f"{gib(needed)} GiB, and it may hold {gib(memory_share * allowed)}: {remedy}."
    )


def _fits(needs: Sequence[Need], fields: int, memory_share: float) -> bool:
    needed, allowed = fullest(needs, fields)
    return needed <= memory_share * allowed
