"""`make screen` on tiny plates: from drawn plates to the report, with the README's own command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.forked import on_call
from tests.runs import environment, with_the_tests

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
ALONE = "distributed.ranks=1 machine.threads_per_rank=1"
SHORT = f"training.epochs=1 training.global_batch_size=12 training.baseline=false {ALONE}"


def test_from_plates_to_report(tmp_path: Path) -> None:
    """One test for what eleven commands left: where tests are shared out, each worker would run them all."""
    screen = made(tmp_path / "tiny")
    the_headline_is_not_leaky_and_what_is_says_so(screen)
    the_headline_is_compared_with_every_baseline(screen)
    every_compound_is_held_out_once(screen)
    there_is_a_report(screen)


def made(folder: Path) -> Path:
    """Return the folder of a finished tiny screen."""
    with on_call() as hcsdl:
        settings = [f"HCSDL={' '.join(hcsdl)}", f"SCREEN={folder}", "SIZE=tiny", "FOLDS=0 1", f"TRAIN={SHORT}", f"EMBED={ALONE}"]
        done = subprocess.run(
            ["make", "-o", "env", "screen", *settings],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, preexec_fn=with_the_tests(), check=False,  # noqa: PLW1509  it takes no lock
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def the_headline_is_not_leaky_and_what_is_says_so(screen: Path) -> None:
    """The first network read no mechanism's name, and the one that learned them is marked."""
    found = json.loads((screen / "scores/scores.json").read_text())
    marks = {table["name"]: table["leak"]["mark"] for table in found["tables"]}
    assert marks == {"treatments": "", "mechanisms": "LEAKY"}
    assert {table["name"]: table["leak"]["kind"] for table in found["tables"]}["treatments"] == "compounds"


def the_headline_is_compared_with_every_baseline(screen: Path) -> None:
    """NSC and NSCB of the first network stand beside a random network's and intensities', each with a paired interval; tiny fields have too few
    cells for their count to vary among a plate's controls, which is said."""
    found = json.loads((screen / "scores/scores.json").read_text())
    compared = {(one["rule"], one["second"]) for one in found["comparisons"]}
    others = ("mechanisms", "baseline: random network", "baseline: intensity")
    assert compared == {(rule, other) for rule in ("NSC", "NSCB") for other in others}
    assert all(one["low"] <= one["value"] <= one["high"] for one in found["comparisons"])
    assert any("cell count" in note for note in found["tables"][0]["notes"])


def every_compound_is_held_out_once(screen: Path) -> None:
    """The folds' networks, taken together, are asked about each compound once, by one that never saw it."""
    folds = json.loads((screen / "scores_folds/scores.json").read_text())["folds"]
    wells = next(figures for figures in folds["figures"] if figures["unit"].startswith("well"))
    assert len(folds["tables"]) == 2 and wells["compounds"] == 6


def there_is_a_report(screen: Path) -> None:
    """One page, with the headline's table in it."""
    page = (screen / "report/report.html").read_text()
    assert "NSCB" in page and "LEAKY" in page
