"""`hcsdl embed` as a user runs it: one table whatever the ranks and kills, of labelled, unlabelled and new plates, which `hcsdl score` takes as it is."""

from __future__ import annotations

import csv
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hcsdl
from hcsdl.config import SimulateConfig
from hcsdl.data.reading import read_field
from hcsdl.plates.quality import measure_field
from hcsdl.training.embeddings import WorkFolder, read_about
from tests import forked, runs
from tests.forked import kill_what_is_left, start_ranks

FIELDS, CHANNELS = 48, ("DAPI", "Tubulin", "Actin")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Ranks that a failed test has left behind end with it."""
    yield
    kill_what_is_left()


@pytest.fixture
def run(trained: Path) -> Path:
    """The run; tables go elsewhere."""
    return trained


def words(run: Path, output: Path, *more: object) -> list[str]:
    return [
        "embed",
        f"checkpoint={run}",
        f"embed.output={output}",
        "kernels=native",
        "machine.threads_per_rank=1",
        "embed.mini_batch_size=5",
        *map(str, more),
    ]


def embed_on(ranks: int, output: Path, more: list[str]) -> str:
    """Embed over so many ranks, started one by one as torchrun does; return what rank 0 said."""
    started = start_ranks(more, ranks, output.with_suffix(".out"))
    for rank in started:
        assert rank.wait(150) == 0, "\n".join(one.said() for one in started)
    return started[0].said()


def test_one_table_whatever_the_ranks(run: Path, tmp_path: Path) -> None:
    said = {}
    for ranks in (1, 2, 3):
        output = tmp_path / f"{ranks}.parquet"
        said[ranks] = embed_on(ranks, output, words(run, output, "embed.save_every_s=0"))
        assert not output.with_suffix(".work").exists()
    first = (tmp_path / "1.parquet").read_bytes()
    assert (tmp_path / "2.parquet").read_bytes() == first and (tmp_path / "3.parquet").read_bytes() == first
    assert "48 fields of 3 plates" in said[1] and "images/s" in said[2]

    table, index = pd.read_parquet(tmp_path / "1.parquet"), pd.read_parquet(run / "index.parquet")
    keys = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    pd.testing.assert_frame_equal(table[keys], index[keys])
    assert (
        table["Metadata_Split"].tolist() == index["Metadata_Split"].tolist()
        and table["Metadata_MoA"].tolist() == index["Metadata_MoA"].tolist()
    )

    # Each row is what the network says of that very field, and what the field measures.
    loaded = hcsdl.load_run(run)
    root = Path(pd.read_json(run / "index.json", typ="series")["root"])
    for row in (0, 19, FIELDS - 1):
        paths = [root / index.loc[row, f"Path_{channel}"] for channel in CHANNELS]
        features = loaded.model.forward_features(loaded.prepare(paths, index.loc[row, "Metadata_Plate"]))
        embedding = loaded.model.forward_head(features, pre_logits=True).detach().numpy()[0]
        found = table.filter(like="Embedding_").to_numpy()[row]
        assert np.linalg.norm(found - embedding) < 0.05 * np.linalg.norm(embedding)
        others = np.linalg.norm(table.filter(like="Embedding_").to_numpy() - embedding, axis=1)
        assert others.argmin() == row, "no other row may be nearer to this field's own"
        measured = measure_field(read_field(paths), CHANNELS)
        for name, value in measured.items():
            if name.startswith(("Intensity_", "Count_")):
                assert table.loc[row, name] == pytest.approx(value), name
    probabilities = table[[f"Prob_{name}" for name in loaded.classes]]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    val = table["Metadata_Split"] == "val"
    right = probabilities[val].idxmax(axis=1).str.removeprefix("Prob_") == table["Metadata_MoA"][val]
    assert abs(right.mean() - runs.summary(run)["val_accuracy"]) <= 1.01 / val.sum(), (
        "validation sees the same, but for a field at the edge"
    )


def test_killed_and_stopped_commands_go_on_to_the_same_bytes(run: Path, tmp_path: Path) -> None:
    embed_on(1, tmp_path / "alone.parquet", words(run, tmp_path / "alone.parquet"))
    output = tmp_path / "stopped.parquet"
    work = WorkFolder(output.with_suffix(".work"))
    more = words(run, output, "embed.save_every_s=0", "data.workers=0")

    def start_and(number: int, count: int) -> subprocess.Popen:
        """Start a command and send it a signal as soon as `count` parts are on disk."""
        process, limit = forked.start(*more, "distributed.ranks=1"), time.monotonic() + 150
        while work.last_saved() < count:
            if process.poll() is not None or time.monotonic() > limit:
                break
            time.sleep(0.002)
        os.kill(process.pid, number)
        return process

    for _ in range(5):  # tries: on a busy machine it may be done before we look
        process = start_and(signal.SIGTERM, 1)
        _, said = process.communicate(timeout=100)
        if process.returncode == 75:
            break
        output.unlink()
    assert process.returncode == 75 and "start the same command again" in said and not output.exists(), said
    assert sorted(path.name for path in output.parent.glob("stopped*")) == ["stopped.work"]

    saved = work.last_saved()
    process = start_and(signal.SIGKILL, saved + 1)
    runs.kill_session(process)
    assert work.last_saved() > saved and not output.exists()

    said = forked.run(*more, "distributed.ranks=2").stderr  # another number of ranks
    assert "mini-batches were computed before" in said and "going on with step-" in said
    assert output.read_bytes() == (tmp_path / "alone.parquet").read_bytes() and not work.path.exists()
    assert "is there already" in forked.run(*more).stderr
    assert "is another table" in forked.run(*more, "embed.by=well", code=2).stderr


def hang_in_the_third_mini_batch() -> None:
    """Give this rank a network that does not come back."""
    from hcsdl.commands import embed_fields

    sound, seen = embed_fields.for_inference, itertools.count()

    def hang(*_: object) -> None:
        if next(seen) == 2:
            time.sleep(1000)

    def for_inference(*given: object) -> object:
        network = sound(*given)
        network.register_forward_pre_hook(hang)
        return network

    embed_fields.for_inference = for_inference


def test_a_rank_that_hangs_is_missed_and_named(run: Path, tmp_path: Path) -> None:
    more = ["embed.save_every_s=0", "distributed.silence_s=5", "distributed.stall_s=5"]
    ranks = start_ranks(words(run, tmp_path / "table.parquet", *more), 2, tmp_path / "said", {1: hang_in_the_third_mini_batch})
    for rank in ranks:
        assert rank.wait(60) == 5, rank.said()
        assert re.search(r"rank 1 on .* is stuck: it beats, but has not come to all_gather", rank.said())
    assert WorkFolder(tmp_path / "table.work").last_saved() == 2


def test_new_plates_without_labels(run: Path, tiny_plates: Path, tmp_path: Path) -> None:
    from hcsdl.simulation import simulate

    root = tmp_path / "new"
    simulate(SimulateConfig(preset="tiny", plates_per_batch=3, moas=1, workers=1), root, 7, progress=False)  # names that the run has, too
    for path in root.glob("*_moa.csv*"):
        path.unlink()
    output = tmp_path / "new.parquet"
    said = embed_on(1, output, words(run, output, f"plates.root={root}"))
    table, about = pd.read_parquet(output), read_about(output)
    assert "plates are not of the run" in said and "Metadata_MoA stays empty" in said
    assert table["Metadata_MoA"].isna().all() and table["Metadata_Split"].isna().all() and len(table) == len(next(rows(root)))
    assert about["new_plates"] == sorted(set(table["Metadata_Plate"]))
    assert set(about["new_plates"]) & set(pd.read_parquet(run / "index.parquet")["Metadata_Plate"]), (
        "names alone must not make them the run's"
    )

    # The run's plates, moved: nothing is fitted anew, and every value is as before.
    moved = tmp_path / "moved"
    shutil.copytree(tiny_plates, moved)
    for name, plates in (("here", tiny_plates), ("there", moved)):
        embed_on(1, tmp_path / f"{name}.parquet", words(run, tmp_path / f"{name}.parquet", f"plates.root={plates}", "embed.by=well"))
    here, there = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("here", "there"))
    pd.testing.assert_frame_equal(here, there)
    assert read_about(tmp_path / "there.parquet")["new_plates"] == [] and len(here) == FIELDS // 2


def rows(root: Path) -> Iterator[list[dict]]:
    for path in root.glob("*_image.csv"):
        with open(path, newline="") as file:
            yield list(csv.DictReader(file))


def test_score_takes_the_tables_and_knows_what_the_network_saw(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    here = [f"checkpoint={folder}", "kernels=native", "machine.threads_per_rank=1"]
    for more in ([], ["embed.weights=random"]):
        started = start_ranks(["embed", *here, *more], 1, tmp_path / "out")
        assert started[0].wait(150) == 0, started[0].said()
    found = sorted(path.name for path in (folder / "embeddings").iterdir())
    assert found == ["tiny_plates.parquet", "tiny_plates_random0.parquet"]
    trained, random = (pd.read_parquet(folder / "embeddings" / name) for name in found)
    assert not any(c.startswith("Prob_") for c in random)
    assert list(random.filter(like="Embedding_")) == list(trained.filter(like="Embedding_"))
    assert not np.allclose(random.filter(like="Embedding_"), trained.filter(like="Embedding_"), rtol=0.1)
    assert (random.filter(like="Embedding_").std() > 0).mean() > 0.9, "the layers must all be switched on"

    tables = ",".join(str(folder / "embeddings" / name) for name in found)
    said = runs.run("score", f"profiles=[{tables}]", f"score.output={tmp_path / 'scores'}", "score.draws=200", "score.null_size=200").stdout
    trained_part, random_part = said.split("random network (seed 0)\n", 1)
    assert "LEAKY: the network was trained on the mechanisms" in trained_part
    assert "weights are random" in random_part and "LEAKY" not in random_part.split("paired differences")[0]
    for baseline in ("cell count", "intensity", "random network"):
        assert f"baseline {baseline}" in trained_part
    assert "predicted probabilities" in trained_part and "predicted probabilities" not in random_part
