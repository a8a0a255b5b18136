"""`hcsdl train`, the launcher's role: compose, prepare, start the ranks, report.

In: a validated `TrainCommand`. Out: an exit code and a run folder. Under torchrun every process is a rank: rank 0 plays this role first and
hands the others the run folder through the rendezvous store.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from datetime import datetime
from pathlib import Path

from hcsdl.commands.compose import from_yaml, to_yaml, value_of, values
from hcsdl.commands.prepare import check_batch, plan_ranks, prepare
from hcsdl.config import ConfigError, ExitCode, TrainCommand
from hcsdl.distributed.identity import Identity, export_identity, unused_nodes, who_am_i
from hcsdl.distributed.launcher import Forwarder, Stop, start_ranks, supervise
from hcsdl.distributed.slurm import this_job
from hcsdl.machine.binding import affinity_kept, on_cpus, own_place, take_place
from hcsdl.training.run_folder import RunFolder, write_atomically
from hcsdl.training.summary import versions

log = logging.getLogger(__name__)

# What may differ when a run goes on: where and how it runs, not what comes out.
MAY_CHANGE = {
    "run_dir", "name", "machine.threads_per_rank", "machine.allocator", "plates.root", "plates.cache", "data.workers", "data.prefetch",
    "model.checkpoint_activations", "distributed.backend", "distributed.ranks", "distributed.interface", "distributed.bucket_mib",
    "distributed.timeout_s", "distributed.silence_s", "distributed.max_restarts", "machine.pin", "machine.spare_cores", "data.stage",
    "training.strict_budget", "training.resume",
    "training.max_steps", "training.checkpoint_every_s", "training.checkpoint_every_steps", "training.keep_checkpoints",
    "training.journal_every_s", "training.metric",
}  # fmt: skip


def run(config: TrainCommand) -> int:
    """Train, from the beginning or from where the run folder stands; return the exit code."""
    identity = who_am_i()
    if identity.launcher not in ("alone", "own"):
        return _run_as_rank(config, identity)
    if config.plates.root is None:
        raise ConfigError("plates.root must be given: the folder with the CSV files and the images. Got null instead.")
    if unused_nodes():
        log.warning("%d of this job's nodes stay idle: start the ranks of all nodes with srun, see slurm/train.sbatch.", unused_nodes())
    with Forwarder() as forwarder:
        places = plan_ranks(config)
        folder = open_run_folder(config)
        try:
            if finished(folder, config):
                return ExitCode.DONE
            prepare_run(config, folder)
            ranks, threads = len(places), places[0].threads
            log.info("run folder %s: %d rank%s × %d thread%s", folder.path, ranks, "s" * (ranks > 1), threads, "s" * (threads > 1))
            code, sentence = supervise(
                lambda: start_ranks(["-m", "hcsdl.commands.rank", str(folder.path)], places, folder.logs),
                forwarder,
                config.distributed.max_restarts,
                config.distributed.silence_s,
                saved=folder.last_saved,
                renew=folder.renew,
            )
            if code in (ExitCode.BAD_CONFIG, ExitCode.BAD_DATA) and not any(folder.checkpoints.iterdir()):
                folder.config.unlink()  # nothing was trained: the corrected command may use the folder
        except Stop as signal:
            raise Stop(f"stopped by {signal} before the first step: start the same command again.") from signal
        finally:
            folder.release()
    if sentence:
        log.error("hcsdl: %s", sentence)
    return code


def _run_as_rank(config: TrainCommand, identity: Identity) -> int:
    export_identity(identity)
    place = own_place(identity.local_rank, identity.local_world_size, config.machine, identity.launcher)
    log.info("%s: %s", identity, place)
    all_cpus = take_place(place)
    with affinity_kept():
        from hcsdl.distributed.handout import hand_out  # imports torch

    from hcsdl.commands.rank import run_rank

    def compose_once() -> str:
        check_batch(config, identity.world_size)
        folder = open_run_folder(config)  # its lock is held as long as this process lives
        if finished(folder, config):
            return json.dumps({"finished": True})
        with on_cpus(all_cpus):
            prepare_run(config, folder)
        return json.dumps({"run_dir": str(folder.path.absolute())})

    asked = values(config) | {f"the version of {name}": text for name, text in versions().items()}
    try:
        with Forwarder():  # which has nobody to pass a signal on to: it raises Stop
            told = json.loads(hand_out(identity, asked, compose_once, config.distributed.timeout_s, config.distributed.silence_s))
    except Stop as signal:
        raise Stop(f"stopped by {signal} before the first step: start the same command again.") from signal
    return ExitCode.DONE if told.get("finished") else run_rank(Path(told["run_dir"]), identity)


def open_run_folder(config: TrainCommand) -> RunFolder:
    """Return the run folder, locked for us."""
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
