"""Before the ranks of `hcsdl embed` start: whose plates these are, what the network saw, where the table goes, what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hcsdl.commands.compose import to_yaml
from hcsdl.commands.embed import completed, deciding, default_name, finished, known_split, own_plates, training_run
from hcsdl.config import ConfigError, EmbedCommand, PlatesConfig, TrainCommand
from hcsdl.plates.index import Index
from hcsdl.training.embeddings import WorkFolder
from hcsdl.training.run_folder import RunFolder

pytestmark = pytest.mark.xeon_only


def index(root: Path, *, focus: float = 1.0, plates: tuple[str, ...] = ("p1", "p2"), folder: str = "") -> Index:
    table = pd.DataFrame(
        [
            {
                "Metadata_Plate": plate,
                "Metadata_Well": well,
                "Metadata_Site": 1,
                "Path_DAPI": f"{folder}{plate}_{well}.tif",
                "QC_Focus_DAPI": focus,
            }
            for plate in plates
            for well in ("B02", "B03")
        ]
    )
    return Index(table, ("DAPI",), root, "hash")


def run_index(root: Path) -> Index:
    own = index(root)
    return replace(own, table=own.table.assign(Metadata_Split=["train", "val", "val", "train"]))


def test_own_plates_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    run, fitted = run_index(tmp_path / "old"), {"p1", "p2"}
    assert own_plates(index(tmp_path / "old", focus=5.0), run, fitted) == fitted, "in the run's own folder nothing is compared"
    assert own_plates(index(tmp_path / "new", folder="Week1/"), run, fitted) == fitted, "moved, in another layout of folders"
    assert own_plates(index(tmp_path / "new", plates=("p2", "p9")), run, fitted) == {"p2"}


def test_plates_of_the_same_name_with_other_images_are_not_the_runs(tmp_path: Path) -> None:
    run, fitted = run_index(tmp_path / "old"), {"p1", "p2"}
    assert own_plates(index(tmp_path / "new", focus=1.5), run, fitted) == set()
    other = index(tmp_path / "new")
    other.table.loc[3, "Path_DAPI"] = "p2_B03_again.tif"
    assert own_plates(other, run, fitted) == {"p1"}


def test_split_is_told_of_own_plates_only(tmp_path: Path) -> None:
    table, run = index(tmp_path, plates=("p1", "p2", "p3")).table, run_index(tmp_path).table
    assert known_split(table, run, {"p1", "p2"}).tolist() == ["train", "val", "val", "train", None, None]
    assert known_split(table, run, {"p2"}).tolist() == [None, None, "val", "train", None, None]
    assert known_split(table[::-1], run, {"p1", "p2"}).tolist() == [None, None, "train", "val", "val", "train"]


def write_run(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.checkpoints.mkdir(parents=True)
    config = TrainCommand(plates=PlatesConfig(root="/data/demo", query="a > 1", control="mock", split="plate"))
    run.config.write_text(to_yaml(config), encoding="utf-8")
    for path in (run.plan, run.index, run.checkpoints / "best.pt"):
        path.write_bytes(b"")
    return run


def embed(checkpoint: str, **groups: object) -> EmbedCommand:
    """Return the settings of a command: `seed=1`, `plates={"root": …}` and so on."""
    usual = EmbedCommand(checkpoint=checkpoint)
    return replace(
        usual, **{key: replace(getattr(usual, key), **value) if isinstance(value, dict) else value for key, value in groups.items()}
    )


def test_plates_and_table_are_the_runs_unless_others_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = completed(embed(str(run.path)), run)
    assert (config.plates.root, config.plates.query, config.plates.control) == ("/data/demo", "a > 1", "mock")
    assert config.embed.output == str(tmp_path / "run" / "embeddings" / "demo.parquet")
    assert completed(embed(str(run.path), plates={"query": "b"}), run).plates.query == "b"
    other = completed(embed(str(run.path), plates={"root": "/data/new"}, embed={"output": f"{tmp_path}/x.parquet"}), run)
    assert (other.plates.root, other.plates.query, other.plates.control) == ("/data/new", None, "DMSO")
    assert other.embed.output == f"{tmp_path}/x.parquet"
    with pytest.raises(ConfigError, match=r"embed.output must end in .parquet"):
        completed(embed(str(run.path), embed={"output": "x.csv"}), run)


def test_relative_plates_are_those_of_the_training_wherever_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run started with plates.root=plates finds them from another folder, and where the whole project was moved."""
    run = write_run(tmp_path / "run")
    plates = PlatesConfig(root="plates")
    run.config.write_text(to_yaml(TrainCommand(plates=plates)), encoding="utf-8")
    (tmp_path / "plates").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    index = run_index(Path("plates"))
    index.save(run.path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert completed(embed(str(run.path)), run).plates.root == str(tmp_path / "plates")
    (tmp_path / "plates").rename(tmp_path / "elsewhere" / "plates")
    assert completed(embed(str(run.path)), run).plates.root == str(tmp_path / "elsewhere" / "plates")


def test_it_goes_on_with_the_checkpoint_it_began_with_or_not_at_all(tmp_path: Path) -> None:
    """A table begun with one checkpoint is never finished, under the same name, by a command that asks for another."""
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    for folder, step, content in ((run, 1, b"one"), (run, 2, b"two"), (other, 1, b"three")):
        (folder.checkpoints / f"step-{step:08d}.pt").write_bytes(content)
    output = str(tmp_path / "table.parquet")

    def goes_on(checkpoint: Path, training: RunFolder) -> bool:
        config = completed(embed(str(checkpoint), embed={"output": output}), training)
        folder.config.write_text(to_yaml(config), encoding="utf-8")
        return finished(folder, config, training)

    folder = WorkFolder(Path(output).with_suffix(".work"))
    folder.path.mkdir()
    begun = {"checkpoint": "step-00000001.pt", "checkpoint_sha256": hashlib.sha256(b"one").hexdigest(), "run": str(run.path)}
    folder.plan.write_text(json.dumps(begun), encoding="utf-8")
    assert not goes_on(run.path, run), "the run has a later one by now"
    assert not goes_on(run.checkpoints / "step-00000001.pt", run)
    for checkpoint, training in ((run.checkpoints / "step-00000002.pt", run), (other.path, other), (run.checkpoints / "best.pt", run)):
        with pytest.raises(ConfigError, match=r"with the checkpoint it began with. In .*table.work that was step-00000001.pt of"):
            goes_on(checkpoint, training)
    (run.checkpoints / "step-00000001.pt").unlink()
    assert not goes_on(run.path, run), "the run has dropped it since"
    folder.plan.write_text(json.dumps(begun | {"checkpoint": "best.pt"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"that was best.pt"):
        goes_on(run.path, run)


def test_names_tell_what_was_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    best = str(run.checkpoints / "best.pt")
    assert default_name(embed(best), "/a/demo/") == "demo_best"
    assert default_name(embed(str(run.path), embed={"by": "well", "weights": "random"}, seed=3), "/a/demo") == "demo_random3_wells"


def test_only_what_decides_the_numbers_must_stay(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run").path)
    same = embed(
        run,
        distributed={"ranks": 3},
        data={"workers": 0},
        embed={"save_every_s": 1.0},
        machine={"threads_per_rank": 1},
        plates={"cache": "c"},
    )
    assert deciding(same) == deciding(embed(run))
    for other in (
        {"embed": {"by": "well"}},
        {"embed": {"mini_batch_size": 7}},
        {"kernels": {"name": "native"}},
        {"plates": {"query": "a"}},
        {"plates": {"root": "/elsewhere"}},
        {"seed": 1},
    ):
        assert deciding(embed(run, **other)) != deciding(same), other


def test_a_checkpoint_stands_in_a_run_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert training_run(str(run.path)).path == training_run(str(run.checkpoints / "best.pt")).path == run.path
    for wrong, said in (
        (None, "Got null"),
        (str(tmp_path / "nowhere"), "nothing at"),
        (str(tmp_path), "has no config.yaml"),
    ):
        with pytest.raises(ConfigError, match=f"checkpoint must be a run folder, or a checkpoint file in one.*{said}"):
            training_run(wrong)
