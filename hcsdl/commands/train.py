"""`hcsdl train`, the launcher's role: the run folder, whether there is something left to do in it, and what is prepared.

In: a validated `TrainCommand`. Out: an exit code and a run folder. The ranks are started, or joined, by `hcsdl.commands.launch`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from datetime import datetime
from pathlib import Path

from hcsdl.commands.compose import from_yaml, to_yaml, value_of
from hcsdl.commands.launch import Job, run_job
from hcsdl.commands.prepare import check_batch, plan_ranks, prepare
from hcsdl.config import ConfigError, TrainCommand
from hcsdl.distributed.slurm import this_job
from hcsdl.training.run_folder import RunFolder, write_atomically

log = logging.getLogger(__name__)

# What may differ when a run goes on: where and how it runs, not what comes out.
MAY_CHANGE = {
    "run_dir", "name", "machine.threads_per_rank", "machine.allocator", "plates.root", "plates.cache", "data.workers", "data.prefetch",
    "model.checkpoint_activations", "distributed.backend", "distributed.ranks", "distributed.interface", "distributed.bucket_mib",
    "distributed.timeout_s", "distributed.silence_s", "distributed.stall_s", "distributed.max_restarts", "machine.pin", "machine.spare_cores", "data.stage",
    "training.strict_budget", "training.resume",
    "training.max_steps", "training.checkpoint_every_s", "training.checkpoint_every_steps", "training.keep_checkpoints",
    "training.journal_every_s", "training.metric",
}  # fmt: skip


def run(config: TrainCommand) -> int:
    """Train, from the beginning or from where the run folder stands; return the exit code."""
    return run_job(
        Job(
            "train",
            config,
            places=lambda: plan_ranks(config),
            check=lambda ranks: check_batch(config, ranks),
            open=lambda: open_run_folder(config),
            finished=lambda folder: finished(folder, config),
            prepare=lambda folder: prepare_run(config, folder),
        )
    )


def open_run_folder(config: TrainCommand) -> RunFolder:
    """Return the run folder, locked for us. Raises ConfigError where no plates are given: before there is a folder, and on one rank alone."""
    if config.plates.root is None:
        raise ConfigError("plates.root must be given: the folder with the CSV files and the images. Got null instead.")
    path = Path(config.run_dir) if config.run_dir else Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.name}"
    number = 2
    while config.run_dir is None and path.exists():  # two runs in one second
        path = path.with_name(f"{path.name.rsplit('~')[0]}~{number}")
        number += 1
    folder, job = RunFolder(path), this_job()
    folder.acquire((job.number, job.restarts) if job else ("", 0))
    return folder


def finished(folder: RunFolder, config: TrainCommand) -> bool:
    """Compare the folder's configuration with ours and return whether its run has nothing left to do, saying so.

    Raises ConfigError where it is another run's, or a used folder with training.resume=never.
    """
    if not folder.config.exists():
        return False
    if config.training.resume == "never":
        raise ConfigError(f"training.resume=never needs a new run folder. {folder.path} holds a run; name another run_dir.")
    before = from_yaml("train", folder.config.read_text(encoding="utf-8"))
    changed = [key for key in differences(before, config) if key not in MAY_CHANGE]
    if changed:
        said = ", ".join(f"{key} was {value_of(before, key)!r} and is {value_of(config, key)!r}" for key in changed[:3])
        raise ConfigError(
            f"a run goes on with its own configuration. In {folder.path} {said}; name another run_dir, or start from it with training.resume={folder.path}."
        )
    if not folder.summary.exists():
        return False
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    if summary["steps"] < summary["planned_steps"] and (config.training.max_steps is None or config.training.max_steps > summary["steps"]):
        return False
    log.info(
        "%s is finished: %d steps, %s. Nothing to do; name another run_dir to train anew.", folder.path, summary["steps"], headline(summary)
    )
    return True


def prepare_run(config: TrainCommand, folder: RunFolder) -> None:
    """Write configuration, index and plan into the run folder, from plates that were looked at."""
    from_path = None
    if config.training.resume not in ("auto", "never"):
        from_path = Path(config.training.resume)
        if not from_path.exists():
            raise ConfigError(
                f"training.resume must be auto, never, or the path of a checkpoint or run folder. There is nothing at {from_path}."
            )
        from_path = from_path.resolve()
    try:
        prepare(config, folder, from_path)
    except (Exception, KeyboardInterrupt):
        if config.run_dir is None:  # a folder of our own naming, in which nothing has been trained
            shutil.rmtree(folder.path)
        raise
    write_atomically(folder.config, to_yaml(config).encode())


def differences(before: object, after: object, prefix: str = "") -> list[str]:
    """Return the dotted names of the fields in which two config objects differ."""
    keys = []
    for item in dataclasses.fields(before):  # type: ignore[arg-type]
        one, other = getattr(before, item.name), getattr(after, item.name)
        if dataclasses.is_dataclass(one):
            keys += differences(one, other, f"{prefix}{item.name}.")
        elif one != other:
            keys.append(prefix + item.name)
    return keys


def headline(summary: dict) -> str:
    """Return the figures of a summary in a phrase, with the split and the baseline in it."""
    leaky = ", leaky" if summary["leaky"] else ""
    beside = f" (baseline {summary['baseline_well_accuracy']:.3f})" if summary["baseline_well_accuracy"] is not None else ""
    return f"well accuracy {summary['well_accuracy']:.3f}{beside}, field accuracy {summary['val_accuracy']:.3f}, split {summary['split']}{leaky}"
