"""By hand: does the loader starve a step? Training steps fed by the loader, against the same steps on tensors already in memory.

    python tests/bench_loader.py plates/demo resnet50 [steps a round] [rounds]

One process, all cores, rounds interleaved, page cache warm; prints the median images/s of both, their ratio and the share of waiting.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from hcsdl.machine.memory import keep_freed_memory

keep_freed_memory()

from hcsdl.commands.compose import compose_command, to_yaml  # noqa: E402
from hcsdl.commands.prepare import prepare  # noqa: E402
from hcsdl.commands.run import Run  # noqa: E402
from hcsdl.distributed.identity import Identity  # noqa: E402
from hcsdl.training.loop import train_step  # noqa: E402
from hcsdl.training.run_folder import RunFolder, write_atomically  # noqa: E402


def main() -> None:
    """Measure and print one model."""
    plates, model = sys.argv[1:3]
    steps, rounds = (int(word) for word in (*sys.argv[3:5], 5, 5)[:2]) if len(sys.argv) == 5 else (5, 5)
    words = [f"plates.root={plates}", f"model={model}", "training.global_batch_size=2", "plates.split=plate", "training.baseline=false"]
    with tempfile.TemporaryDirectory() as work:
        config = compose_command("train", [*words, f"run_dir={work}/run"])
        folder = RunFolder(Path(work) / "run")
        folder.acquire()
        prepare(config, folder, None)
        write_atomically(folder.config, to_yaml(config).encode())
        run = Run(config, folder, Identity(), lambda: False, "kept")
        loader = run.parts.loader(0, 10_000)
        fed = iter(loader)
        memory = next(fed)
        rates: dict[str, list[float]] = {"loader": [], "memory": []}
        for number in range(rounds + 1):  # the first round warms up
            for how, seen in rates.items():
                begun = time.perf_counter()
                for step in range(steps):
                    train_step(run.parts, next(fed) if how == "loader" else memory, step, False)
                if number:
                    seen.append(steps * 2 / (time.perf_counter() - begun))
        loader.close()
        run.journal.close()
    middle = {how: statistics.median(seen) for how, seen in rates.items()}
    print(
        f"{model}: loader {middle['loader']:.3f} images/s, memory {middle['memory']:.3f}, ratio {middle['loader'] / middle['memory']:.3f}, rounds {rates}"
    )


if __name__ == "__main__":
    main()
