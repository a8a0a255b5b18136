"""What the network learns: from its outputs and the labels to one number.

In: logits and labels of a mini-batch. Out: a scalar loss in fp32, whatever the precision of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from hcsdl.config import ObjectiveConfig


class Objective(Protocol):
    """Turns a mini-batch's outputs and labels into a loss, the mean over its fields."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar fp32 loss."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; `label_smoothing` is the share of the target spread evenly over all classes (Szegedy 2016, arXiv:1512.00567)."""

    label_smoothing: float

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy (scalar fp32, in nats) of `logits` (N, K), any float, against `labels` (N,), int64 in 0 … K - 1."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


def build_objective(config: ObjectiveConfig) -> Objective:
    """Return the objective of `config`."""
    return Classification(config.label_smoothing)
