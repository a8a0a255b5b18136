"""What commands share whose work ranks do in a folder: open it, prepare, start the ranks here or be one of torchrun's, srun's or mpirun's, watch.

In: a `Job`. Out: an exit code, and what the ranks leave. Under torchrun every process is a rank: rank 0 prepares, the others get the folder through
the rendezvous store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcsdl.commands.compose import values
from hcsdl.config import ExitCode
from hcsdl.distributed.identity import Identity, export_identity, unused_nodes, who_am_i
from hcsdl.distributed.launcher import Forwarder, Stop, start_ranks, supervise
from hcsdl.machine.binding import affinity_kept, on_cpus, own_place, take_place
from hcsdl.machine.gpus import check_gpus
from hcsdl.machine.placement import Place
from hcsdl.training.run_folder import RunFolder
from hcsdl.training.summary import versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One command line of such a command.

    Attributes
    ----------
    command : the command's name; what its ranks do stands in `hcsdl.commands.rank`.
    config : its settings, `machine` and `distributed` among them.
    places : returns where ranks started here go.
    check : raises ConfigError where the work cannot be shared by so many ranks.
    open : returns the folder, locked.
    finished : whether nothing is left to do in it, saying so.
    prepare : writes into it all that ranks read.
    """

    command: str
    config: Any
    places: Callable[[], tuple[Place, ...]]
    check: Callable[[int], None]
    open: Callable[[], RunFolder]
    finished: Callable[[RunFolder], bool]
    prepare: Callable[[RunFolder], None]


def run_job(job: Job) -> int:
    """Do the work of `job`, from the beginning or from where its folder stands; return the exit code."""
    identity = who_am_i()
    if identity.launcher not in ("alone", "own"):
        return _run_as_rank(job, identity)
    if unused_nodes():
        log.warning("%d of this job's nodes stay idle: start the ranks of all nodes with srun, see slurm/train.sbatch.", unused_nodes())
    config = job.config
    with Forwarder() as forwarder:
        places = job.places()
        folder = job.open()
        try:
            if job.finished(folder):
                return ExitCode.DONE
            job.prepare(folder)
            ranks, threads = len(places), places[0].threads
            log.info("%s %s: %d rank%s × %d thread%s", folder.kind, folder.path, ranks, "s" * (ranks > 1), threads, "s" * (threads > 1))
            code, sentence = supervise(
                lambda: start_ranks(["-m", "hcsdl.commands.rank", str(folder.path), job.command], places, folder.logs),
                forwarder,
                config.distributed.max_restarts,
                config.distributed.silence_s,
                saved=folder.last_saved,
                renew=folder.renew,
            )
            if code in (ExitCode.BAD_CONFIG, ExitCode.BAD_DATA) and not folder.last_saved():
                folder.config.unlink(missing_ok=True)  # nothing was done: the corrected command may use the folder
        except Stop as signal:
            raise Stop(f"stopped by {signal} before the first step: start the same command again.") from signal
        finally:
            folder.release()
    if sentence:
        log.error("hcsdl: %s", sentence)
    return code


def _run_as_rank(job: Job, identity: Identity) -> int:
    config = job.config
    check_gpus(config.machine)
    export_identity(identity)
    place = own_place(identity.local_rank, identity.local_world_size, config.machine, identity.launcher)
    log.info("%s: %s", identity, place)
    all_cpus = take_place(place)
    with affinity_kept():
        from hcsdl.distributed.handout import hand_out  # imports torch

    from hcsdl.commands.rank import run_rank

    def compose_once() -> str:
        job.check(identity.world_size)
        folder = job.open()  # its lock is held as long as this process lives
        if job.finished(folder):
            return json.dumps({"finished": True})
        with on_cpus(all_cpus):
            job.prepare(folder)
        return json.dumps({"folder": str(folder.path.absolute())})

    asked = values(config) | {f"the version of {name}": text for name, text in versions().items()}
    try:
        with Forwarder():  # which has nobody to pass a signal on to: it raises Stop
            told = json.loads(hand_out(identity, asked, compose_once, config.distributed))
    except Stop as signal:
        raise Stop(f"stopped by {signal} before the first step: start the same command again.") from signal
    return ExitCode.DONE if told.get("finished") else run_rank(Path(told["folder"]), identity, job.command)
