"""What slurm/train.sbatch and slurm/sweep.sbatch run: one training over a Slurm job's nodes, in one run folder, however often the job restarts.

In: the words of `hcsdl train`, after `-m` those of a sweep of which an array's element runs its own combination. Out: an exit code, and the job back in
the queue where it was stopped or lost a rank and going on makes sense.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hcsdl.commands.compose import compose_command
from hcsdl.config import ConfigError
from hcsdl.distributed.launcher import FRUITLESS, RESTARTED, STOPPED
from hcsdl.distributed.slurm import Job, batch_job, requeue, run_tasks
from hcsdl.machine.process import forgive_standard_streams
from hcsdl.training.run_folder import RunFolder

log = logging.getLogger(__name__)


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
        config = compose_command("train", words)
        folder = RunFolder(config.run_dir or f"runs/{job.name}_{config.name}")  # type: ignore[attr-defined]
        return train(job, words, folder)[0]
    except ConfigError as error:
        print(f"hcsdl: {error}", file=sys.stderr)
        return error.exit_code


def train(job: Job, words: Sequence[str], folder: RunFolder) -> tuple[int, bool]:
    """Run `hcsdl train` with `words` on every task of the job, in `folder`; return the exit code and whether the job was sent back into the queue."""
    before = folder.last_saved()
    log.info("job %s, start %d, run folder %s", job.name, job.restarts + 1, folder.path)
    quoted = str(folder.path).replace("'", "\\'")
    code = run_tasks([sys.executable, "-m", "hcsdl", "train", *words, f"run_dir='{quoted}'"])
    again = goes_on(code, folder.last_saved() > before, job.restarts) and requeue(job)
    if code:
        log.info("job %s ended with code %d%s", job.name, code, " and goes back into the queue" if again else "")
    return code, again


def goes_on(code: int, progress: bool, restarts: int) -> bool:
    """Return whether a job that ended with `code` should start again: stopped, or short of a rank, and not for ever without saving anything new."""
    return code in (STOPPED, *RESTARTED) and (progress or restarts < FRUITLESS)


if __name__ == "__main__":
    sys.exit(main())
