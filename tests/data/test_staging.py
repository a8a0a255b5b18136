"""Copies on the node's own disk: whole, made once, of what the sources are now, shared, and never the reason that a run ends wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from hcsdl.config import ConfigError, DataError
from hcsdl.data import staging
from hcsdl.data.reading import read_field
from hcsdl.data.staging import Progress, StagedIndex, copies_folder, copy_checked, interim, stage_fields
from hcsdl.plates.index import Index, content_hash

FIELDS, CHANNELS = 30, ("DAPI", "Actin")
FILES = FIELDS * len(CHANNELS)
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from hcsdl.data import staging
from tests.data.test_staging import staged_alone
wait_for, kill_at = Path(sys.argv[3]), int(sys.argv[4])
replace, done = os.replace, []
def replace_or_die(*paths):
    done.append(replace) or (0 < kill_at <= len(done) and os.kill(os.getpid(), signal.SIGKILL))
    time.sleep(0.02)  # long enough for another process to come in between
    replace(*paths)
os.replace = replace_or_die
print("ready", flush=True)
while not wait_for.exists():
    pass
print(staged_alone(Path(sys.argv[1]), Path(sys.argv[2]))[0], flush=True)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of plates: FIELDS fields of 24 × 32 px, all different."""
    folder = tmp_path / "plates"
    random = np.random.default_rng(0)
    for plate in ("A", "B"):
        (folder / plate).mkdir(parents=True)
    for row in range(FIELDS):
        for channel in CHANNELS:
            tifffile.imwrite(folder / path_of(row, channel), random.integers(0, 4000, (24, 32), dtype=np.uint16))
    return folder


def path_of(row: int, channel: str) -> str:
    return f"{'AB'[row % 2]}/{row}_{channel}.tif"


def index_of(root: Path, fields: int = FIELDS) -> Index:
    table = pd.DataFrame(
        {"Metadata_Plate": [f"P{row % 2}" for row in range(fields)], "Metadata_Well": "B02", "Metadata_Site": range(fields)}
    )
    for channel in CHANNELS:
        table[f"Path_{channel}"] = [path_of(row, channel) for row in range(fields)]
    return Index(table, CHANNELS, root, content_hash(table, CHANNELS))


def staged_alone(root: Path, stage: Path, fields: int = FIELDS) -> tuple[str, StagedIndex]:
    """Stage as the only rank; return the sentence and the staged index."""
    said: list[str] = []
    index = stage_fields(index_of(root, fields), stage, node="n1", leads=True, meet=lambda progress: [progress], say=said.append)
    return said[-1], index


def copies(stage: Path) -> list[Path]:
    return sorted(stage.rglob("*.tif"))


def pixels(index: Index) -> np.ndarray:
    return np.stack([read_field(index.paths(row)) for row in range(len(index.table))])


def start(root: Path, stage: Path, go: Path, kill_at: int = 0) -> subprocess.Popen:
    """Stage in another process, as soon as the file `go` is there; it kills itself at its `kill_at`-th copy."""
    words = [sys.executable, "-c", SCRIPT, str(root), str(stage), str(go), str(kill_at)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_the_fields_of_the_run_are_copied_and_read_from_the_copies(root: Path, tmp_path: Path) -> None:
    said, index = staged_alone(root, tmp_path / "disk", fields=FIELDS - 3)
    count = FILES - 3 * len(CHANNELS)
    assert said.startswith(f"staged {count} files, ") and ", 0 were there: " in said
    assert len(copies(tmp_path / "disk")) == count  # of no other field
    paths = [path for row in range(len(index.table)) for path in index.paths(row)]
    assert sorted(paths) == copies(tmp_path / "disk")
    np.testing.assert_array_equal(pixels(index), pixels(index_of(root, FIELDS - 3)))
    assert index.hash == index_of(root, FIELDS - 3).hash


def test_a_later_run_copies_only_what_is_missing_or_has_changed(root: Path, tmp_path: Path) -> None:
    staged_alone(root, tmp_path / "disk", fields=FIELDS - 3)
    before = {path: path.stat().st_ino for path in copies(tmp_path / "disk")}
    changed, touched = root / path_of(0, "DAPI"), root / path_of(1, "DAPI")
    tifffile.imwrite(changed, np.full((24, 32), 7, np.uint16))  # as many bytes as before
    os.utime(touched)
    said, index = staged_alone(root, tmp_path / "disk")
    assert said.startswith(f"staged {2 + 3 * len(CHANNELS)} files, ") and f", {FILES - 2 - 3 * len(CHANNELS)} were there" in said
    again = {path for path, number in before.items() if path.stat().st_ino != number}
    assert again == {index.copies / path_of(0, "DAPI"), index.copies / path_of(1, "DAPI")}
    np.testing.assert_array_equal(pixels(index), pixels(index_of(root)))
    assert staged_alone(root, tmp_path / "disk")[0].startswith("staged 0 files, ")


def test_plates_of_the_same_name_elsewhere_have_copies_of_their_own(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / root.name
    assert copies_folder(root, tmp_path) != copies_folder(other, tmp_path)
    assert copies_folder(root, tmp_path) == copies_folder(tmp_path / "x" / ".." / root.name, tmp_path)


def test_a_killed_staging_goes_on_with_what_is_missing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    process = start(root, tmp_path / "disk", tmp_path / "go", kill_at=FILES // 2)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there = {path: path.stat().st_ino for path in copies(tmp_path / "disk")}
    assert FILES // 2 - staging.THREADS <= len(there) < FILES
    assert list((tmp_path / "disk").rglob("*.part"))  # it was killed in the middle of a copy

    said, index = staged_alone(root, tmp_path / "disk")
    assert said.startswith(f"staged {FILES - len(there)} files, ") and f", {len(there)} were there" in said
    assert all(path.stat().st_ino == number for path, number in there.items())
    assert not list((tmp_path / "disk").rglob("*.part"))
    np.testing.assert_array_equal(pixels(index), pixels(index_of(root)))


def test_runs_that_begin_at_once_make_one_set_of_copies(root: Path, tmp_path: Path) -> None:
    processes = [start(root, tmp_path / "disk", tmp_path / "go") for _ in range(2)]
    assert all(process.stdout and process.stdout.readline() == "ready\n" for process in processes)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(int(out.split()[1]) for out, _ in said) == FILES, said
    assert len(copies(tmp_path / "disk")) == FILES


def test_a_copy_that_vanishes_is_read_from_its_source(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, index = staged_alone(root, tmp_path / "disk")
    for row in (3, 4):
        (index.copies / path_of(row, "Actin")).unlink()
    assert index.paths(3) == [index.copies / path_of(3, "DAPI"), root / path_of(3, "Actin")]
    np.testing.assert_array_equal(pixels(index), pixels(index_of(root)))
    assert len(caplog.records) == 1 and "is read from" in caplog.text


def test_a_source_that_cannot_be_read_is_left_to_the_loader(root: Path, tmp_path: Path) -> None:
    """Whether a bad image ends the run is decided where images are read, by data.on_bad_image."""
    _, index = staged_alone(root, tmp_path / "disk")
    (root / path_of(5, "DAPI")).unlink()
    said, index = staged_alone(root, tmp_path / "disk")
    assert "1 could not be copied and are read from their source" in said
    assert not (index.copies / path_of(5, "DAPI")).exists()  # nobody knows whether it still is what its source was
    with pytest.raises(DataError, match="An image is missing"):
        read_field(index.paths(5))


def test_too_little_room_is_told_before_anything_is_copied(root: Path, tmp_path: Path) -> None:
    for image in root.rglob("*.tif"):
        os.truncate(image, 2**43)  # a sparse file: 8 TiB that take no room
    needed = r"too little room: 527,765\.58 GB are needed for 60 files, [\d,.]+ [GM]B are free, on "
    with pytest.raises(ConfigError, match=needed) as caught:
        staged_alone(root, tmp_path / "disk")
    assert "\n" not in str(caught.value)
    assert not copies(tmp_path / "disk")


def test_a_disk_that_fills_up_meanwhile_is_told_with_what_is_needed(root: Path, tmp_path: Path) -> None:
    """Others may take the room that was there at the start: a file system of its own, filled by what is staged."""
    script = """
import json, sys
from pathlib import Path
from hcsdl.config import ConfigError
from hcsdl.data import staging
from tests.data.test_staging import staged_alone
staging.Stager._require_room = lambda self, lacking: None  # what it would have refused fills up while it is copied
try:
    staged_alone(Path(sys.argv[1]), Path(sys.argv[2]))
except ConfigError as error:
    print(json.dumps([str(error), len(list(Path(sys.argv[2]).rglob("*.part")))]))
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = 'mount -t tmpfs -o size=96k none "$2" || exit 99; exec "$3" -c "$0" "$1" "$2"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, script, str(root), str(disk), sys.executable]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60, check=False)
    if done.returncode in (1, 99) and not done.stdout and "Traceback" not in done.stderr:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    text, parts = json.loads(done.stdout)
    assert "No space left on device" in text and " more are needed for " in text and " are free" in text, text
    assert parts == 0


def test_a_disk_that_gives_back_other_bytes_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rot(file: int, *_: int) -> None:  # between being written and being read back
        os.pwrite(file, b"rotten", 300)

    monkeypatch.setattr(os, "posix_fadvise", rot)
    copy = tmp_path / "disk" / "copy.tif"
    with pytest.raises(DataError, match="a copy must equal its source"):
        copy_checked(root / path_of(0, "DAPI"), copy)
    assert not list(copy.parent.iterdir())


def test_a_folder_that_cannot_be_made_is_told_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data.stage must be a writable folder.* Not a directory") as caught:
        staged_alone(root, tmp_path / "file" / "disk")
    assert "\n" not in str(caught.value)


def slow_copy(source: Path, copy: Path) -> int | None:
    time.sleep(0.2)
    return copy_checked(source, copy)


def test_every_rank_hears_of_a_node_that_failed_and_waits_for_the_slowest(root: Path, tmp_path: Path) -> None:
    done = Progress("n1", to_copy=9, copied=9, copied_bytes=90, seconds=1.0, finished=True)
    reports = iter([Progress("n2", to_copy=9), Progress("n2", to_copy=9, copied=9, copied_bytes=90, seconds=2.0, finished=True)])
    said: list[str] = []
    stage_fields(index_of(root), tmp_path / "disk", node="n1", leads=False, meet=lambda own: [own, done, next(reports)], say=said.append)
    assert next(reports, None) is None and "18 files, 0.0 MB on 2 nodes in 2 s" in said[0]  # it has waited for the second report
    assert not (tmp_path / "disk").exists()  # and copied nothing itself

    failed = Progress("n2", error=ConfigError("n2 has no room"))
    with pytest.raises(ConfigError, match="n2 has no room"):
        stage_fields(index_of(root), tmp_path / "disk", node="n1", leads=True, meet=lambda own: [own, failed], say=said.append)


@pytest.mark.parametrize(
    ("slowest", "said"),
    [
        (
            Progress("n2", to_copy=4000, copied=1200, copied_bytes=3 * 10**9, bytes_to_copy=10**10, seconds=4.0),
            "staging: n2 has 1,200 of 4,000 files, 3.00 GB of 10.00 GB (0.75 GB/s), 1 of 2 nodes are done",
        ),
        (Progress("n2", waiting=True), "staging: n2 waits for another run that stages the same plates there"),
    ],
)
def test_progress_names_the_slowest_node(slowest: Progress, said: str) -> None:
    nodes = [Progress("n1", to_copy=4000, copied=4000, copied_bytes=10**10, bytes_to_copy=10**10, seconds=4.0, finished=True), slowest]
    assert interim(nodes) == said


def test_an_end_in_the_middle_leaves_nothing_half_done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is heard while files are copied: those begun are ended, no further one is begun, and a later run goes on."""

    def stop(progress: Progress | None) -> list[Progress | None]:
        if copies(tmp_path / "disk"):
            raise InterruptedError
        return [progress]

    monkeypatch.setattr(staging, "copy_checked", slow_copy)
    with pytest.raises(InterruptedError):
        stage_fields(index_of(root), tmp_path / "disk", node="n1", leads=True, meet=stop, say=print)
    assert not list((tmp_path / "disk").rglob("*.part"))
    there = len(copies(tmp_path / "disk"))
    assert there < FILES
    monkeypatch.undo()
    assert f"staged {FILES - there} files" in staged_alone(root, tmp_path / "disk")[0]


def test_ranks_that_wait_meet_again_and_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the copying takes, no rank waits in one collective for it: a backend's time-out would end the run."""

    monkeypatch.setattr(staging, "copy_checked", slow_copy)
    seen: list[Progress] = []

    def meet(progress: Progress | None) -> list[Progress | None]:
        assert progress
        seen.append(progress)
        return [progress]

    stage_fields(index_of(root), tmp_path / "disk", node="n1", leads=True, meet=meet, say=print)
    assert len(seen) >= 5 and seen[-1].finished
    counts = [progress.copied for progress in seen]
    assert counts == sorted(counts) and any(0 < count < FILES for count in counts) and counts[-1] == FILES
