"""A rank's role in `hcsdl train` and `hcsdl embed`: read what the launcher wrote, build everything in order, work, and sum up.

In: a folder with `config.yaml`, `plan.json` and `index.parquet`. Out: an exit code; of a training weights, checkpoints, journal and summary, of an
embedding its table, by rank 0.
"""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path

from hcsdl.config import EmbedCommand, ExitCode, MachineConfig, TrainCommand
from hcsdl.distributed.heartbeat import take_leave
from hcsdl.distributed.identity import Identity, launcher_process, who_am_i
from hcsdl.distributed.launcher import STOP_SIGNALS
from hcsdl.distributed.segments import remove_own
from hcsdl.machine.binding import affinity_kept
from hcsdl.machine.memory import keep_freed_memory
from hcsdl.machine.process import die_with_parent, forgive_standard_streams
from hcsdl.training.embeddings import WorkFolder
from hcsdl.training.run_folder import RunFolder

log = logging.getLogger(__name__)
KEPT = "freed memory kept"
TOGETHER = (ExitCode.NON_FINITE_LOSS, ExitCode.STOPPED)  # with these all ranks end alike


def main() -> int:
    """Be one rank, started by the launcher with the folder and the command as arguments."""
    forgive_standard_streams()
    faulthandler.enable(os.dup(2))  # whatever becomes of that: where native code crashed is said
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_rank(Path(sys.argv[1]), who_am_i(), *sys.argv[2:])


def run_rank(path: Path, identity: Identity, command: str = "train") -> int:
    """Do `command`'s work as the rank this process is; return the exit code. Every expected failure is one line."""
    die_with_parent(launcher_process())
    stop = StopFlag()
    folder, work = WORK[command][0](path), WORK[command][1]
    folder.join()
    if identity.rank == 0 or identity.launcher != "own":  # our launcher has sent the other ranks' output there
        _log_into(folder.logs / f"rank{identity.rank}.log")
    try:
        work(identity, folder, stop)
    except Exception as error:
        code = getattr(error, "exit_code", ExitCode.FAILED)
        if code == ExitCode.FAILED and not isinstance(error, OSError):
            log.exception("rank %d of %d failed", identity.rank, identity.world_size)
        elif identity.rank == 0 or code not in (ExitCode.BAD_CONFIG, *TOGETHER):  # what every rank would say alike, rank 0 says
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            log.error("hcsdl: %s%s", error, ". Make room there; what was saved before is whole." if full else "")
        in_vain = code in (ExitCode.BAD_CONFIG, ExitCode.BAD_DATA, ExitCode.LOST_RANK) and not folder.last_saved()
        if in_vain and identity.rank == 0 and identity.launcher != "own":
            folder.config.unlink(missing_ok=True)  # nothing was done: the corrected command may use the folder
        take_leave("" if code in TOGETHER else f"{error}" or type(error).__name__)
        _leave(code)
    _leave(ExitCode.DONE)
    return ExitCode.DONE


class StopFlag:
    """Remembers that SIGTERM, SIGUSR1, SIGINT or SIGHUP came; the training loop asks for it once a step."""

    def __init__(self) -> None:
        self.seen = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._see)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _see(self, _number: int, _frame: object) -> None:
        self.seen = True

    def __call__(self) -> bool:
        return self.seen


def _log_into(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)


def _leave(code: int) -> None:
    """End without waiting for threads that may be stuck in a collective of a dead peer."""
    remove_own()  # of shared memory, which outlives us
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(identity: Identity, folder: RunFolder, stop: StopFlag) -> None:
    from hcsdl.commands.compose import from_yaml

    begun = time.monotonic()
    config: TrainCommand = from_yaml("train", folder.config.read_text(encoding="utf-8"))  # type: ignore[assignment]
    allocator = _allocator(config.machine)
    with affinity_kept():
        from hcsdl.commands.run import Run  # torch is first imported here, after the allocator and the threads are set

    run = Run(config, folder, identity, stop, _with_tensors(allocator))
    try:
        run.train()
        run.finish(seconds=time.monotonic() - begun)
    finally:
        run.journal.close()
    run.group.close()


def _embed(identity: Identity, folder: WorkFolder, stop: StopFlag) -> None:
    from hcsdl.commands.compose import from_yaml

    config: EmbedCommand = from_yaml("embed", folder.config.read_text(encoding="utf-8"))  # type: ignore[assignment]
    allocator = _allocator(config.machine)
    with affinity_kept():
        from hcsdl.commands.embed_fields import embed_fields  # torch is first imported here, as above

    embed_fields(config, folder, identity, stop, _with_tensors(allocator))


def _allocator(config: MachineConfig) -> str:
    return KEPT if config.allocator == "keep" and keep_freed_memory() else "system"


def _with_tensors(allocator: str) -> str:
    """Keep large tensors in huge pages where freed memory is kept, now that torch is there; return the two in words."""
    if allocator != KEPT:
        return allocator
    from hcsdl.kernels.memory import keep_tensors_in_huge_pages

    problem = keep_tensors_in_huge_pages()
    return f"{KEPT}, " + (f"but large tensors not in huge pages, since {problem}" if problem else "large tensors in huge pages")


WORK = {"train": (RunFolder, _train), "embed": (WorkFolder, _embed)}


if __name__ == "__main__":
    main()
