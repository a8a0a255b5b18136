"""`hcsdl score`: everything it says and writes, and what it refuses."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from hcsdl.commands.cli import main
from hcsdl.commands.output import writing
from hcsdl.commands.score import run
from hcsdl.config import ConfigError, PlatesConfig, ScoreCommand
from tests.profiles.screens import draw_wells
from tests.profiles.test_predictions import draw_probabilities, folds
from tests.profiles.test_provenance import write_embedding, write_run

pytestmark = pytest.mark.xeon_only
FAST = ("score.draws=500", "score.null_size=500")


def whole_table(seed: int = 0, effect: float = 1.0) -> pd.DataFrame:
    """Return a table as `hcsdl embed` would write it: metadata, embedding, probabilities, simple features."""
    table = draw_wells(sites=2, effect=effect, batch_effect=1.5)
    rng = np.random.default_rng(seed)
    table = pd.concat([table, draw_probabilities(table, seed).add_prefix("Prob_")], axis=1)
    return table.assign(
        Metadata_Split=np.where(table["Metadata_Plate"].str.endswith("2"), "val", "train"),
        Intensity_DAPI_Mean=rng.normal(size=len(table)),
        Intensity_Actin_Mean=rng.normal(size=len(table)),
        Count_Nuclei=rng.integers(20, 60, len(table)),
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "table.parquet"
    whole_table().to_parquet(path)
    return path


def score(folder: Path, profiles: object, *words: str, code: int = 0) -> dict:
    """Score in this process and return scores.json; through the command line, which takes as long again, only for its exit code."""
    words = (f"profiles={profiles}", f"score.output={folder}", *FAST, *words)
    if code:
        assert main(["score", *words]) == code
        return {}
    assert run(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScoreCommand), OmegaConf.from_dotlist(list(words))))) == 0
    return json.loads((folder / "scores.json").read_text())


def test_one_table(tmp_path, table, capsys):
    """Every count, the ladder, baselines, mechanisms, precision and predictions are printed, and stand in the files."""
    result = score(tmp_path, table)
    out = capsys.readouterr().out
    for phrase in (
        "252 in, 252 used, 126 wells",
        "features  12 in, 12 usable",
        "leak unknown",
        "baseline cell count",
        "baseline intensity",
        "* standardise_control ",
        "tvn",
        "NSCB by mechanism",
        "mean average precision of MoA",
        "mean average precision of replicates",
        "calibration_error",
        "table [leak unknown] − baseline: intensity",
    ):
        assert phrase in out
    (one,) = result["tables"]
    assert result["schema_version"] == 1 and one["counts"]["wells"] == 126
    assert len(one["ladder"]) == 10 and sum(rung["chosen"] for rung in one["ladder"]) == 1
    chosen = next(rung for rung in one["ladder"] if rung["chosen"])
    treatments = pd.read_csv(tmp_path / "treatments.csv")
    own = treatments[treatments["Method"] == "table"]
    for rule in ("NSC", "NSCB"):
        figures = one["nearest"][rule]
        assert figures["accuracy"] == chosen[rule] == pytest.approx(own[f"{rule}_Hit"].mean())
        assert figures["low"] <= figures["accuracy"] <= figures["high"] and figures["treatments"] == 24
        assert np.trace(one["by_moa"][rule]["confusion"]) == own[f"{rule}_Hit"].sum()
    assert {(p["split"], p["unit"]) for p in one["predictions"]} == {(s, u) for s in ("train", "val") for u in ("fields", "wells")}
    assert {(c["rule"], c["second"]) for c in result["comparisons"]} == {
        (rule, f"baseline: {name}") for rule in ("NSC", "NSCB") for name in ("cell count", "intensity")
    }
    assert all(c["low"] <= c["value"] <= c["high"] and 0 < c["p_value"] <= 1 for c in result["comparisons"])
    profiles = pd.read_parquet(tmp_path / "profiles_table.parquet")
    assert len(profiles) == 24 and profiles["Metadata_Wells"].eq(3).all() and sum(c.startswith("Embedding_") for c in profiles) == 12
    assert set(pd.read_csv(tmp_path / "precision.csv")["Kind"]) == {"MoA", "replicates"}


def plain_scores(table: pd.DataFrame, scaled: bool) -> dict[str, tuple[float, set[str]]]:
    """Return, by rule, accuracy and the treatments that drop out, worked out a value at a time from a table of fields."""
    features = [c for c in table if c.startswith("Embedding_")]
    wells: dict[tuple, list[dict]] = {}
    for row in table.to_dict("records"):
        wells.setdefault((row["Metadata_Plate"], row["Metadata_Well"]), []).append(row)
    means = [{**rows[0], "x": [sum(r[f] for r in rows) / len(rows) for f in features]} for rows in wells.values()]
    for plate in {w["Metadata_Plate"] for w in means} if scaled else ():
        mine = [w for w in means if w["Metadata_Plate"] == plate]
        controls = [w["x"] for w in mine if w["Metadata_Compound"] == "DMSO"]
        for f in range(len(features)):
            centre = sum(x[f] for x in controls) / len(controls)
            sd = (sum((x[f] - centre) ** 2 for x in controls) / len(controls)) ** 0.5
            for w in mine:
                w["x"][f] = (w["x"][f] - centre) / sd
    groups: dict[str, list[dict]] = {}
    for w in means:
        if w["Metadata_Compound"] != "DMSO":
            groups.setdefault(f"{w['Metadata_Compound']} {w['Metadata_Concentration']:g}", []).append(w)
    profiles = {name: [sum(w["x"][f] for w in ws) / len(ws) for f in range(len(features))] for name, ws in groups.items()}
    batches = {name: {w["Metadata_Batch"] for w in ws} for name, ws in groups.items()}
    first = {name: ws[0] for name, ws in groups.items()}
    found = {}
    for rule in ("NSC", "NSCB"):
        hits, dropped = [], set()
        for a in sorted(groups):
            others = [
                b for b in sorted(groups)
                if first[a]["Metadata_Compound"] != first[b]["Metadata_Compound"] and (rule == "NSC" or not batches[a] & batches[b])
            ]  # fmt: skip
            if not any(first[a]["Metadata_MoA"] == first[b]["Metadata_MoA"] for b in others):
                dropped.add(a)
                continue
            cosines = [float(np.dot(profiles[a], profiles[b]) / np.linalg.norm(profiles[a]) / np.linalg.norm(profiles[b])) for b in others]
            hits.append(first[others[cosines.index(max(cosines))]]["Metadata_MoA"] == first[a]["Metadata_MoA"])
        found[rule] = (sum(hits) / len(hits), dropped)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_scores_are_those_of_a_plain_oracle(tmp_path, seed):
    """From the file to the figure, as the table is and scaled by its controls; a mechanism within one batch drops out of NSCB."""
    table = draw_wells(sites=2, effect=0.6, batch_effect=1.0, compounds_per_moa=4, features=6, seed=seed)
    table = table[~table["Metadata_Compound"].isin(["compound 2b", "compound 2c"])].sample(frac=1, random_state=seed)
    table.to_csv(tmp_path / "t.csv", index=False)
    one = score(tmp_path / "out", tmp_path / "t.csv")["tables"][0]
    ladder = {rung["pipeline"]: rung for rung in one["ladder"]}
    for pipeline, scaled in (("none", False), ("standardise_control", True)):
        expected = plain_scores(table, scaled)
        for rule in ("NSC", "NSCB"):
            assert ladder[pipeline][rule] == pytest.approx(expected[rule][0]) and 0 < expected[rule][0] < 1
            assert set(one["nearest"][rule]["dropped"]) == expected[rule][1]
    assert expected["NSCB"][1] and not expected["NSC"][1]


def test_six_treatments_with_known_answers(tmp_path):
    """a1, a2, b (m1) and c, d (m2) by the angle of their profile; e is alone in its mechanism and nearest to all of m1."""
    rows = [
        ("a", 1, "m1", "x", 0),
        ("a", 2, "m1", "x", 10),
        ("b", 1, "m1", "y", 15),
        ("c", 1, "m2", "x", 100),
        ("d", 1, "m2", "x", 120),
        ("e", 1, "m3", "y", 13),
    ]
    table = pd.DataFrame(rows, columns=["Metadata_Compound", "Metadata_Concentration", "Metadata_MoA", "Metadata_Batch", "angle"])
    angle = np.deg2rad(table.pop("angle"))
    table.assign(
        Metadata_Plate="p", Metadata_Well=list("ABCDEF"), Embedding_0=np.cos(angle), Embedding_1=np.sin(angle)
    ).to_csv(tmp_path / "six.csv", index=False)  # fmt: skip
    nearest = score(tmp_path / "out", tmp_path / "six.csv", "score.pipeline=[]")["tables"][0]["nearest"]
    assert (nearest["NSC"]["accuracy"], nearest["NSC"]["dropped"]) == (2 / 5, ["e 1"])
    assert (nearest["NSCB"]["accuracy"], nearest["NSCB"]["dropped"]) == (pytest.approx(1 / 3), ["c 1", "d 1", "e 1"])
    saved = pd.read_csv(tmp_path / "out" / "treatments.csv").set_index("Metadata_Treatment")
    assert saved["NSC_Neighbour"].dropna().to_dict() == {"a 1": "e 1", "a 2": "e 1", "b 1": "e 1", "c 1": "d 1", "d 1": "c 1"}
    assert saved["NSCB_Neighbour"].dropna().to_dict() == {"a 1": "e 1", "a 2": "e 1", "b 1": "a 2"}


def test_twice_is_the_same(tmp_path, table):
    assert score(tmp_path / "a", table) == score(tmp_path / "b", table)


def test_normalisation_helps_where_batches_differ_and_the_better_table_wins(tmp_path):
    """What the scores are for: a strong batch effect ruins NSCB as it is, and scaling mends it; noise is told from signal."""
    draw_wells(effect=1.0, batch_effect=4.0).to_parquet(tmp_path / "good.parquet")
    draw_wells(effect=0.0, batch_effect=4.0).to_csv(tmp_path / "noise.csv", index=False)
    result = score(tmp_path / "out", f"[{tmp_path}/good.parquet,{tmp_path}/noise.csv]")
    ladder = {rung["pipeline"]: rung for rung in result["tables"][0]["ladder"]}
    assert ladder["none"]["NSC"] < 0.5 and ladder["standardise_control"]["NSC"] > 0.9
    assert ladder["none"]["batch_effect"] > 0.5 > ladder["standardise_control"]["batch_effect"]
    nsc = next(c for c in result["comparisons"] if c["rule"] == "NSC")
    assert (nsc["first"], nsc["second"]) == ("good", "noise") and nsc["low"] > 0 and nsc["p_value"] < 0.05


def test_leak_is_marked_in_every_output(tmp_path, capsys):
    runs = {}
    for name, target in (("moa", "MoA"), ("treatment", "Treatment")):
        runs[name] = write_run(tmp_path / name, target=target, train=("compound 0a", "compound 1b", "DMSO"))
        whole_table(effect=2.0 if name == "moa" else 1.0).to_parquet(runs[name])
    result = score(tmp_path / "out", f"[{runs['treatment']},{runs['moa']}]")
    out = capsys.readouterr().out
    assert [t["leak"]["kind"] for t in result["tables"]] == ["compounds", "moa"]
    assert "LEAKY: the network was trained on the mechanisms of 2 of the 12 scored compounds." in out
    assert "treatment − moa [LEAKY]" in out
    leaky = out[out.index("\nmoa\n") : out.index("paired differences")]
    lines = [line for line in leaky.splitlines() if line.startswith(("NSC", "normalisation", "mean average", "predicted"))]
    assert len(lines) == 8 and all("[LEAKY]" in line for line in lines)
    assert [(c["first_leak"], c["second_leak"]) for c in result["comparisons"] if c["second"] == "moa"] == [("", "LEAKY")] * 2
    for one, mark in zip(result["tables"], ("", "LEAKY"), strict=True):
        assert {r["leak"] for r in (*one["ladder"], *one["predictions"])} == {mark} == {one["leak"]["mark"]}
    for name in ("treatments.csv", "ladder.csv", "precision.csv"):
        saved = pd.read_csv(tmp_path / "out" / name, keep_default_na=False)
        learned = saved[~saved["Method"].isin(["cell count", "intensity"])] if "Method" in saved else saved
        assert set(zip(learned["Table"], learned["Leak"], strict=True)) == {("treatment", ""), ("moa", "LEAKY")}


def test_runs_of_one_method_have_a_spread_and_are_compared_together(tmp_path):
    paths = []
    for seed in range(3):
        paths.append(write_run(tmp_path / f"seed{seed}", target="Treatment", seed=seed))
        table = draw_wells(batch_effect=1.5)
        embedding = table.filter(like="Embedding_")
        noise = 1.2 * np.random.default_rng(seed).normal(size=embedding.shape)
        table.assign(**(embedding + noise)).to_parquet(paths[-1])
    draw_wells(effect=0.2).to_parquet(tmp_path / "other.parquet")
    result = score(tmp_path / "out", f"[{','.join(map(str, [*paths, tmp_path / 'other.parquet']))}]")
    accuracies = [t["nearest"]["NSC"]["accuracy"] for t in result["tables"]]
    spread = next(s for s in result["spreads"] if s["rule"] == "NSC")
    assert (spread["runs"], spread["mean"], spread["sd"]) == (
        3,
        pytest.approx(np.mean(accuracies[:3])),
        pytest.approx(np.std(accuracies[:3], ddof=1)),
    )
    found = next(c for c in result["comparisons"] if c["rule"] == "NSC" and c["second"] == "other")
    assert found["value"] == pytest.approx(np.mean(accuracies[:3]) - accuracies[3])
    named = score(tmp_path / "named", f"[{paths[0]},{paths[1]}]", "score.names=[ours,ours]")
    assert [t["name"] for t in named["tables"]] == ["ours (1)", "ours (2)"] and not named["spreads"]
    assert named["comparisons"] == []  # runs of one method are not compared with each other


def test_random_network_stands_beside_the_others(tmp_path, capsys):
    """Whatever the order: it is a baseline of every table, compared with the first, and not taken for a method of ours; without it, how to get it is said.

    Likewise that a checkpoint was chosen by held-out fields.
    """
    moas = [("Metadata_Treatment", ["compound 0a"])]
    trained = write_embedding(tmp_path / "trained.parquet", draw_wells(batch_effect=1.5), trained=tuple(moas), checkpoint="best.pt")
    random = write_embedding(tmp_path / "random.parquet", draw_wells(effect=0.3, batch_effect=1.5), weights="random")
    result = score(tmp_path / "out", f"[{random},{trained}]")
    out = capsys.readouterr().out
    (one,), (baseline,) = result["tables"], result["baseline_tables"]
    assert (one["name"], baseline["name"]) == ("x", "random network (seed 0)") and baseline["leak"]["kind"] == "none"
    assert one["baselines"]["random network"] == baseline["nearest"] and "baseline random network: " in out
    assert (
        "No random-network baseline" not in out
        and "these scores are not of an epoch fixed beforehand" in out
        and len(baseline["ladder"]) == 10
    )
    nsc = next(c for c in result["comparisons"] if c["rule"] == "NSC" and c["second"] == "baseline: random network")
    assert nsc["first"] == "x" and nsc["value"] == pytest.approx(one["nearest"]["NSC"]["accuracy"] - baseline["nearest"]["NSC"]["accuracy"])
    score(tmp_path / "out", trained)
    assert "hcsdl embed checkpoint=runs/x embed.weights=random" in capsys.readouterr().out
    alone = score(tmp_path / "out", random)
    assert [t["name"] for t in alone["tables"]] == ["random network (seed 0)"] and not alone["baseline_tables"]


def test_treatment_in_every_batch_is_told(tmp_path, capsys):
    table = draw_wells()
    first = table[table["Metadata_Compound"] == "compound 0a"].drop_duplicates("Metadata_Concentration")
    plates = table.drop_duplicates("Metadata_Batch")[["Metadata_Plate", "Metadata_Batch"]].to_records(index=False)
    more = [first.assign(Metadata_Plate=p, Metadata_Batch=b, Metadata_Well=["H01", "H02"]) for p, b in plates[1:]]
    pd.concat([table, *more]).to_parquet(tmp_path / "t.parquet")
    result = score(tmp_path / "out", tmp_path / "t.parquet")
    assert result["tables"][0]["nearest"]["NSCB"]["in_every_batch"] == ["compound 0a 0.1", "compound 0a 1"]
    assert "compound 0a 0.1, compound 0a 1 are in every batch" in capsys.readouterr().out


def test_merged_folds(tmp_path, capsys):
    rows = draw_wells(sites=3, batches=3, plates_per_batch=1)
    paths = []
    for name, labelled, probabilities in folds(rows):
        paths.append(tmp_path / f"{name[-1]}.parquet")
        pd.concat([labelled, probabilities.add_prefix("Prob_")], axis=1).to_parquet(paths[-1])
    result = score(tmp_path / "out", f"[{','.join(map(str, paths))}]", "score.folds=true")
    fields, wells = result["folds"]["figures"]
    assert fields["unit"] == "fields" and fields["number"] == 72 and wells["number"] == 24 and wells["compounds"] == 12
    assert fields["low"] < fields["accuracy"] < fields["high"] and "3 folds, 12 compounds, each held out once" in (
        out := capsys.readouterr().out
    )
    assert "all folds merged  [leak unknown]" in out and fields["leak"] == result["folds"]["leak"]["mark"] == "leak unknown"
    assert main(["score", f"profiles=[{paths[0]},{paths[1]}]", "score.folds=true", f"score.output={tmp_path}/out"]) == 3
    assert "4 of 12 are in none" in capsys.readouterr().err


def test_folds_of_runs_are_told_apart_by_their_settings(tmp_path, capsys):
    rows = draw_wells(batches=3, plates_per_batch=1)
    paths = []
    for number, (_, labelled, probabilities) in enumerate(folds(rows)):
        paths.append(write_run(tmp_path / str(number), plates=PlatesConfig(root="x", split="compound_folds", fold=number)))
        pd.concat([labelled, probabilities.add_prefix("Prob_")], axis=1).to_parquet(paths[-1])
    score(tmp_path / "out", f"[{','.join(map(str, paths))}]", "score.folds=true")
    for chosen, sentence in (([0, 2], "Of 3, plates.fold=1 is missing"), ([0, 1, 1], "plates.fold is 0, 1, 1 in the runs")):
        score(tmp_path / "out", f"[{','.join(str(paths[n]) for n in chosen)}]", "score.folds=true", code=3)
        assert sentence in capsys.readouterr().err
    other = write_run(tmp_path / "other", plates=PlatesConfig(root="x"))
    pd.read_parquet(paths[0]).to_parquet(other)
    score(tmp_path / "out", f"[{other},{paths[1]},{paths[2]}]", "score.folds=true", code=3)
    assert "must have plates.split=compound_folds. other has random_well" in capsys.readouterr().err


def test_features_of_unknown_origin_are_not_taken_for_classical(tmp_path, capsys):
    for beginning, kind in (("Cells_", "none"), ("efficientnet_", "unknown")):
        table = draw_wells().rename(columns=lambda name, start=beginning: name.replace("Embedding_", start))
        table.to_csv(tmp_path / "other.csv", index=False)
        assert score(tmp_path / "out", tmp_path / "other.csv")["tables"][0]["leak"]["kind"] == kind


def test_unlabelled_and_one_treatment_a_mechanism(tmp_path, capsys):
    """What cannot be scored is said; what can still is."""
    draw_wells().drop(columns=["Metadata_MoA", "Metadata_Batch"]).assign(Prob_x=1.0).to_parquet(tmp_path / "bare.parquet")
    result = score(tmp_path / "out", tmp_path / "bare.parquet")
    out = capsys.readouterr().out
    assert "nothing that needs mechanisms of action is scored" in out and "nothing that needs batches is scored" in out
    assert "Predictions are not scored: Prob_* columns must be named by classes" in out
    assert "tvn: not possible. TVN must have a Metadata_Batch" in out
    assert set(result["tables"][0]["mean_average_precision"]) == {"replicates"} and "nearest" not in result["tables"][0]
    lonely = draw_wells(compounds_per_moa=1, concentrations=(1.0,))
    lonely.to_parquet(tmp_path / "lonely.parquet")
    result = score(tmp_path / "out", tmp_path / "lonely.parquet")
    assert result["tables"][0]["nearest"]["NSC"]["accuracy"] is None and len(result["tables"][0]["nearest"]["NSC"]["dropped"]) == 4
    assert "NSC  cannot be: no treatment has a mechanism in common" in capsys.readouterr().out


def test_plate_without_controls_stops_the_default_and_not_the_ladder(tmp_path, capsys):
    table = draw_wells()
    bare = table[(table["Metadata_Compound"] != "DMSO") | (table["Metadata_Plate"] != "Week1_1")]
    bare.to_parquet(tmp_path / "bare.parquet")
    score(tmp_path / "out", tmp_path / "bare.parquet", code=3)
    assert "Every plate must have at least two control wells" in capsys.readouterr().err
    result = score(tmp_path / "out", tmp_path / "bare.parquet", "score.pipeline=[standardise_all]")
    problems = {rung["pipeline"]: rung["problem"] for rung in result["tables"][0]["ladder"]}
    assert "at least two control wells" in problems["standardise_control"] and problems["standardise_all"] is None
    assert "standardise_control: not possible." in capsys.readouterr().out


def test_single_replicates_have_no_precision_and_say_so(tmp_path, capsys):
    """Wells that are the only ones of their treatment find no other: a sentence, and no figure that is none."""
    wells = draw_wells(plates_per_batch=1)
    wells.to_parquet(tmp_path / "single.parquet")
    assert score(tmp_path / "out", tmp_path / "single.parquet")["tables"][0]["mean_average_precision"]["replicates"]["groups"] == 0
    out = capsys.readouterr().out
    assert "mean average precision of replicates" in out and "cannot be, 24 wells could be no query" in out and "nan" not in out


def test_a_full_disk_is_no_mistake_in_the_settings(tmp_path):
    """Exit code 1 as in training, and the path; a folder that may not be written is a setting to change."""
    with pytest.raises(OSError, match="No space left on device") as error, writing("score.output", tmp_path):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")
    assert error.value.filename == str(tmp_path)
    with pytest.raises(ConfigError, match="score.output must be a folder that can be written"), writing("score.output", tmp_path):
        (tmp_path / "nowhere" / "file").write_text("")


def test_own_pipeline_is_a_rung(tmp_path, table):
    result = score(tmp_path, table, "score.pipeline=[robust_control,sphere_zca]", "score.regularisation=0.5")
    rung = result["tables"][0]["ladder"][-1]
    assert rung["chosen"] and rung["pipeline"] == "robust_control + sphere_zca" and len(result["tables"][0]["ladder"]) == 11


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "profiles must be a table, or several"),
        (["profiles=7"], "profiles must be a file"),
        (["profiles=[nowhere.csv]"], "nowhere.csv is no file"),
        (["profiles=TABLE", "score.pipeline=[whiten]"], "score.pipeline must be one of"),
        (["profiles=TABLE", "score.names=[a,b]"], "score.names must name each of the 1 tables"),
        (["profiles=TABLE", "score.features=[Nuclei_]"], "has no column Nuclei_"),
        (["profiles=TABLE", "score.output=TABLE"], "score.output must be a folder"),
        (["profiles=[TABLE,TABLE]", "score.names=[a,b]", "score.folds=true"], "must hold compounds out whole"),
    ],
)
def test_refused(tmp_path, monkeypatch, table, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["score", *(word.replace("TABLE", str(table)) for word in words)]) in (2, 3)
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_never_imports_torch(tmp_path, table):
    """In a process of its own, through everything it does; nor scikit-learn, pycytominer or copairs, which would make it slow to start."""
    script = (
        "import sys; from hcsdl.commands.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'sklearn', 'pycytominer', 'copairs', 'matplotlib'} & set(sys.modules)), code)"
    )
    words = ["score", f"profiles={table}", f"score.output={tmp_path}", *FAST]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
