"""From a network's parameters to the optimizer that moves them.

In: an `nn.Module` and the training settings. Out: a `torch.optim.Optimizer` with two parameter groups, with and without weight decay.
The loop sets each group's `lr` before every step; nothing else about the schedule lives here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hcsdl.config import TrainingConfig

TRUST_COEFFICIENT = 0.001
"""You et al. 2017, arXiv:1708.03888, section 5."""
SLOTS = {"sgd": 1, "lars": 1, "adamw": 2}
"""What each optimizer keeps for a parameter from its first step on, in float32 values."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over the parameters of `model` that need a gradient.

    Norms and biases, which are the parameters with at most one dimension, get no weight decay, and with LARS the plain learning rate
    (Goyal et al. 2017, arXiv:1706.02677, section 5.3; You et al. 2017 adapt them too, from which this departs as is usual).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    if config.optimizer == "lars":
        groups[1]["trust_coefficient"] = None
        return LARS(groups, lr=config.learning_rate, momentum=config.momentum)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888, algorithm 1), for large global batches.

    For weights w, gradient g and weight decay d, with norms over the whole tensor:
    rate = trust_coefficient · |w| / (|g| + d · |w|), or 1 where |w| or |g| is zero;
    velocity = momentum · velocity + lr · rate · (g + d · w); w = w - velocity.

    Parameters
    ----------
    parameters : tensors, or groups of them; a group with `trust_coefficient=None` uses rate = 1.
    lr : global learning rate; peaks of 1 … 30 are usual, as the trust coefficient multiplies it.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float | None = TRUST_COEFFICIENT,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every parameter that has a gradient; return what `closure`, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: Tensor, group: dict) -> None:
        update = weight.grad.add(weight, alpha=group["weight_decay"])
        if group["trust_coefficient"] is not None:
            weight_norm, gradient_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(weight.grad)
            rate = group["trust_coefficient"] * weight_norm / (gradient_norm + group["weight_decay"] * weight_norm)
            update.mul_(torch.where((weight_norm > 0) & (gradient_norm > 0), rate, 1.0))
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
        weight.sub_(state["velocity"])
