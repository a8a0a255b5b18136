"""What slurm/train.sbatch, slurm/sweep.sbatch and slurm/embed.sbatch run: one command over a Slurm job's nodes, in one folder, however often the job
restarts.

In: the words of `hcsdl train`, after `-m` those of a sweep of which an array's element runs its own combination, after `embed` those of `hcsdl embed`.
Out: an exit code, and the job back in the queue where it was stopped or lost a rank and going on makes sense.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hcsdl.commands.compose import compose_command
from hcsdl.config import ConfigError, ExitCode
from hcsdl.distributed.launcher import FRUITLESS, RESTARTED
from hcsdl.distributed.slurm import Job, batch_job, requeue, run_tasks
from hcsdl.machine.process import forgive_standard_streams
from hcsdl.training.run_folder import RunFolder, write_json

log = logging.getLogger(__name__)
LAST_START = "last_start.json"  # in the run folder: the job and its start that saved something last


def main() -> int:
    """Be the batch script of a job; return its exit code."""
    forgive_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    words = sys.argv[1:]
    try:
        if words[:1] == ["-m"]:
            from hcsdl.commands.sweep import run_element

            return run_element(words[1:])
        job = batch_job()
        if words[:1] == ["embed"]:
            from hcsdl.commands.embed import work_folder

            return over_tasks(job, words, work_folder(compose_command("embed", words[1:])))[0]  # type: ignore[arg-type]
        config = compose_command("train", words)
        folder = RunFolder(config.run_dir or f"runs/{job.name}_{config.name}")  # type: ignore[attr-defined]
        return train(job, words, folder)[0]
    except ConfigError as error:
        print(f"hcsdl: {error}", file=sys.stderr)
        return error.exit_code


def train(job: Job, words: Sequence[str], folder: RunFolder) -> tuple[int, bool]:
    """Run `hcsdl train` with `words` in `folder`, as `over_tasks` does."""
    quoted = str(folder.path).replace("'", "\\'")
    return over_tasks(job, ["train", *words, f"run_dir='{quoted}'"], folder)


def over_tasks(job: Job, command: Sequence[str], folder: RunFolder) -> tuple[int, bool]:
    """Run `hcsdl command…`, which works in `folder`, on every task of the job; return the exit code and whether the job went back into the queue."""
    before, last_start = folder.last_saved(), folder.path / LAST_START
    log.info("job %s, start %d, %s %s", job.name, job.restarts + 1, folder.kind, folder.path)
    code = run_tasks([sys.executable, "-m", "hcsdl", *command])
    if folder.last_saved() > before:
        write_json(last_start, {"job": job.number, "restarts": job.restarts})
    again = goes_on(code, fruitless_starts(job, last_start)) and requeue(job)
    if code:
        log.info("job %s ended with code %d%s", job.name, code, " and goes back into the queue" if again else "")
    return code, again


def fruitless_starts(job: Job, last_start: Path) -> int:
    """Return how many of the job's starts, up to this one, have saved nothing new in a row; `last_start` names the last that has saved something."""
    saved = json.loads(last_start.read_text(encoding="utf-8")) if last_start.exists() else {}
    return job.restarts - (saved["restarts"] if saved.get("job") == job.number else -1)


def goes_on(code: int, fruitless: int) -> bool:
    """Return whether a job that ended with `code` should start again: stopped, or short of a rank, and not for ever without saving anything new."""
    return code in (ExitCode.STOPPED, *RESTARTED) and fruitless < FRUITLESS


if __name__ == "__main__":
    sys.exit(main())
