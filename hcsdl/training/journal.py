"""What a run says while it works: a progress bar, one JSON line every few seconds, TensorBoard.

Rank 0 holds a `Journal`, the other ranks a `Silence`; the training loop calls either. Every line has `event`, `attempt`, `step`, `time`.
After a resume the lines of steps done twice stand twice: the later attempt's count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hcsdl.machine.process import bar_options
from hcsdl.training.run_folder import SCHEMA_VERSION, RunFolder


class Silence:
    """Says nothing."""

    def step(self, step: int, fields: int, values: dict[str, Any]) -> None:
        """A step is done."""

    def event(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Something happened that is not a step."""

    def say(self, text: str) -> None:
        """Say a sentence to the user."""

    def close(self) -> None:
        """No more is to come."""


class Journal(Silence):
    """Writes `journal.jsonl` and `tensorboard/` of a run folder and draws the bar on standard error."""

    def __init__(self, folder: RunFolder, *, every_s: float, first_step: int, total_steps: int, steps_per_epoch: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._every_s, self._steps_per_epoch = folder, every_s, steps_per_epoch
        self._file = open(folder.journal, "a", buffering=1, encoding="utf-8")
        if folder.journal.stat().st_size and not folder.journal.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a crash has cut the last line
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=sys.stderr.isatty(), **bar_options())
        self._due = 0.0
        self._since: dict[str, float] = dict.fromkeys(("steps", "fields", "step_s", "data_wait_s"), 0.0)

    def step(self, step: int, fields: int, values: dict[str, Any]) -> None:
        """`values` holds loss, learning_rate, gradient_norm, step_s, data_wait_s and the `seconds` of its parts of one step over `fields` fields."""
        since = self._since
        for name, value in (("steps", 1), ("fields", fields), ("step_s", values["step_s"]), ("data_wait_s", values["data_wait_s"])):
            since[name] += value
        for name, value in values["seconds"].items():
            since[name] = since.get(name, 0.0) + value
        rate = fields / values["step_s"]
        self._bar.set_description_str(f"epoch {step / self._steps_per_epoch:.2f}", refresh=False)
        share = since["data_wait_s"] / since["step_s"]
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.2f} images/s, data wait {100 * share:.0f} %", refresh=False)
        self._bar.update(1)
        if time.monotonic() < self._due and step < self._bar.total:
            return
        self._due = time.monotonic() + self._every_s
        line = {
            "epoch": round(step / self._steps_per_epoch, 4),
            "loss": values["loss"],
            "learning_rate": values["learning_rate"],
            "gradient_norm": values["gradient_norm"],
            "images_per_s": since["fields"] / since["step_s"],
            "step_s": since["step_s"] / since["steps"],
            **{name: since[name] / since["steps"] for name in values["seconds"]},
            "data_wait_share": share,
            "peak_rss_gib": values["peak_rss_gib"],
        }
        self._since = dict.fromkeys(since, 0.0)
        self.event("step", step, line)

    def event(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write one line; its numbers go to TensorBoard too."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "event": event,
            "attempt": self._folder.attempt,
            "step": step,
            "time": round(time.time(), 3),
        }
        self._file.write(json.dumps(head | values) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{event}/{name}", value, step)

    def say(self, text: str) -> None:
        """Print a sentence above the bar."""
        self._bar.clear()
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar and the files."""
        self._bar.close()
        self._board.close()
        self._file.close()


def read_journal(path: Path) -> list[dict]:
    """Return the lines of a journal as dicts; a line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
