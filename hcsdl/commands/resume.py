"""What a run goes on from, and what it says where it goes on otherwise than it began.

In: a run folder and its plan, or a checkpoint. Out: the checkpoint to start from, an optimizer that has its state, sentences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hcsdl.commands.compose import from_yaml
from hcsdl.commands.prepare import Plan
from hcsdl.config import ConfigError, DataError, TrainingConfig
from hcsdl.training.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, load_newest
from hcsdl.training.run_folder import RunFolder


def checkpoint_to_go_on_from(folder: RunFolder, plan: Plan) -> tuple[Checkpoint | None, bool]:
    """Return the newest whole checkpoint of `folder`, else the one the plan names (None: start anew), and whether it is another run's.

    Raises DataError where none is whole, or its classes, channels or, in its own folder, fields are not the plan's.
    """
    own = list_checkpoints(folder.checkpoints)
    if own:
        checkpoint, foreign = load_newest(own), False
    elif plan.resume_from:
        checkpoint, foreign = find_checkpoint(plan.resume_from), True
    else:
        return None, False
    assert checkpoint is not None
    if list(checkpoint.classes) != plan.classes or list(checkpoint.channels) != plan.channels:
        raise DataError(
            f"a run goes on with the classes and channels of its checkpoint. It has {len(checkpoint.classes)} classes of {checkpoint.target} "
            f"in channels {', '.join(checkpoint.channels)}; the plates have {len(plan.classes)} of {plan.target} in {', '.join(plan.channels)}."
        )
    if checkpoint.index_hash != plan.index_hash and not foreign:
        raise DataError(
            f"a run goes on with the fields it began with. The index was {checkpoint.index_hash} and is {plan.index_hash}: "
            "the plates have changed; restore them, or name another run_dir."
        )
    return checkpoint, foreign


def load_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, name: str) -> None:
    """Give `optimizer`, which is `name`, a checkpoint's state; its settings stay its own. Raises ConfigError where the checkpoint's is another."""
    was = from_yaml("train", checkpoint.config).training.optimizer  # type: ignore[attr-defined]
    if was != name:
        raise ConfigError(f"training.optimizer must be the checkpoint's, {was}. Got {name} instead.")
    asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint.optimizer)
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)


def on_processor(state: dict) -> dict:
    """Return an optimizer's `state_dict` with its tensors in this process's memory, so that a machine without a GPU can read it."""
    moved = {
        number: {name: value.cpu() if torch.is_tensor(value) else value for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return state | {"state": moved}


def other_ranks(before: int, now: int, config: TrainingConfig, model: torch.nn.Module) -> str:
    """Return what a resume on `now` ranks keeps of a run on `before`: all but the fields that a batch normalisation sees together."""
    text = f"resuming on {now} rank{'s' * (now > 1)} what {before} began: same order and batch, equal to rounding"
    if config.mini_batch_size is None and any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        was, is_now = config.global_batch_size // before, config.global_batch_size // now
        text += f" but for batch normalisation, over {is_now} fields of a rank now and {was} before"
    return text + "."


def elsewhere(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return what is different from the checkpoint's run, whose last bits this one will then not have; empty where nothing is."""
    changed = [f"{what}: {value}, before {before[what]}" for what, value in now.items() if before.get(what, value) != value]
    return f"going on otherwise than begun, so not to the last bit ({'; '.join(changed)})." if changed else ""
