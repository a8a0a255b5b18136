"""What goes wrong, what is said, and the exit code: a test for each row of the README's table, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from hcsdl.commands.cli import main
from tests import forked, runs
from tests.plates.screens import write_screen

README = Path(__file__).parents[2] / "README.md"


def edit(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    """Return a fault that changes a CSV file of the screen."""

    def fault(root: Path) -> None:
        path = root / name
        change(pd.read_csv(path)).to_csv(path, index=False)

    return fault


def image(action: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a fault that does something to one image file."""
    return lambda root: action(sorted(root.rglob("*.tif"))[7]) and None


def rewrite(array: np.ndarray) -> Callable[[Path], None]:
    return image(lambda path: tifffile.imwrite(path, array))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


SHAPE = (48, 64)
BAD_PLATES = {
    "missing column": (edit("screen_image.csv", lambda t: t.drop(columns="Image_Metadata_Compound")), 3, "must have a column"),
    "duplicate field": (edit("screen_image.csv", lambda t: pd.concat([t, t.iloc[[3]]])), 3, "A field must stand once"),
    "unknown MoA": (edit("screen_moa.csv", lambda t: t.assign(moa=[None, *t.moa[1:]])), 3, "must have a moa"),
    "missing file": (image(os.remove), 3, "missing"),
    "truncated file": (image(cut), 3, "whole TIFF file"),
    "not a TIFF file": (image(lambda path: path.write_text("hello")), 3, "whole TIFF file"),
    "wrong shape": (rewrite(np.full((SHAPE[0], SHAPE[1] + 8), 7, np.uint16)), 3, "the channels differ"),
    "wrong dtype": (rewrite(np.full(SHAPE, 7, np.float32)), 3, "uint8 or uint16"),
    "all-black image": (rewrite(np.zeros(SHAPE, np.uint16)), 3, "constant"),
    "one class only": (edit("screen_moa.csv", lambda t: t.assign(moa="DMSO")), 3, "at least two classes"),
}


@pytest.mark.xeon_only
@pytest.mark.parametrize(("fault", "code", "said"), BAD_PLATES.values(), ids=BAD_PLATES)
def test_bad_plates(tmp_path: Path, fault: Callable, code: int, said: str, capsys: pytest.CaptureFixture) -> None:
    write_screen(tmp_path / "plates", shape=SHAPE)
    fault(tmp_path / "plates")
    words = [f"plates.root={tmp_path / 'plates'}", f"run_dir={tmp_path / 'run'}", "training.global_batch_size=4"]
    assert main(["train", *words]) == code
    err = capsys.readouterr().err
    line = next(text for text in err.splitlines() if text.startswith("hcsdl: "))
    assert said in line and "Traceback" not in err
    assert not (tmp_path / "run" / "config.yaml").exists(), "the folder must be free for the corrected command"


BAD_SETTINGS = {
    "empty split": (
        ["plates.query=\"Metadata_Well in ['B02', 'B04', 'B05'] and Metadata_Plate == 'Week1_20000'\"", "plates.split=random_well"],
        3,
        "val is empty",
    ),
    "fewer fields than a global batch": (["training.global_batch_size=64"], 2, "training.global_batch_size must be at most the"),
    "more ranks than fields": (
        ["distributed.ranks=64", "training.global_batch_size=64"],
        2,
        "training.global_batch_size must be at most the",
    ),
    "ranks that do not divide the batch": (["distributed.ranks=3"], 2, "must be a multiple of the number of ranks, 3"),
    "mini-batch that does not divide": (["distributed.ranks=1", "training.mini_batch_size=3"], 2, "training.mini_batch_size must divide"),
    "a target that differs within a well": (["training.target=Site"], 2, "must be the same for all sites of a well"),
    "no such target": (["training.target=mood"], 2, "training.target must be one of"),
    "no such root": (["plates.root=/nowhere"], 3, "plates.root must be a folder"),
    "no such checkpoint": (["training.resume=/nowhere"], 2, "There is nothing at /nowhere"),
    "read-only run folder": (["run_dir=/proc/run"], 2, "run_dir must be writable"),
}


@pytest.mark.xeon_only
@pytest.mark.parametrize(("words", "code", "said"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(tmp_path: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture) -> None:
    write_screen(tmp_path / "plates", shape=SHAPE)
    common = [f"plates.root={tmp_path / 'plates'}", f"run_dir={tmp_path / 'run'}", "training.global_batch_size=4"]
    assert main(["train", *common, *words]) == code
    assert said in capsys.readouterr().err


@pytest.mark.xeon_only
def test_a_command_that_never_trained_leaves_no_folder_of_its_own_naming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_screen(tmp_path / "plates", shape=SHAPE)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "plates.root=plates", "training.global_batch_size=64"]) == 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_broken_images_can_be_skipped_up_to_a_limit(tmp_path: Path) -> None:
    plates = tmp_path / "plates"
    write_screen(plates, shape=SHAPE, plates=4)
    images = sorted(plates.rglob("*.tif"))
    cut(images[0])
    images[40].unlink()
    words = [
        "model.width=0.125",
        "training.epochs=1",
        "data.on_bad_image=skip",
        "distributed.ranks=1",
        "kernels=reference",
        "training.baseline=true",
    ]
    done = forked.train(plates, tmp_path / "run", *words)
    found = runs.summary(tmp_path / "run")
    assert len(found["skipped_fields"]) == 2 and found["skipped_fields"][0] == "Week1_20000/B02/1"
    assert found["num_fields"] == 48 - 2
    assert "2 broken fields are skipped" in done.stderr
    refused = forked.train(plates, tmp_path / "strict", *words, "data.max_bad_fields=1", code=3)
    assert "at most data.max_bad_fields=1 fields may be skipped. 2 are broken" in refused.stderr


def test_non_finite_loss_stops_with_step_rank_and_fields(tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["distributed.ranks=2", "kernels=native", "training.warmup_epochs=0", "training.epochs=3", "training.learning_rate=1e30"]
    done = forked.train(tiny_plates, folder, *words, "training.checkpoint_every_steps=1", code=4)
    assert "the loss and its gradient must be finite. At step " in done.stderr
    assert "rank 0: " in done.stderr and "rank 1: " in done.stderr and "Week1_" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_a_used_folder_and_another_configuration(tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["distributed.ranks=1", "kernels=native", "training.epochs=1"]
    forked.train(tiny_plates, folder, *words)
    before = runs.digest(folder)

    again = forked.train(tiny_plates, folder, *words)
    assert "is finished: 8 steps" in again.stderr and runs.digest(folder) == before
    never = forked.train(tiny_plates, folder, *words, "training.resume=never", code=2)
    assert "training.resume=never needs a new run folder" in never.stderr
    other = forked.train(tiny_plates, folder, *words, "training.learning_rate=0.5", code=2)
    assert "training.learning_rate was 0.05 and is 0.5" in other.stderr

    # Another run may start from it, another model may not.
    onward = forked.train(tiny_plates, tmp_path / "onward", *words[:2], "training.epochs=2", f"training.resume={folder}")
    assert "resumed from step 8 of " in onward.stderr and runs.summary(tmp_path / "onward")["steps"] == 16
    wider = forked.train(
        tiny_plates, tmp_path / "wider", *words[:2], "training.epochs=2", "model.width=0.5", f"training.resume={folder}", code=3
    )
    assert "a checkpoint must be of the same model" in wider.stderr


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(tiny_plates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["distributed.ranks=1", "kernels=native", "training.epochs=2"]
    forked.train(tiny_plates, folder, *words, "training.max_steps=9", "training.checkpoint_every_steps=1")
    newest = sorted((folder / "checkpoints").glob("step-*.pt"))[-1]
    cut(newest)
    done = forked.train(tiny_plates, folder, *words)
    assert f"{newest.name} is not: " in done.stderr and "Trying the one before." in done.stderr
    assert "resumed from step 8" in done.stderr
    forked.train(tiny_plates, tmp_path / "alone", *words)
    assert runs.digest(folder) == runs.digest(tmp_path / "alone")


def test_a_second_run_on_a_live_one_is_refused(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["distributed.ranks=1", "kernels=native", "training.epochs=500"]
    process = forked.start_train(tiny_plates, tmp_path / "run", *words)
    try:
        runs.wait_for_step(process, tmp_path / "run", 1)
        second = forked.train(tiny_plates, tmp_path / "run", *words, code=2)
        assert f"is in use by process {process.pid}" in second.stderr
        assert process.poll() is None
    finally:
        runs.kill_session(process)


def in_namespace(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["unshare", "-m", *([] if os.geteuid() == 0 else ["-r"]), "bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=runs.environment(),
    )


MOUNTS = pytest.mark.skipif(
    shutil.which("unshare") is None or in_namespace("mount -t tmpfs none /mnt").returncode != 0,
    reason="this user may not mount a small disk",
)


@MOUNTS
def test_a_full_disk_while_saving_keeps_the_old_checkpoint(tiny_plates: Path, tmp_path: Path) -> None:
    words = " ".join(
        [
            *runs.TINY,
            f"plates.root={tiny_plates}",
            f"run_dir={tmp_path}/disk/run",
            "distributed.ranks=1",
            "kernels=native",
            "training.epochs=2",
        ]
    )
    script = f"""
mkdir {tmp_path}/disk && mount -t tmpfs -o size=14m none {tmp_path}/disk
{sys.executable} -m hcsdl train {words} training.checkpoint_every_steps=1; echo code $?
ls -A {tmp_path}/disk/run/checkpoints
mount -o remount,size=200m {tmp_path}/disk
{sys.executable} -m hcsdl train {words}; echo code $?
cp -r {tmp_path}/disk/run {tmp_path}/kept
"""
    done = in_namespace(script)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("code", "step-", ".step"))]
    assert lines[0] == "code 1" and lines[-1] == "code 0", done.stdout + done.stderr
    assert "No space left on device" in done.stderr and "Make room there" in done.stderr and "Traceback" not in done.stderr
    kept = [line for line in lines if line.endswith(".pt")]
    assert kept and not [line for line in lines if line.endswith(".tmp")]
    assert f"resumed from step {int(kept[-1][5:13])}" in done.stderr
    forked.train(tiny_plates, tmp_path / "alone", "distributed.ranks=1", "kernels=native", "training.epochs=2")
    assert runs.digest(tmp_path / "kept") == runs.digest(tmp_path / "alone")


@MOUNTS
def test_plates_on_a_read_only_disk_can_be_trained_on(tiny_plates: Path, tmp_path: Path) -> None:
    copy = tmp_path / "plates"
    shutil.copytree(tiny_plates, copy, ignore=shutil.ignore_patterns(".hcsdl"))
    words = " ".join(
        [*runs.TINY, f"plates.root={copy}", f"run_dir={tmp_path}/run", "distributed.ranks=2", "kernels=native", "training.epochs=1"]
    )
    done = in_namespace(f"mount --bind {copy} {copy} && mount -o remount,ro,bind {copy} && {sys.executable} -m hcsdl train {words}")
    assert done.returncode == 0, done.stderr
    assert "what is computed once goes into the run folder" in done.stderr
    assert not (copy / ".hcsdl").exists()


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "launcher alone"])
def test_an_interrupt_saves(tiny_plates: Path, tmp_path: Path, whole_group: bool) -> None:
    start_train = runs.start_train if whole_group else forked.start_train
    process = start_train(tiny_plates, tmp_path / "run", "distributed.ranks=2", "kernels=native", "training.epochs=500")
    runs.wait_for_step(process, tmp_path / "run", 1)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal's Ctrl-C does
    else:
        os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75 and "which is saved" in err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


def test_the_readme_lists_every_situation() -> None:
    table = README.read_text()
    for situation in [*BAD_PLATES, *BAD_SETTINGS]:
        assert situation.lower() in table.lower(), situation


def test_summary_has_what_is_promised(tiny_plates: Path, tmp_path: Path) -> None:
    words = [
        "experiment=tiny",
        f"plates.root={tiny_plates}",
        f"run_dir={tmp_path / 'run'}",
        "training.epochs=1",
        "kernels=native",
        "data.sampling=balanced",
    ]
    done = forked.run("train", *words)
    found = runs.summary(tmp_path / "run")
    promised = set(
        "val_accuracy val_macro_f1 well_accuracy baseline_accuracy target split leaky sampling num_fields num_wells_val images_per_s data_wait_share epochs steps "
        "seconds time_to_accuracy_s world_size threads_per_rank backend kernels precision allocator peak_rss_gib resumed versions processor git_commit config_hash "
        "index_hash seed schema_version".split()
    )
    assert promised <= set(found)
    assert (found["sampling"], found["leaky"], found["schema_version"]) == ("balanced", False, 1)
    assert found["backend"] in ("gloo", "ccl") and "gloo" in found["backend_reason"], "what `auto` took, and why"
    assert found["step_seconds"].keys() >= {"forward_backward_s", "exposed_communication_max_s"}
    assert set(found["time_to_accuracy_s"]) == {"0.90", "0.95", "0.99", "plateau"}
    assert (found["device"], found["peak_device_gib"]) == ("cpu", 0.0) and found["device_name"] == found["processor"]
    assert 0 <= found["data_wait_share"] <= 1 and found["images_per_s"] > 0
    assert "wells held out by random_well: accuracy" in done.stdout and f"run folder: {tmp_path / 'run'}" in done.stdout
    lines = runs.journal(tmp_path / "run")
    assert {"start", "step", "evaluation", "checkpoint", "end"} <= {line["event"] for line in lines}
    assert all("data_wait_share" in line for line in lines if line["event"] == "step")
    assert (tmp_path / "run" / "logs" / "rank1.log").exists() and list((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["leaky"] is False


@pytest.mark.parametrize("target", ["compound", "treatment"])
def test_targets_without_moa_never_read_the_moa_file(tiny_plates: Path, tmp_path: Path, target: str) -> None:
    plates = tmp_path / "plates"
    shutil.copytree(tiny_plates, plates)
    (plates / "BBBC021_v1_moa.csv").write_bytes(b"\xff\x00 no table at all")
    forked.train(plates, tmp_path / "run", f"training.target={target}", "training.epochs=1", "distributed.ranks=1", "kernels=native")
    found = runs.summary(tmp_path / "run")
    assert found["target"].lower() == f"metadata_{target}" and len(found["classes"]) == 7


def test_a_leaky_split_is_named_everywhere(tiny_plates: Path, tmp_path: Path) -> None:
    done = forked.train(
        tiny_plates, tmp_path / "run", "plates.split=random_field", "training.epochs=1", "distributed.ranks=1", "kernels=native"
    )
    assert "leaky" in done.stdout and "leaky" in done.stderr.lower()
    assert runs.summary(tmp_path / "run")["leaky"] is True
    assert "leaky" in runs.summary(tmp_path / "run")["split_sentence"]
