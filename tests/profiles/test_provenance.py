"""Leakage: what a run folder says the network saw; unknown is never taken for clean."""

from pathlib import Path

import pandas as pd
import pytest

from hcsdl.commands.compose import to_yaml
from hcsdl.config import DataError, PlatesConfig, TrainCommand, TrainingConfig
from hcsdl.profiles.provenance import find_provenance, leak
from hcsdl.training.run_folder import write_json

pytestmark = pytest.mark.xeon_only


def write_run(
    folder: Path,
    *,
    target: str = "MoA",
    train: tuple[str, ...] = ("a", "b", "DMSO"),
    seed: int = 0,
    plates: PlatesConfig | None = None,
    **training: object,
) -> Path:
    """Write what a run leaves that tells what its network saw; return where its profiles would be."""
    folder.mkdir(parents=True)
    config = TrainCommand(
        seed=seed, run_dir=str(folder), plates=plates or PlatesConfig(root="x"), training=TrainingConfig(target=target, **training)
    )
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_json(folder / "plan.json", {"target": f"Metadata_{target}"})
    index = pd.DataFrame({"Metadata_Compound": [*train, "held out"], "Metadata_Split": ["train"] * len(train) + ["val"]})
    index.to_parquet(folder / "index.parquet")
    return folder / "profiles.parquet"


def test_network_that_learned_the_mechanisms_is_leaky(tmp_path):
    table = write_run(tmp_path / "run")
    found = find_provenance(table)
    assert found.trained_compounds == {"a", "b", "DMSO"} and found.target == "Metadata_MoA" and found.run == tmp_path / "run"
    leaky = leak(found, ["a", "b", "c", "held out"], learned=True)
    assert leaky.mark == "LEAKY" and "mechanisms of 2 of the 4 scored compounds" in leaky.sentence
    assert leak(found, ["c", "held out"], learned=True).kind == "none"
    deeper = find_provenance(tmp_path / "run" / "embeddings" / "x" / "a.parquet")
    assert (deeper.run, deeper.trained_compounds) == (found.run, found.trained_compounds) and deeper.method != found.method
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


def test_run_folder_that_cannot_tell(tmp_path):
    table = write_run(tmp_path / "run")
    (tmp_path / "run" / "index.parquet").write_bytes(b"none")
    with pytest.raises(DataError, match=r"config.yaml, plan.json and index.parquet must tell what the network saw"):
        find_provenance(table)
