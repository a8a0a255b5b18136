"""The learning rate as a pure function of the step.

In: the step, the length of the run, the settings. Out: one number. Promised: no state, so a resumed run needs nothing but its step.
"""

from __future__ import annotations

import math

from hcsdl.config import TrainingConfig


def learning_rate(step: int, total_steps: int, steps_per_epoch: float, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step `step`.

    It rises linearly from `warmup_learning_rate` at step 0 to `learning_rate` after `warmup_epochs`, and from there goes to
    `final_learning_rate` at the last step, along a line or half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts);
    `schedule="constant"` stays. A run that ends within its warm-up is cut off there.

    Parameters
    ----------
    step : 0 … total_steps - 1; later steps get the last one's rate.
    total_steps : optimizer steps of the whole run.
    steps_per_epoch : optimizer steps a pass over the sampled fields, not necessarily whole.
    """
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.warmup_learning_rate + (config.learning_rate - config.warmup_learning_rate) * step / warmup_steps
    decay_steps = total_steps - 1 - warmup_steps
    if config.schedule == "constant" or decay_steps <= 0:
        return config.learning_rate
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * remaining
