"""`hcsdl bench step`: real variants in turn, rows and targets by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from hcsdl.commands.bench_step_table import format_memory, format_targets, memory_row, summarise, targets
from hcsdl.commands.bench_step_variants import VARIANTS, chosen
from hcsdl.commands.compose import compose_command
from hcsdl.config import ConfigError
from hcsdl.kernels import ipex_problem
from tests import runs

TINY = ["bench.image_size=[64,96]", "bench.width=0.125", "bench.steps=1", "machine.threads_per_rank=1"]
FLOP = 10 * 10**9


def test_variants_take_turns_and_one_that_fails_is_a_row(tmp_path: Path) -> None:
    folder, library = tmp_path / "out", tmp_path / "libjemalloc.so"
    library.write_text("no library")
    names = ["fp32", "bf16", "ipex_recipe", "bf16_preloaded", "hcsdl_best"]
    words = [
        "bench.models=[resnet18]",
        f"bench.variants=[{','.join(names)}]",
        "bench.rounds=3",
        f"bench.preload={library}",
        "bench.targets=true",
    ]
    done = runs.run("bench", "step", *TINY, *words, f"bench.output={folder}", code=1)
    result = json.loads((folder / "result.json").read_text())
    assert (result["schema_version"], result["command"], result["world_size"], result["threads_per_rank"]) == (1, "hcsdl bench step", 1, 1)
    found = result["models"]["resnet18"]
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == names
    assert rows["bf16_preloaded"]["status"] == "failed" and "was not loaded" in rows["bf16_preloaded"]["reason"]
    assert rows["ipex_recipe"]["status"] == ("missing" if ipex_problem() else "measured")
    measured = [name for name in names if rows[name]["status"] == "measured"]
    again = [name for name in measured if name != "fp32"]  # once only
    turns = found["turns"]
    assert [(turn["round"], turn["variant"]) for turn in turns] == [
        (number, name) for number in range(3) for name in ["matrix product", *(again if number else measured)]
    ]
    assert all(before["ended_s"] <= after["began_s"] for before, after in zip(turns, turns[1:], strict=False))
    for name in measured:
        row = rows[name]
        assert row["mfu"] == pytest.approx(row["images_per_s"] * found["training_flop"] / 1e9 / found["matrix_product"]["median"])
        assert row["peak_rss_gib"] > 0.1 and row["start_s"] > 0 and row["rounds"] == (1 if name == "fp32" else 3)
    assert set(found["memory"]) == {"bf16", "hcsdl_best"} and found["memory"]["bf16"]["images"] == [2, 6]
    assert found["profile"]["ceiling"]["images_per_s"] > 0
    assert f"failed: {rows['bf16_preloaded']['reason']}" in done.stdout and "resnet50 is not in bench.models" in done.stdout
    assert [row["met"] for row in result["targets"] if row["what"].startswith("resnet18: hcsdl ÷ its own ceiling")] != [None]
    assert Image.open(folder / "steps.png").convert("L").getextrema() == (0, 255)


def test_ranks_step_together(tmp_path: Path) -> None:
    words = ["bench.models=[resnet18]", "bench.variants=[bf16,hcsdl_native]", "bench.rounds=1", "bench.memory=false", "distributed.ranks=2"]
    done = runs.run("bench", "step", *TINY, *words, "distributed.backend=gloo", f"bench.output={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["models"]["resnet18"]["rows"]
    assert [row["status"] for row in rows] == ["measured"] * 2 and result["world_size"] == 2
    assert rows[0]["images_per_s"] == pytest.approx(4 / result["models"]["resnet18"]["turns"][1]["step_s"][0])
    assert "2 ranks × 1 thread" in done.stdout


def test_something_must_be_measured() -> None:
    with pytest.raises(ConfigError, match="bench.variants must not be empty"):
        compose_command("bench step", ["bench.variants=[]"])


def test_what_is_measured_by_default() -> None:
    usual = [one.name for one in chosen(None, "resnet50", targets=False)]
    assert usual == [name for name in VARIANTS if name != "hcsdl_lean"]
    assert [one.name for one in chosen(None, "resnet50", targets=True)] == list(VARIANTS)
    assert chosen(None, "mcnn", targets=True)[-1].name == "hcsdl_best"
    assert [one.name for one in chosen(["hcsdl_lean", "bf16"], "mcnn", targets=False)] == ["bf16", "hcsdl_lean"]


def table(best: float = 4.0, **other: float) -> dict:
    """One network's result with these images/s; 10 GFLOP an image, a matrix product of 100 GFLOP/s."""
    rates = {"bf16": 2.0, "ipex_recipe": 2.5, "hcsdl_best": best} | other
    turns = [{"variant": "matrix product", "step_s": [1.0, 2.0, 1.0], "peak_rss_gib": 1.0}]
    turns += [{"variant": name, "step_s": [2 / rate, 2 / rate * 2, 2 / rate], "peak_rss_gib": 2.0} for name, rate in rates.items()]
    started = {name: {"seconds": 5.0 + (22.0 if name == "hcsdl_best" else 0), "told": {}} for name in rates}
    ended = {"compiled": {"status": "failed", "reason": "no compiler"}, "bf16_preloaded": {"status": "missing", "reason": "no library"}}
    variants = [VARIANTS[name] for name in (*rates, *ended)]
    rows, matrix = summarise(variants, turns, started, ended, 2, FLOP, {"flop": 10**11, "precision": "bf16"}, 1)
    return {"rows": rows, "ranks": 1, "matrix_product": matrix, "memory": {}, "profile": None, "profile_reason": "bench.targets=false"}


def test_rows_by_hand() -> None:
    found = table()
    best = next(row for row in found["rows"] if row["variant"] == "hcsdl_best")
    assert (best["images_per_s"], best["q1_images_per_s"], best["q3_images_per_s"], best["steps"]) == (4.0, 3.0, 4.0, 3)
    assert (best["gflop_per_s"], best["mfu"], best["to_ipex_recipe"], best["to_bf16"]) == (40.0, 0.4, 1.6, 2.0)
    assert found["matrix_product"]["median"] == 100.0


def test_targets_by_hand() -> None:
    profile = {
        "ceiling": {"images_per_s": 4.25},
        "others_to_bytes": 1.6,
        "convolutions": [
            {
                "pointwise": True,
                "deep": True,
                "count": 2,
                "seconds": {"stock": {"weight_gradient": 3.0}, "hcsdl": {"weight_gradient": 2.0}},
            },
            {
                "pointwise": True,
                "deep": False,
                "count": 9,
                "seconds": {"stock": {"weight_gradient": 1.0}, "hcsdl": {"weight_gradient": 9.0}},
            },
        ],
    }
    memory = {"bf16": {"gib_per_image": 2.0}, "hcsdl_best": {"gib_per_image": 1.9}, "hcsdl_lean": {"gib_per_image": 1.3}}
    found = {"resnet50": table(hcsdl_lean=3.7, ipex_recipe_preloaded=3.7) | {"profile": profile, "memory": memory}, "mcnn": table(best=5.0)}
    rows = {row["what"]: row for row in targets(found, cores=2)}

    def row(begin: str) -> tuple:
        (one,) = [row for what, row in rows.items() if what.startswith(begin)]
        return None if one["measured"] is None else round(one["measured"], 3), one["met"]

    assert row("resnet50: hcsdl ÷ IPEX") == (1.6, False)
    assert row("mcnn: hcsdl ÷ IPEX") == (2.0, True)
    assert row("mcnn: images/s per core") == (6.667, True)
    assert row("resnet50: hcsdl ÷ the fastest of all others (ipex_recipe_preloaded)") == (1.081, False)
    assert row("mcnn: hcsdl ÷ the fastest of all others (ipex_recipe)") == (2.0, True)
    assert row("resnet50: hcsdl ÷ its own ceiling") == (0.941, True)
    assert row("resnet50: all but") == (1.6, False)
    assert row("resnet50: weight gradients") == (1.5, True)
    assert row("resnet50: memory per image, hcsdl, kernels=auto ÷ b") == (0.95, True)
    assert row("resnet50: memory per image, hcsdl, kernels=auto, checkpoint_activations=selective") == (0.65, False)
    assert row("resnet50: lean mode") == (0.925, True)
    assert row("resnet50: start-up") == (22.0, False)
    assert row("resnet18: hcsdl ÷ the fastest") == (None, None)
    said = format_targets(list(rows.values()))
    assert "without fp32, bf16_preloaded, compiled" in said.replace("ipex_recipe_preloaded, ", "")
    assert "not measured: resnet18 is not in bench.models" in said and "NOT MET" in said


def test_memory_of_an_image_and_what_fits() -> None:
    row = memory_row((2, 6), (3.0, 5.0))
    assert (row["gib_per_image"], row["base_gib"]) == (0.5, 2.0)
    assert row["largest_mini_batch"] == {"64": 98, "192": 303, "512": 815}  # (0.8 × GiB − 2) ÷ 0.5, rounded down
    assert "memory 2.00 GiB + 0.500 an image" in format_memory({"bf16": row})
    assert memory_row((2, 6), (3.0, 3.0))["largest_mini_batch"]["64"] is None
