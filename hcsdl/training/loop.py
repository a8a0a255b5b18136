"""The training loop: steps, evaluations, checkpoints, and stopping cleanly.

In: `Parts`, everything built before, and a `State`, fresh or from a checkpoint. Out: the final `State`; files are written by the saver.
Promises: all ranks agree that a step's loss and gradients are finite before the optimizer moves; a signal ends the run after a whole step,
saved; nothing that depends on the clock (journal, time-based checkpoints) touches a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from hcsdl.config import ExitCode, TrainingConfig
from hcsdl.data.loading import MiniBatch, TrainLoader
from hcsdl.distributed.group import Group
from hcsdl.distributed.launcher import Stop
from hcsdl.kernels import Kernels
from hcsdl.machine.memory import peak_rss_gib
from hcsdl.training.journal import Silence
from hcsdl.training.objectives import Objective
from hcsdl.training.schedules import learning_rate
from hcsdl.training.step_time import StepClock, over_ranks


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is not a number: the weights were left as they were."""

    exit_code = ExitCode.NON_FINITE_LOSS


@dataclass
class State:
    """Where a run stands: optimizer steps done, evaluations so far, seconds of training over all attempts, speed of this attempt and its parts."""

    step: int = 0
    history: list[dict] = field(default_factory=list)
    elapsed_s: float = 0.0
    fields_timed: int = 0
    seconds_timed: float = 0.0
    waited_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)


@dataclass
class Parts:
    """What the loop works with. `model` is wrapped for many ranks; `evaluate(state)` and `save(state)` work on the bare network."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    kernels: Kernels
    group: Group
    config: TrainingConfig
    loader: Callable[[int, int], TrainLoader]
    field_name: Callable[[int], str]
    evaluate: Callable[[State], dict]
    save: Callable[[State], None]
    journal: Silence
    stop_asked: Callable[[], bool]
    total_steps: int
    schedule_steps: int
    steps_per_epoch: float
    clock: StepClock = field(default_factory=StepClock)


@dataclass(frozen=True)
class Outcome:
    """One step as all ranks saw it: mean loss, gradient norm, whether a rank was asked to stop or a checkpoint is due, seconds of its parts."""

    loss: float
    gradient_norm: float
    stop: bool
    save: bool
    seconds: dict[str, float]


def train(parts: Parts, state: State) -> State:
    """Run the steps from `state.step` to `parts.total_steps`; return the state they end in.

    Raises NonFiniteLoss, LostRank, DataError (an unreadable field) and, after saving, Stop.
    """
    begun, before_s, saved = time.monotonic(), state.elapsed_s, time.monotonic()
    loader = parts.loader(state.step, parts.total_steps)
    settled = state.step + 2  # the first steps pay for memory and kernels being set up: left out of the speed
    try:
        last = time.monotonic()
        waited_s = 0.0
        for batches in loader:
            wait_s, waited_s = loader.wait_s - waited_s, loader.wait_s
            parts.clock.data_s = wait_s
            save_due = time.monotonic() - saved >= parts.config.checkpoint_every_s
            with parts.group.in_step("training"):
                outcome = train_step(parts, batches, state.step, save_due)
            del batches  # validation needs their room
            step_s, last = time.monotonic() - last, time.monotonic()
            state.step += 1
            state.elapsed_s = before_s + last - begun
            if state.step > settled:
                state.fields_timed += parts.config.global_batch_size
                state.seconds_timed += step_s
                state.waited_s += wait_s
                state.parts_s = {name: state.parts_s.get(name, 0.0) + value for name, value in outcome.seconds.items()}
            parts.journal.step(state.step, parts.config.global_batch_size, _values(parts, outcome, state.step, step_s, wait_s))

            finished = state.step == parts.total_steps
            evaluated = finished or _evaluation_due(parts, state.step)
            saving = evaluated or outcome.save or outcome.stop or _every(parts.config.checkpoint_every_steps, state.step)
            if saving:
                _require_finite_weights(parts, state.step)
            if evaluated:
                state.history.append(parts.evaluate(state))
            if saving:
                parts.save(state)
                saved = time.monotonic()
            if outcome.stop and not finished:
                raise Stop(f"stopped by a signal after step {state.step}, which is saved: start the same command again to go on.")
            last = time.monotonic()
    finally:
        loader.close()
    return state


def train_step(parts: Parts, batches: Sequence[MiniBatch], step: int, save_due: bool) -> Outcome:
    """Move the weights once, by the gradient of the mean loss over the global batch: this rank's mini-batches, and the other ranks' own.

    Gradients accumulate without communication over all mini-batches but the last, with which they are averaged over the ranks.
    """
    rate = learning_rate(step, parts.schedule_steps, parts.steps_per_epoch, parts.config)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    clock, losses = parts.clock, []
    clock.start()
    for number, batch in enumerate(batches, 1):
        alone = isinstance(parts.model, DistributedDataParallel) and number < len(batches)
        with parts.model.no_sync() if alone else nullcontext():
            with parts.kernels.autocast():
                logits = parts.model(batch.images)
            loss = parts.objective.loss(logits, batch.labels) / len(batches)
            parts.group.guard("averaging of the gradients", loss.backward)
        losses.append(loss.detach())
    clock.passes_done()
    own, norm = float(torch.stack(losses).sum()), gradient_norm(parts.model)
    clock.norm_done()
    # One small collective a step carries what all ranks must agree on: the mean loss, and who saw trouble, a signal, a due checkpoint.
    seen = [own, not math.isfinite(own), not math.isfinite(norm), parts.stop_asked(), save_due and parts.group.rank == 0, *clock.seconds()]
    table = parts.group.all_gather(torch.tensor(seen, dtype=torch.float64))
    clock.agreed()
    loss, (bad_loss, bad_norm, stop, save) = float(table[:, 0].mean()), table[:, 1:5].sum(0).tolist()
    if bad_loss or bad_norm:
        _refuse(parts, batches, step, own, norm, bool(bad_loss))
    if parts.config.clip_norm is not None and norm > parts.config.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(parts.model.parameters(), parts.config.clip_norm, torch.tensor(norm))
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    clock.step_done()
    return Outcome(loss, norm, stop > 0, save > 0, over_ranks(table[:, 5:]))


def gradient_norm(model: torch.nn.Module) -> float:
    """Return the 2-norm of all gradients of `model` laid end to end, as `torch.nn.utils.clip_grad_norm_` defines it."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def _refuse(parts: Parts, batches: Sequence[MiniBatch], step: int, loss: float, norm: float, bad_loss: bool) -> None:
    """Raise NonFiniteLoss on every rank, naming the step, and the ranks and fields whose loss is to blame (all of them for a gradient)."""
    mine = not math.isfinite(loss) or not bad_loss
    names = [parts.field_name(int(row)) for batch in batches for row in batch.rows] if mine else []
    seen = {rank: fields for rank, fields in enumerate(parts.group.all_gather_object(names)) if fields}
    where = "; ".join(f"rank {rank}: {', '.join(fields[:8])}" for rank, fields in seen.items())
    what = "loss was not finite" if bad_loss else f"gradient's norm was {norm} (the loss was finite)"
    raise NonFiniteLoss(
        f"the loss and its gradient must be finite. At step {step} the {what} on {where}. The weights were not moved and the last checkpoint "
        "is intact; try a smaller training.learning_rate, training.clip_norm, or look at those fields."
    )


def _require_finite_weights(parts: Parts, step: int) -> None:
    """Raise NonFiniteLoss where a weight is not a number: such a network is neither scored nor saved. The same on every rank."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parts.model.parameters()):
        raise NonFiniteLoss(
            f"the weights must be finite. After step {step} they are not, with finite losses and gradients; they were not saved. "
            "Try a smaller training.learning_rate or training.weight_decay."
        )


def _values(parts: Parts, outcome: Outcome, step: int, step_s: float, wait_s: float) -> dict:
    return {
        "loss": outcome.loss,
        "gradient_norm": outcome.gradient_norm,
        "learning_rate": parts.optimizer.param_groups[0]["lr"],
        "step_s": step_s,
        "data_wait_s": wait_s,
        "peak_rss_gib": round(peak_rss_gib(), 3),
        "seconds": outcome.seconds,
    }


def _evaluation_due(parts: Parts, step: int) -> bool:
    """Return whether a pass (the `validate_every_epochs`-th) ended inside this step."""
    every = parts.steps_per_epoch * parts.config.validate_every_epochs
    return math.floor(step / every + 1e-9) > math.floor((step - 1) / every + 1e-9)


def _every(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
