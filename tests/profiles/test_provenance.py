"""Leakage: what a run folder says the network saw; unknown is never taken for clean."""

from pathlib import Path

import pandas as pd
import pytest

from hcsdl.commands.compose import to_yaml
from hcsdl.config import DataError, PlatesConfig, TrainCommand, TrainingConfig
from hcsdl.profiles.provenance import Training, find_provenance, leak
from hcsdl.training.embeddings import write_table
from hcsdl.training.run_folder import write_json

pytestmark = pytest.mark.xeon_only


def write_run(
    folder: Path,
    *,
    target: str = "MoA",
    train: tuple[str, ...] = ("a", "b", "DMSO"),
    seed: int = 0,
    plates: PlatesConfig | None = None,
    resume_from: Path | None = None,
    **training: object,
) -> Path:
    """Write what a run leaves that tells what its network saw; return where its profiles would be."""
    folder.mkdir(parents=True)
    config = TrainCommand(
        seed=seed, run_dir=str(folder), plates=plates or PlatesConfig(root="x"), training=TrainingConfig(target=target, **training)
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_json(folder / "plan.json", {"target": f"Metadata_{target}", "resume_from": str(resume_from) if resume_from else None})
    index = pd.DataFrame({"Metadata_Compound": [*train, "held out"], "Metadata_Split": ["train"] * len(train) + ["val"]})
    index.to_parquet(folder / "index.parquet")
    return folder / "profiles.parquet"


def test_network_that_learned_the_mechanisms_is_leaky(tmp_path):
    table = write_run(tmp_path / "run")
    found = find_provenance(table)
    assert found.trained == (Training("Metadata_MoA", frozenset({"a", "b", "DMSO"})),) and found.complete and found.run == tmp_path / "run"
    leaky = leak(found, ["a", "b", "c", "held out"], learned=True)
    assert leaky.mark == "LEAKY" and "mechanisms of 2 of the 4 scored compounds" in leaky.sentence
    assert leak(found, ["c", "held out"], learned=True).kind == "none"
    deeper = find_provenance(tmp_path / "run" / "embeddings" / "x" / "a.parquet")
    assert (deeper.run, deeper.trained) == (found.run, found.trained) and deeper.method != found.method
    assert find_provenance(tmp_path / "run" / "embeddings" / "x" / "y" / "a.parquet") is None


def test_network_that_learned_treatments_saw_compounds_only(tmp_path):
    found = leak(find_provenance(write_run(tmp_path / "run", target="Treatment")), ["a", "b"], learned=True)
    assert (
        found.kind == "compounds"
        and found.mark == ""
        and "2 of the 2 scored compounds in training, labelled by Treatment" in found.sentence
    )


def test_unknown_is_marked(tmp_path):
    assert leak(find_provenance(tmp_path / "table.parquet"), ["a"], learned=True).mark == "leak unknown"
    assert leak(None, ["a"], learned=False).kind == "none"


def test_runs_that_differ_in_their_seed_are_one_method(tmp_path):
    one, two, other = (
        find_provenance(write_run(tmp_path / name, seed=seed, learning_rate=rate))
        for name, seed, rate in (("1", 1, 0.1), ("2", 2, 0.1), ("3", 1, 0.2))
    )
    assert one.method == two.method != other.method and (one.seed, two.seed) == (1, 2)


def test_what_the_run_before_saw_counts(tmp_path):
    """Weights that began in a run on mechanisms know them, whatever is learned afterwards; a run before that is gone is not taken for clean."""
    write_run(tmp_path / "first", target="MoA", train=("a",))
    later = find_provenance(
        write_run(tmp_path / "later", target="Treatment", train=("b",), resume_from=tmp_path / "first/checkpoints/best.pt")
    )
    assert [t.target for t in later.trained] == ["Metadata_Treatment", "Metadata_MoA"]
    assert leak(later, ["a"], learned=True).kind == "moa" and leak(later, ["b"], learned=True).kind == "compounds"
    lost = find_provenance(
        write_run(tmp_path / "lost", target="Treatment", train=("b",), resume_from=tmp_path / "gone/checkpoints/best.pt")
    )
    assert not lost.complete and leak(lost, ["c"], learned=True).mark == "leak unknown"


def write_embedding(
    path: Path, table: pd.DataFrame, *, weights: str = "trained", trained: tuple[tuple[str, list[str]], ...] = (), **about: object
) -> Path:
    """Write `table` as `hcsdl embed` does, with what it says of itself."""
    config = {"plates": {"split": "random_well", "fold": 0}, "training": {"target": "MoA"}, "seed": 0}
    parts = [{"target": target, "compounds": compounds} for target, compounds in trained]
    told = {"run": "runs/x", "seed": 0, "complete": True, "by": "field", "plates_root": "plates", "checkpoint": "step-000010.pt"} | about
    write_table(table, {"training_config": config, "weights": weights, "trained": parts} | told, path)
    return path


def test_table_of_embeddings_tells_itself_wherever_it_lies(tmp_path):
    table = pd.DataFrame({"Metadata_Plate": ["p"]})
    write_run(tmp_path / "run", target="MoA")
    inside = write_embedding(tmp_path / "run" / "random.parquet", table, weights="random", seed=3)
    random = find_provenance(inside)
    assert (random.trained, random.seed) == ((), 3)
    assert leak(random, ["a", "b"], learned=True).sentence == "The network's weights are random: nothing was trained."
    told = find_provenance(write_embedding(tmp_path / "moved.parquet", table, trained=(("Metadata_MoA", ["a"]),), checkpoint="best.pt"))
    assert leak(told, ["a"], learned=True).mark == "LEAKY" and told.best and not random.best
    assert told.method != find_provenance(write_embedding(tmp_path / "last.parquet", table, trained=(("Metadata_MoA", ["a"]),))).method


def test_table_that_tells_too_little(tmp_path):
    write_table(pd.DataFrame({"Metadata_Plate": ["p"]}), {"run": "x"}, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="must tell what its network saw"):
        find_provenance(tmp_path / "t.parquet")


def test_run_folder_that_cannot_tell(tmp_path):
    table = write_run(tmp_path / "run")
    (tmp_path / "run" / "index.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match=r"config.yaml, plan.json and index.parquet must tell what the network saw"):
        find_provenance(table)
