"""`hcsdl report`: a real run, its real table and scores become one page; what a browser makes of it; what is left out; what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hcsdl.commands.cli import main
from hcsdl.commands.compose import compose_command, from_yaml, to_overrides
from hcsdl.commands.report import gather
from hcsdl.commands.report_fields import fields_section, find_preprocessing
from hcsdl.config import DataError
from hcsdl.data.preprocessing import load_preprocessing
from hcsdl.data.reading import read_field
from hcsdl.plates.index import load_index
from hcsdl.profiles.tables import read_profiles
from hcsdl.report.records import read_run
from hcsdl.training.embeddings import read_about, write_table
from tests import runs
from tests.browser import MISSING, Browser
from tests.commands.test_score import FAST, whole_table
from tests.profiles.screens import draw_wells
from tests.runs import once

pytestmark = pytest.mark.xeon_only
LARGEST_PAGE = 15 * 2**20
WIDTHS = (1400, 500)


def report(folder: Path, *words: object, code: int = 0) -> str:
    """Write a report in this process and return its page."""
    assert main(["report", f"report.output={folder}", *map(str, words)]) == code
    return (folder / "report.html").read_text(encoding="utf-8") if code == 0 else ""


@pytest.fixture(scope="session")
def scores(shared: Path, table: Path) -> Path:
    """The scores of the table of the tests' network, made once for all test processes."""

    def score(folder: Path) -> None:
        assert main(["score", f"profiles={table}", f"score.output={folder}", *FAST]) == 0

    return once(shared / "scores", score)


@pytest.fixture(scope="session")
def page(shared: Path, scores: Path) -> Path:
    """The page of these scores, which lead to the table, the run and the plates; made once for all test processes."""
    return once(shared / "report", lambda folder: report(folder, f"scores={scores}")) / "report.html"


def test_scores_lead_to_everything(page):
    """The executive answers come first, then every section; each picture stands in the page and lies beside it twice."""
    text = page.read_text(encoding="utf-8")
    order = [
        text.index(f">{question}<")
        for question in ("Which mechanism fails?", "Is it batch or biology?", "How sure is it?", "Which compound next?")
    ]
    sections = ["scores", "mechanisms", "wells", "compounds", "fields", "training", "machine"]
    assert (order := [*order, *(text.index(f'<section id="{name}">') for name in sections)]) == sorted(order)
    names = {path.stem for path in (page.parent / "pictures").glob("*.png")}
    assert names == {path.stem for path in (page.parent / "pictures").glob("*.svg")}
    assert {"scores", "ladder", "recall", "confusion", "loss", "accuracy", "speed", "fields_worst", "attention"} <= names
    assert all(f'<figure id="{name}">' in text for name in names) and text.count("<img ") == len(names)
    assert "LEAKY" in text[: order[0]], "the network learned the mechanisms it is scored on"
    assert page.stat().st_size < LARGEST_PAGE


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_browser_shows_it_at_any_width_without_a_complaint(page):
    with Browser() as browser:
        for width in WIDTHS:
            seen = browser.see(page, width)
            assert seen.errors == [] and seen.requests == [] and seen.broken == [] and seen.dead == []
            assert seen.wider <= 0, f"at {width} pixels the page is {seen.wider} pixels wider than the window"
            assert seen.images > 10 and seen.nameless == 0 and "Which compound next?" in seen.text


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_browser_would_tell(tmp_path):
    """What the test above relies on: a complaint, a picture that does not load, a page too wide, a dead link are seen."""
    (tmp_path / "bad.html").write_text(
        '<p style="width: 700px">wide</p><img alt="gone" src="gone.png"><a href="#nowhere">x</a><script>console.error("no")</script>'
    )
    with Browser() as browser:
        seen = browser.see(tmp_path / "bad.html", 500)
    assert seen.wider > 100 and seen.broken == ["gone"] and seen.dead == ["#nowhere"]
    assert len(seen.errors) >= 2 and seen.requests[0].endswith("gone.png")


def test_run_alone_says_what_makes_the_rest(trained, tmp_path, capsys):
    """A run without table and scores still has its page; every part that is missing names its command."""
    bare = tmp_path / "run"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("embeddings", "checkpoints", "cache"))
    text = report(tmp_path / "out", f"run={bare}")
    absent = text[text.index('<section id="absent">') :]
    for command in ("hcsdl embed", "hcsdl score"):
        assert f"<code>{command}" in absent
    assert "left out: " in capsys.readouterr().out and '<section id="training">' in text


def test_repeats_with_the_command_it_shows(trained):
    """The exact command, given to hcsdl, composes the very configuration of the run."""
    config = from_yaml("train", (trained / "config.yaml").read_text())
    words = to_overrides(config, compose_command("train", []))
    assert compose_command("train", words) == config and any(word.startswith("plates.root=") for word in words)
    strange = [
        'name="it\'s, a \\\\ name"',
        "plates.query=\"Metadata_Batch == 'Week1'\"",
        "data.crop_px=[64,80]",
        "plates.cache='null'",
        "seed=3",
    ]
    config = compose_command("train", strange)
    words = [shlex.split(word)[0] for word in to_overrides(config, compose_command("train", []))]
    assert compose_command("train", words) == config


def test_fields_are_shown_as_the_network_gets_them_but_whole(trained, table, tmp_path):
    """The run's scaling makes plates that were stained apart comparable; another plate of a run's plate's name is not scaled as that one was."""
    record = read_run(trained, "run")
    index, fitted = load_index(trained), load_preprocessing(trained / "preprocessing.npz")
    plate, image = fitted.plates[0], read_field(index.paths(0))
    shown = find_preprocessing(record, table)
    assert np.array_equal(shown.apply(image, plate), fitted.apply(image, plate))
    assert not np.array_equal(shown.apply(image, plate), fitted.apply(image, fitted.plates[1])), "plates differ"
    write_table(pd.read_parquet(table), read_about(table) | {"new_plates": [plate]}, tmp_path / "other.parquet")
    assert np.array_equal(find_preprocessing(record, tmp_path / "other.parquet").apply(image, plate), fitted.apply(image, "unheard of"))
    cropped = tmp_path / "run"
    shutil.copytree(trained, cropped, ignore=shutil.ignore_patterns("embeddings", "checkpoints", "cache"))
    replace(fitted, crop_px=(64, 64), downsample=2).save(cropped / "preprocessing.npz")
    assert find_preprocessing(read_run(cropped, "run"), None).apply(image, plate).shape == image.shape
    (cropped / "preprocessing.npz").write_bytes(b"")
    with pytest.raises(DataError, match="has none that can be read"):
        find_preprocessing(read_run(cropped, "run"), None)


def test_without_a_checkpoint_the_fields_are_shown_and_attention_is_left_out(trained, table, tmp_path):
    bare = tmp_path / "run"
    shutil.copytree(trained, bare, ignore=shutil.ignore_patterns("embeddings", "checkpoints", "cache"))
    run, index = read_run(bare, "run"), load_index(bare)
    section = fields_section(read_profiles(table), run, lambda: index, lambda: find_preprocessing(run, table), 1)
    assert {picture.name for picture in section.pictures} <= {"fields_best", "fields_worst"} and section.pictures
    assert "(Grad-CAM) is left out" in section.missing[0]


def test_several_runs_are_compared(trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("embeddings", "checkpoints", "cache"))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.05\n", "learning_rate: 0.01\n"))
    (other / "summary.json").write_text(json.dumps(runs.summary(trained) | {"well_accuracy": 1.0}))
    text = report(tmp_path / "out", f"run=[{other},{trained}]")
    part = text[text.index('<section id="comparison">') : text.index('<section id="training">')]
    assert "training.learning_rate" in part and "other is best with 100% of held-out wells, run last" in part


def test_scores_lead_to_their_table_from_any_folder_and_without_mechanisms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_wells().drop(columns="Metadata_MoA").to_parquet("table.parquet")
    assert main(["score", "profiles=table.parquet", "score.output=scores", *FAST]) == 0
    monkeypatch.chdir("/")
    assert gather(compose_command("report", [f"scores={tmp_path / 'scores'}"])).profiles == tmp_path / "table.parquet"


def test_foreign_profiles_without_a_run(tmp_path):
    """Another program's table, scored: no run, no images, and yet maps, plates and scores."""
    strange = "<img src=x onerror=alert(1)> $\\frac{1$ β-日"  # as code: of the page, of pictures, of file names
    table = whole_table().drop(columns="Metadata_Split").replace({"Metadata_Compound": {"compound 1b": strange}})
    table.to_parquet(tmp_path / "table.parquet")
    assert main(["score", f"profiles={tmp_path / 'table.parquet'}", f"score.output={tmp_path / 'scores'}", *FAST]) == 0
    text = report(tmp_path / "out", f"scores={tmp_path / 'scores'}", "report.fields=0", f"report.compound='{strange}'")
    for name in ("scores", "wells", "compounds"):
        assert f'<section id="{name}">' in text
    assert "Leak unknown." in text and "<img src=x" not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt; $\\frac{1$ β-日") > 3


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "a report must be of something"),
        (["run=7"], 2, "run must be a folder"),
        (["run=nowhere"], 3, "run must be a run folder"),
        (["scores=nowhere"], 3, "scores must be a folder that `hcsdl score` wrote"),
        (["profiles=nowhere.parquet"], 3, "nowhere.parquet is no file"),
        (["profiles=BARE.parquet"], 3, "A report takes the pipeline of its scores: `hcsdl score profiles=BARE.parquet`"),
        (["report.fields=-1", "run=x"], 2, "report.fields must be at least 0"),
    ],
)
def test_refused(tmp_path, monkeypatch, capsys, words, code, sentence):
    monkeypatch.chdir(tmp_path)
    draw_wells(control_wells=1).to_parquet("BARE.parquet")  # too few controls for the usual pipeline
    assert main(["report", *words]) == code
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_unknown_compound_and_unwritable_output_are_refused(trained, scores, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", f"run={trained}", f"report.output={tmp_path / 'file'}"]) == 2
    assert "report.output must be a folder that can be written" in capsys.readouterr().err
    assert main(["report", f"scores={scores}", f"report.output={tmp_path / 'out'}", "report.compound=water"]) == 2
    assert "report.compound must be one of the table's compounds" in capsys.readouterr().err
