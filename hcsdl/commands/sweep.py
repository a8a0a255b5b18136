"""A sweep: one run for each combination of comma-separated values, here (`-m`), as jobs that `-m hydra/launcher=submitit_slurm` submits and waits for,
or as a Slurm job array (slurm/sweep.sbatch). All three leave the same folder, from which `hcsdl sweep` prints one table.

In: overrides. Out: a folder with `sweep.json` and a numbered folder a run, each with `job.json` and `run/`; and the first bad exit code, or 0. Every
combination is composed and validated before the first run starts. A run's ranks are processes of their own, so nothing leaks from run to run; a failed
run is listed and the others go on.
"""

from __future__ import annotations

import importlib
import logging
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from hcsdl.commands.compose import compose_command, one_line, resolve
from hcsdl.commands.sweep_table import JOB, print_table, write_sweep
from hcsdl.config import ConfigError, ExitCode, SweepCommand, register
from hcsdl.distributed.slurm import batch_job, states, still_going
from hcsdl.training.run_folder import RunFolder, write_json

log = logging.getLogger(__name__)
SUBMITIT = "submitit_slurm"
POLL_S = 5.0
SHARED = ("timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "stderr_to_stdout")


def run(config: SweepCommand) -> int:
    """Print the table of a sweep as it stands; return 0 where all runs are finished, the first bad exit code, or 75 where some may still go on."""
    if config.folder is None:
        raise ConfigError("folder must be a sweep's, e.g. multirun/1234. Got null instead; set folder=….")
    return print_table(Path(config.folder))


def run_sweep(command: str, overrides: list[str]) -> int:
    """Run every combination and print the table; return 0 where all went well, else the first bad exit code."""
    if command != "train":
        raise ConfigError(f"-m sweeps `hcsdl train`. Got `hcsdl {command}` instead.")
    jobs = combinations(overrides)
    folder = named_folder(overrides) or Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    write_sweep(folder, jobs)
    if f"hydra/launcher={SUBMITIT}" in overrides:
        return submit(jobs, folder, overrides)
    sys.argv = ["hcsdl", "-m", *overrides, *([] if named_folder(overrides) else [f"hydra.sweep.dir={folder}"])]
    register()
    try:
        hydra.main(version_base="1.3", config_path="pkg://hcsdl.conf", config_name=command)(run_job)()
    finally:
        code = print_table(folder)
    return code


def combinations(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each run, in Hydra's order (the last value varies fastest). Raises ConfigError where one of them cannot be."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise ConfigError(one_line(error, "train")) from error
    if not jobs:
        raise ConfigError("a sweep must have at least one job. These values give none.")
    for job_overrides in jobs:
        config = compose_command("train", job_overrides)
        if config.run_dir is not None:  # type: ignore[attr-defined]
            raise ConfigError("a sweep gives each job its own run_dir. Remove run_dir=…; hydra.sweep.dir=<folder> names the sweep's.")
    return jobs


def named_folder(overrides: list[str]) -> Path | None:
    """Return the folder that hydra.sweep.dir=… names."""
    named = [o.partition("=")[2] for o in overrides if o.startswith("hydra.sweep.dir=")]
    return Path(named[-1]) if named else None


def run_job(composed: DictConfig) -> None:
    """Run one combination in its own folder and write its exit code there. SystemExit(ExitCode.STOPPED) where a signal ended it, and so the sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    composed.run_dir = str(folder / "run")
    log.info("job %s: %s", HydraConfig.get().job.num, " ".join(HydraConfig.get().overrides.task))
    try:
        code = importlib.import_module("hcsdl.commands.train").run(resolve(composed, "train"))
    except Exception as error:
        code = getattr(error, "exit_code", ExitCode.FAILED)
        log.error("hcsdl: %s", error, exc_info=code == ExitCode.FAILED)
    write_json(folder / JOB, {"exit_code": code})
    if code == ExitCode.STOPPED:
        raise SystemExit(code)


# Under Slurm a combination is a job, or an element of an array, of any number of nodes.


def run_element(overrides: list[str]) -> int:
    """As the batch script of a job array's element, run its combination, then print the table so far; return the run's exit code.

    Raises ConfigError where the array has not exactly one element for each combination.
    """
    job, jobs = batch_job(), combinations(overrides)
    if job.elements != (0, len(jobs) - 1, len(jobs)):
        lowest, highest, number = job.elements
        raise ConfigError(
            f"the array must have an element for each of the sweep's {len(jobs)} combinations, counted from 0. It has {number} ({lowest} to {highest}); "
            f"submit it with sbatch --array=0-{len(jobs) - 1}."
        )
    folder = named_folder(overrides) or Path("multirun") / job.array
    write_sweep(folder, jobs, job.array)
    code = run_combination(folder, job.element, jobs[job.element])
    print_table(folder)
    return code


def run_combination(folder: Path, number: int, words: list[str]) -> int:
    """As the batch script of a job, run combination `number` of the sweep in `folder`; write and return its exit code.

    Nothing is written where the job goes back into the queue, or srun says 0 of a run that was ended from outside.
    """
    from hcsdl.commands.slurm import train

    job_folder, run_folder = folder / str(number), RunFolder(folder / str(number) / "run")
    job_folder.mkdir(parents=True, exist_ok=True)
    (job_folder / JOB).unlink(missing_ok=True)
    code, again = train(batch_job(), words, run_folder)
    if not again and (code or run_folder.summary.exists()):
        write_json(job_folder / JOB, {"exit_code": code})
    return code


def submit(jobs: list[list[str]], folder: Path, overrides: list[str]) -> int:
    """Submit the combinations with submitit, as the fields of hydra/launcher say; wait until Slurm runs none of them, and print the table.

    submitit writes and submits the batch script, nothing else: its own waiting relies on Slurm's accounting, which not every cluster has, and
    without it lasts for ever when a job dies. Here a job that squeue no longer lists as going has ended, however it did.
    """
    import submitit

    folder = folder.resolve()
    fields = launcher_fields(overrides)
    try:
        executor = submitit.AutoExecutor(folder=folder / ".submitit" / "%j", cluster="slurm")
    except RuntimeError as error:
        raise ConfigError(f"hydra/launcher={SUBMITIT} must be used where there is sbatch. {error}") from error
    delay, extra = fields.pop("signal_delay_s"), fields.pop("additional_parameters") or {}
    executor.update_parameters(name=fields.pop("name", "hcsdl-sweep"))
    executor.update_parameters(
        **{key if key in SHARED else f"slurm_{key}": value for key, value in fields.items()},
        slurm_additional_parameters={"signal": f"B:USR1@{delay}", "requeue": True} | extra,
        slurm_use_srun=False,  # the job's process starts the ranks over srun itself
    )
    try:
        submitted = executor.map_array(partial(run_combination, folder), range(len(jobs)), jobs)
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(
            f"sbatch must take the jobs with hydra.launcher as it is set. It said: {'; '.join(str(error).split(chr(10)))}"
        ) from error
    number = submitted[0].job_id.partition("_")[0]
    write_sweep(folder, jobs, number)
    log.info("%d runs submitted as job %s; their output is in %s", len(jobs), number, folder / ".submitit")
    try:
        while still_going(told := states(number)):
            if told is None:
                log.warning("squeue does not answer; waiting for it.")
            time.sleep(POLL_S if told else 60)
    except KeyboardInterrupt:
        log.info("the jobs go on: `hcsdl sweep folder=%s` prints the table, `scancel %s` ends them.", folder, number)
    return print_table(folder)


def launcher_fields(overrides: list[str]) -> dict:
    """Return the fields of hydra/launcher that are set, without those that only concern submitit's own waiting and restarts."""
    register()
    words = [word for word in overrides if word.startswith(("hydra/", "hydra."))]
    with initialize_config_module("hcsdl.conf", version_base="1.3"):
        launcher = compose("train", overrides=words, return_hydra_config=True).hydra.launcher
        fields = OmegaConf.to_container(launcher, resolve=False)
    ours = ("_target_", "submitit_folder", "max_num_timeout")
    return {key: value for key, value in fields.items() if value is not None and key not in ours and not str(value).startswith("${")}  # type: ignore[union-attr]
