"""What the benchmarks over several ranks share: the folder, starting the ranks, being one, and the head of the JSON.

In: a command's name and config. Out: an exit code; in `bench.output`, by default `bench/<date>_<time>_<name>/`, `config.yaml`, `result.json`,
pictures and the ranks' logs. Under torchrun, srun or mpirun the processes that were started are the ranks. A folder that holds a result is
never written over.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import signal
import sys
from datetime import datetime
from pathlib import Path

from hcsdl.commands.compose import config_hash, from_yaml, to_yaml, values
from hcsdl.config import ConfigError, ExitCode, RanksCommand, file_name
from hcsdl.distributed.heartbeat import take_leave
from hcsdl.distributed.identity import Identity, export_identity, launcher_process, who_am_i
from hcsdl.distributed.launcher import STOP_SIGNALS, Forwarder, Stop, start_ranks, watch_ranks
from hcsdl.machine.binding import affinity_kept, own_place, take_place
from hcsdl.machine.cores import processor, usable_cores
from hcsdl.machine.facts import load_average
from hcsdl.machine.memory import keep_freed_memory
from hcsdl.machine.placement import default_ranks, plan_places
from hcsdl.machine.process import die_with_parent, forgive_standard_streams
from hcsdl.machine.topology import read_machine
from hcsdl.training.run_folder import write_atomically
from hcsdl.training.summary import git_commit, versions

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RESULT = "result.json"


def run_on_ranks(command: str, config: RanksCommand, output: str | None, least_ranks: int) -> int:
    """Run `measure(config, identity, folder)` of the command's module on every rank, with a folder on rank 0 alone; return the exit code.

    Parameters
    ----------
    command : the command's two words.
    output : the folder asked for; None: a new one.
    least_ranks : ranks that the benchmark needs.
    """
    identity = who_am_i()
    if identity.launcher not in ("alone", "own"):
        _check_ranks(command, identity.world_size, least_ranks)
        export_identity(identity)
        take_place(own_place(identity.local_rank, identity.local_world_size, config.machine, identity.launcher))
        folder = _agreed_folder(command, config, output, identity)
        return _be_rank(command, config, identity, folder if identity.rank == 0 else None)
    machine = read_machine()
    ranks = config.distributed.ranks or max(least_ranks, default_ranks(machine, config.machine.spare_cores))
    _check_ranks(command, ranks, least_ranks)
    places = plan_places(machine, ranks, config.machine)
    with Forwarder() as forwarder:
        folder = open_folder(command, config, output)
        forwarder.adopt(start_ranks(["-m", "hcsdl.commands.bench_ranks", command, str(folder)], places, folder / "logs"))
        code, sentence = watch_ranks(forwarder.children, config.distributed.silence_s)
    if sentence:
        log.error("hcsdl: %s", sentence.partition(";")[0])  # the rest is about what a training has saved
    return code


def _agreed_folder(command: str, config: RanksCommand, output: str | None, identity: Identity) -> Path:
    """Return the folder that rank 0 opens once all ranks were asked for the same; its ConfigError ends them all."""
    if config.machine.allocator == "keep":
        keep_freed_memory()
    with affinity_kept():
        from hcsdl.distributed.handout import hand_out  # imports torch

    asked = values(config) | {f"the version of {name}": text for name, text in versions().items()}
    with Forwarder():  # which has nobody to pass a signal on to: it raises Stop
        return Path(hand_out(identity, asked, lambda: str(open_folder(command, config, output).absolute()), config.distributed))


def _check_ranks(command: str, ranks: int, least: int) -> None:
    if ranks < least:
        raise ConfigError(f"hcsdl {command} needs at least {least} ranks. Got {ranks}: raise distributed.ranks, or start more.")


def open_folder(command: str, config: object, output: str | None) -> Path:
    """Return the folder for the results, new, with `config.yaml` in it, and say it if others are at work here. Raises ConfigError where it holds a result or cannot be written."""
    path = Path(output) if output else Path("bench") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{command.rpartition(' ')[2]}"
    if (path / RESULT).exists():
        raise ConfigError(f"bench.output must not hold a result. {path / RESULT} exists; name another folder.")
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.yaml", to_yaml(config).encode())
    except OSError as error:
        raise ConfigError(f"bench.output must be a writable folder. {error.strerror}: {error.filename}; name another.") from error
    if (average := load_average()) > usable_cores() / 4:
        log.warning(
            "note: %.1f processes ran in the last minute: others at work here make what is measured slower, and ratios unsure", average
        )
    return path


def main() -> int:
    """Be one rank, started by `run_on_ranks` with the command and the folder as arguments."""
    forgive_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command, folder = sys.argv[1], Path(sys.argv[2])
    die_with_parent(launcher_process())
    config, identity = from_yaml(command, (folder / "config.yaml").read_text(encoding="utf-8")), who_am_i()
    return _be_rank(command, config, identity, folder if identity.rank == 0 else None)  # type: ignore[arg-type]


def _be_rank(command: str, config: RanksCommand, identity: Identity, folder: Path | None) -> int:
    """Measure and end this process with the exit code: a thread may be stuck in a collective of a dead peer."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    code = ExitCode.DONE
    try:
        if config.machine.allocator == "keep":
            keep_freed_memory()
        with affinity_kept():
            importlib.import_module("torch")  # after the allocator and the threads are set
        if config.machine.allocator == "keep":
            importlib.import_module("hcsdl.kernels.memory").keep_tensors_in_huge_pages()
        importlib.import_module(f"hcsdl.commands.{file_name(command)}").measure(config, identity, folder)
    except Exception as error:
        code = getattr(error, "exit_code", ExitCode.FAILED)
        if code == ExitCode.FAILED and not isinstance(error, OSError):
            log.exception("%s failed", identity)
        elif identity.rank == 0 or code not in (ExitCode.BAD_CONFIG, ExitCode.STOPPED):  # what every rank would say alike, rank 0 says
            log.error("hcsdl: %s", error)
        take_leave("" if code == ExitCode.STOPPED else f"{error}" or type(error).__name__)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop(number: int, _frame: object) -> None:
    raise Stop(f"stopped by {signal.Signals(number).name}: nothing was saved.")


def head(command: str, config: object, world_size: int, hosts: int) -> dict:
    """Return what every benchmark's JSON begins with: when, with what and on what it was measured."""
    import torch

    return {
        "schema_version": SCHEMA_VERSION,
        "command": f"hcsdl {command}",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": usable_cores(),
        "hosts": hosts,
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "config": dataclasses.asdict(config),  # type: ignore[call-overload]
        "config_hash": config_hash(config),
    }


if __name__ == "__main__":
    main()
