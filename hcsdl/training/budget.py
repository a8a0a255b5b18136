"""Whether a run ends before its job does, and fits into its node's memory: told before the first step.

In: plain numbers, measured a moment before. Out: seconds, GiB, sentences. Promised: no clock, no environment, no ranks in here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

FORWARD_SHARE = 1 / 3  # of a training step; the backward pass computes two gradients for each product of the forward pass


def evaluations_left(first_step: int, last_step: int, steps_per_evaluation: float) -> int:
    """Return how often a run is evaluated from `first_step` (done) to `last_step`: at the end of each so many steps, and after the last."""
    begun, before, done = (math.floor(step / steps_per_evaluation + 1e-9) for step in (first_step, last_step - 1, last_step))
    return done - begun + (before == done)


def predict_s(step_s: float, steps: int, evaluations: int, evaluated_fields: int, global_batch_size: int) -> float:
    """Return the seconds that `steps` steps of `step_s` each take, with `evaluations` forward passes over `evaluated_fields` fields.

    Checkpoints, the optimizer, and waiting for images that come slower than the network takes them, are not in it.
    """
    evaluation_s = FORWARD_SHARE * step_s * evaluated_fields / global_batch_size
    return steps * step_s + evaluations * evaluation_s


def images_gib(shape: Sequence[int], bytes_of_value: int) -> float:
    """Return what images of `shape` (N, C, H, W) take, in GiB."""
    return math.prod(shape) * bytes_of_value / 2**30


def optimizer_gib(num_parameters: int, slots: int) -> float:
    """Return what an optimizer will keep for `num_parameters` parameters, `slots` float32 values each, in GiB."""
    return num_parameters * slots * 4 / 2**30


def prediction(steps: int, needed_s: float, now: datetime, peak_gib: float, limit_gib: float, whose: str = "node") -> str:
    """Return the sentence that is printed before the first step; the memory is a node's or a GPU's (`whose`)."""
    return (
        f"predicted: {steps:,} step{'s' * (steps != 1)} in {duration(needed_s)}, done about {moment(now, needed_s)}; "
        f"peak memory about {gib(peak_gib)} of {gib(limit_gib)} GiB a {whose}"
    )


def objections(
    needed_s: float, left_s: float, length_s: float, now: datetime, peak_gib: float, limit_gib: float, whose: str = "node"
) -> list[str]:
    """Return a sentence for each limit that will not do.

    Parameters
    ----------
    needed_s, left_s, length_s : seconds that the rest of the run takes, that this job still has, and that a job of its kind has from its start;
        infinity where there is no limit.
    peak_gib, limit_gib : memory of the fullest node or GPU (`whose`), and what it may hold.
    """
    found = []
    if needed_s > left_s:
        more = math.ceil((needed_s - left_s) / length_s)
        found.append(
            f"the run must end before its job does. It needs {duration(needed_s)} and Slurm ends the job in {duration(left_s)}, "
            f"about {moment(now, left_s)}: ask for a longer --time, or let it be requeued about {more} time{'s' * (more > 1)}, "
            f"each going on for up to {duration(length_s)} from the last checkpoint."
        )
    if peak_gib > limit_gib:
        found.append(
            f"the ranks of a {whose} must fit into its memory. They will hold about {gib(peak_gib)} GiB and may hold {gib(limit_gib)}: "
            f"{'fewer ranks a node, ' * (whose == 'node')}a smaller training.mini_batch_size, or model.checkpoint_activations=full."
        )
    return found


def gib(value: float) -> str:
    """Return an amount of memory to three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a length of time in words: `45 s`, `12 min`, `2 h 10 min`, `3 d 4 h`.

    >>> duration(7800)
    '2 h 10 min'
    """
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def moment(now: datetime, seconds: float) -> str:
    """Return the time of day so many seconds from now, with its weekday, and its date where that is not the only such day to come."""
    then = now + timedelta(seconds=seconds)
    near = seconds < 6 * 86400
    return f"{then:%a %H:%M}" if near else f"{then:%a %d %b %Y}"
