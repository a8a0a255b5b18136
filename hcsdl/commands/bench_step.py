"""`hcsdl bench step`: whole training steps, PyTorch's and IPEX's documented ways beside hcsdl's, on this machine.

In: a `BenchStepCommand`. Out: tables on standard output; `result.json` and `steps.png` in the benchmark's folder, written again after every network.
One step: zero_grad, forward, loss, backward, SGD step on random images in memory. Promised: every variant lives in processes of its own, started once,
with an empty compiler cache; they take turns, one at a time (A B C … A B C …, first of all the matrix product), while the others sleep with their freed
memory given back; a turn's first step is not counted. A variant that fails is a row that says so, and the exit code is 1; one that is not installed is a row
with the reason.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hcsdl.commands.bench_profile import WORKER, judged, profile_in_process
from hcsdl.commands.bench_ranks import RESULT, head, open_folder
from hcsdl.commands.bench_step_table import PRODUCT, format_memory, format_model, format_targets, legend, memory_row, summarise, targets
from hcsdl.commands.bench_step_variants import VARIANTS, Variant, chosen, environments, missing
from hcsdl.config import BenchStepCommand, ConfigError, ExitCode
from hcsdl.distributed.identity import who_am_i
from hcsdl.distributed.workers import WorkerFailed, Workers
from hcsdl.machine.gpus import check_gpus
from hcsdl.machine.placement import Place, plan_places
from hcsdl.machine.preloading import TUNING, find_allocator
from hcsdl.machine.topology import read_machine
from hcsdl.training.run_folder import write_json

log = logging.getLogger(__name__)

COMMAND = "bench step"
LEAST_ROUNDS = 3
TURN_S, MOST_STEPS = 3.0, 50  # a turn lasts so long, or one step
MODEL_S = 430.0  # rounds end so that a network takes at most 8 minutes
MEMORY_IMAGES = (2, 6)  # mini-batches whose peak memory gives that of an image
MEASURED_FOR_MEMORY = ("bf16", "hcsdl_best", "hcsdl_lean")


def run(config: BenchStepCommand) -> int:
    """Measure every network, print and save; return the exit code."""
    identity = who_am_i()
    if identity.launcher not in ("alone", "own"):
        raise ConfigError(
            f"hcsdl bench step starts its own ranks on one machine: set distributed.ranks. Started by {identity.launcher} instead."
        )
    find_allocator(config.bench.preload)
    check_gpus(config.machine, config.distributed.ranks or 1)
    places = plan_places(read_machine(), config.distributed.ranks or 1, config.machine)
    folder = open_folder(COMMAND, config, config.bench.output)
    found: dict[str, dict] = {}
    for model in config.bench.models:
        with Session(model, config, places, folder) as session:
            session.measure()
        found[model] = session.result()
        print(
            f"{format_model(model, found[model], len(places), places[0].threads, found[model]['device_name'])}\n{format_memory(found[model]['memory'])}",
            flush=True,
        )
        save(folder, config, places, found)
    print(legend(config.machine.device))
    if config.bench.targets:
        print(format_targets(targets(found, len(places) * places[0].threads)))
    print(f"saved in {folder}", flush=True)
    return ExitCode.FAILED if any(row["status"] == "failed" for one in found.values() for row in one["rows"]) else ExitCode.DONE


def save(folder: Path, config: BenchStepCommand, places: tuple[Place, ...], found: dict[str, dict]) -> None:
    """Write `result.json` and the picture of the networks measured so far."""
    from hcsdl.report.plots import plot_steps

    result = head(COMMAND, config, len(places), 1) | {"threads_per_rank": places[0].threads, "models": found}
    if config.bench.targets:
        result["targets"] = targets(found, len(places) * places[0].threads)
    write_json(folder / RESULT, result)
    name = next(iter(found.values()))["device_name"]
    plot_steps({model: one["rows"] for model, one in found.items()}, name, folder / "steps.png")


class Session:
    """One network's measurement: its workers, its turns, and what came of them. A context: leaving it ends all workers."""

    def __init__(self, model: str, config: BenchStepCommand, places: tuple[Place, ...], folder: Path) -> None:
        self.model, self.config, self.places, self.folder = model, config, places, folder
        self.variants = chosen(config.bench.variants, model, config.bench.targets)
        self.workers: dict[str, Workers] = {}
        self.ended: dict[str, dict] = {}  # variants that are missing or have failed: status and reason
        self.started: dict[str, dict] = {}
        self.turns: list[dict] = []
        self.steps: dict[str, int] = {}
        self.memory: dict[str, dict] = {}
        self.profile: dict | None = None
        self.profile_reason = "bench.targets=false"
        self._stack = ExitStack()
        self._begun = time.monotonic()

    def __enter__(self) -> Session:
        self._cache = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hcsdl-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        for workers in self.workers.values():
            workers.kill()
        self._stack.close()

    def measure(self) -> None:
        """Take all turns, and after the first round the short measurements: memory, and with targets the ceiling."""
        bench = self.config.bench
        say = f"{self.model}: round %d of at most {bench.rounds}"
        log.info(say, 1)
        self.first_round()
        if bench.memory:
            log.info("%s: memory per image", self.model)
            self.measure_memory()
        if bench.targets:
            log.info("%s: the ceiling", self.model)
            self.measure_profile()
        longest_s = 0.0
        for number in range(1, bench.rounds):
            begun = time.monotonic()
            if number >= LEAST_ROUNDS and begun - self._begun + longest_s > MODEL_S:
                log.info("%s: %d rounds, not %d, to stay within 8 minutes", self.model, number, bench.rounds)
                break
            log.info(say, number + 1)
            for name in list(self.workers):
                self._turn(name, number, warm=False)
            longest_s = max(longest_s, time.monotonic() - begun)

    def first_round(self) -> None:
        """Start each variant and give it its first turn at once; those that are measured once end after it."""
        self._start(None, PRODUCT)
        self._turn(PRODUCT, 0, warm=True)
        for variant in self.variants:
            if reason := missing(variant, self.config.bench.preload, self.config.machine.device):
                self._end(variant.name, "missing", reason)
                continue
            if self._start(variant, variant.name):
                self._turn(variant.name, 0, warm=True)
            if variant.once and variant.name in self.workers:
                self.workers.pop(variant.name).close()

    def _end(self, name: str, status: str, reason: str) -> None:
        log.info("%s: %s %s: %s", self.model, name, status, reason)
        self.ended[name] = {"status": status, "reason": reason}

    def _new(self, variant: Variant | None, log_name: str, mini_batch_size: int) -> Workers:
        bench = self.config.bench
        task = {
            "kind": "product" if variant is None else "step",
            "variant": variant.name if variant else "",
            "model": self.model,
            "width": bench.width,
            "mini_batch_size": mini_batch_size,
            "image_size": bench.image_size,
            "seed": self.config.seed,
            "device": self.config.machine.device,
            "allocator": self.config.machine.allocator,
            "preload": str(find_allocator(bench.preload).resolve()) if variant and variant.preloaded else "",
            "distributed": dataclasses.asdict(self.config.distributed),
        }
        started = environments(variant, self.places, bench.preload, self._cache / log_name)
        bound = self.config.machine.pin and (variant is None or variant.ours or variant.preloaded)
        path = self.folder / "logs" / f"{self.model}_{log_name}.log"
        return Workers(WORKER, task, self.places, started, without=TUNING, log=path, bound=bound)

    def _start(self, variant: Variant | None, name: str) -> bool:
        """Start a variant's processes and take the first step; return whether it will have turns."""
        workers = self._new(variant, name.replace(" ", "_"), self.config.bench.mini_batch_size)
        self.workers[name] = workers
        answer = self._ask(name, do="start")
        if answer is None:
            return False
        if "missing" in answer[0]:
            self._end(name, "missing", answer[0]["missing"])
            self.workers.pop(name).close()
            return False
        self.started[name] = {"seconds": time.monotonic() - workers.begun, "told": answer[0]["told"]}
        return True

    def _ask(self, name: str, **command: object) -> list[dict] | None:
        try:
            return self.workers[name].ask(**command)
        except WorkerFailed as error:
            self._end(name, "failed", str(error))
            self.workers.pop(name)
            if name == PRODUCT:
                raise
            return None

    def _turn(self, name: str, number: int, warm: bool) -> None:
        """Let a variant take its steps; at its first turn find out how many fit into one."""
        steps = self.config.bench.steps or self.steps.get(name)
        answers = self._ask(name, do="turn", warm=warm, steps=steps or 1)
        if answers is not None and steps is None:
            self.steps[name] = max(1, min(MOST_STEPS, int(TURN_S / max(answers[0]["step_s"]))))
            if self.steps[name] > 1:
                answers = self._ask(name, do="turn", warm=True, steps=self.steps[name])
        if answers is None:
            return
        self.turns.append(
            {
                "variant": name,
                "round": number,
                "began_s": min(one["began_s"] for one in answers) - self._begun,
                "ended_s": max(one["ended_s"] for one in answers) - self._begun,
                "step_s": [max(times) for times in zip(*(one["step_s"] for one in answers), strict=True)],
                "peak_rss_gib": max(one["peak_rss_gib"] for one in answers),
                "peak_device_gib": max(one["peak_device_gib"] for one in answers),
            }
        )

    def measure_memory(self) -> None:
        """Note the peak memory of two steps with 2 and with 6 images, in processes started for that alone."""
        device = self.config.machine.device
        key = "peak_rss_gib" if device == "cpu" else "peak_device_gib"
        for name in MEASURED_FOR_MEMORY:
            if name in self.ended or name not in {one.name for one in self.variants}:
                continue
            peaks = []
            try:
                for images in MEMORY_IMAGES:
                    workers = self._new(VARIANTS[name], f"{name}_memory_{images}", images)
                    try:
                        workers.ask(do="start")
                        peaks.append(max(one[key] for one in workers.ask(do="turn", warm=True, steps=1)))
                    finally:
                        workers.close()
            except WorkerFailed as error:
                self.memory[name] = {"reason": str(error)}
                continue
            self.memory[name] = memory_row(MEMORY_IMAGES, peaks, device)

    def measure_profile(self) -> None:
        """Note the network's operators, its convolutions' rates and its ceiling, with hcsdl's best kernels."""
        bench = dataclasses.replace(self.config.bench, rounds=min(3, self.config.bench.rounds))
        try:
            found = profile_in_process(self.model, dataclasses.replace(self.config, bench=bench), "auto", self.places, self.folder)
        except WorkerFailed as error:
            self.profile_reason = f"failed: {error}"
            return
        self.profile = judged(found, bench.mini_batch_size)

    def result(self) -> dict[str, Any]:
        """Return all that was measured, and the table's rows."""
        from hcsdl.commands.bench_step_worker import CHANNELS, CLASSES
        from hcsdl.config import ModelConfig
        from hcsdl.models import build_model
        from hcsdl.models.counts import count

        bench = self.config.bench
        network = build_model(ModelConfig(name=self.model, width=bench.width), CHANNELS, CLASSES, tuple(bench.image_size))
        counts = count(network, (CHANNELS, *bench.image_size))
        product = self.started[PRODUCT]["told"]
        images = len(self.places) * bench.mini_batch_size
        rows, matrix = summarise(
            self.variants, self.turns, self.started, self.ended, images, counts.training_flop, product, len(self.places)
        )
        return {
            "rows": rows,
            "ranks": len(self.places),
            "device": self.config.machine.device,
            "device_name": product["device_name"],
            "matrix_product": matrix,
            "training_flop": counts.training_flop,
            "memory": self.memory,
            "profile": self.profile,
            "profile_reason": self.profile_reason,
            "turns": self.turns,
            "seconds": time.monotonic() - self._begun,
        }
