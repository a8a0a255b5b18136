"""The package works from a wheel: configuration files travel inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xeon_only
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the built wheel installed in it, without dependencies."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.split()
    assert tracked, "the test needs a git checkout"
    for name in tracked:
        if (HERE / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((HERE / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work, source], check=True, capture_output=True)
    wheel = next(work.glob("*.whl"))
    target = work / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    return target


def test_train_composes_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    script = "import hcsdl, sys; print(hcsdl.__file__, file=sys.stderr); from hcsdl.commands.cli import main; sys.exit(main())"
    words = ["train", "experiment=bbbc021_mcnn", "--cfg", "job"]
    told = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert str(installed) in told.stderr, "the test ran another copy"
    assert "global_batch_size: 256" in told.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_configuration_file_is_in_the_wheel(installed: Path) -> None:
    here = {p.relative_to(HERE / "conf") for p in (HERE / "conf").rglob("*.yaml")}
    there = {p.relative_to(installed / "hcsdl" / "conf") for p in (installed / "hcsdl" / "conf").rglob("*.yaml")}
    assert here == there and len(here) > 10


def test_the_wheel_has_no_tests(installed: Path) -> None:
    names = zipfile.ZipFile(next(installed.parent.glob("*.whl"))).namelist()
    assert not [n for n in names if n.startswith("tests/")]
