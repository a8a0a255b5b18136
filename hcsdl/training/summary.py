"""`summary.json`: what a run was and what came out, in one flat object. No torch of its own: versions are read from the packages' metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

THRESHOLDS = (0.90, 0.95, 0.99)
PLATEAU = 0.01  # an accuracy this little below the last one is as good; a guess
PACKAGES = ("hcsdl", "torch", "torchvision", "intel-extension-for-pytorch", "oneccl", "numpy", "pandas", "hydra-core", "tifffile")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, of those installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, `+changes` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie inside another project's checkout
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def time_to_accuracy(history: Sequence[dict], key: str) -> dict[str, float | None]:
    """Return {threshold: seconds of training until an evaluation first reached it, None if never} of one figure of the evaluations.

    `plateau` is the last evaluation's figure less `PLATEAU`: how long it took to be as good as the run got in the end. Seconds are those of the
    training loop over all attempts, evaluations and checkpoints included, start-up and what is done before the ranks start not.
    """
    thresholds = {f"{threshold:.2f}": threshold for threshold in THRESHOLDS}
    if history:
        thresholds["plateau"] = history[-1][key] - PLATEAU
    found: dict[str, float | None] = {}
    for name, threshold in thresholds.items():
        reached = [e["elapsed_s"] for e in history if e[key] >= threshold]
        found[name] = round(reached[0], 1) if reached else None
    return found
