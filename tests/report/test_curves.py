"""Curves and facts of a run: what the titles claim is what the figures say."""

from __future__ import annotations

import pytest

from hcsdl.report.curves import accuracy_picture, facts, loss_picture, speed_picture
from hcsdl.report.records import _latest
from tests.report.test_classes import texts

pytestmark = pytest.mark.xeon_only


def steps(losses: list[float]) -> list[dict]:
    return [{"epoch": i / 10, "loss": loss, "learning_rate": 0.1, "images_per_s": 5.0} for i, loss in enumerate(losses)]


def make_summary(**changes: object) -> dict:
    """Return a summary as `hcsdl train` writes it, in what a report reads."""
    history = [{"epoch": float(i), "val_accuracy": a, "well_accuracy": a} for i, a in enumerate((0.2, 0.5, 0.6, 0.8), 1)]
    return {
        **{
            "classes": ["a", "b"],
            "channels": ["DAPI", "Actin"],
            "split": "plate",
            "leaky": False,
            "split_sentence": "plate: whole plates.",
        },
        **{"val_accuracy": 0.8, "val_macro_f1": 0.7, "well_accuracy": 0.8, "baseline_accuracy": 0.4, "baseline_well_accuracy": 0.5},
        **{"confusion_wells": [[4, 1], [1, 4]], "num_wells_val": 10, "num_fields": 50, "num_train_fields": 30, "history": history},
        **{
            "images_per_s": 5.0,
            "world_size": 2,
            "threads_per_rank": 1,
            "peak_rss_gib": 1.5,
            "training_seconds": 90.0,
            "attempts": 1,
            "steps": 60,
        },
        **{"step_seconds": {"forward_backward_s": 0.6, "data_s": 0.3, "exposed_communication_s": 0.1, "optimizer_s": 0.0}, "epochs": 4.0},
        **{"model": "resnet18", "num_parameters": 700_000, "image_size": [128, 160], "processor": "a processor", "kernels": "native"},
        **{
            "kernels_reason": "asked for",
            "precision": "fp32",
            "backend": "gloo",
            "backend_reason": "asked for",
            "versions": {"torch": "2.8"},
        },
        **{"git_commit": None, "seed": 0, "config_hash": "c", "index_hash": "i", "skipped_fields": []},
        **changes,
    }


def test_loss_that_does_not_fall_is_said_to():
    assert loss_picture(steps([2.0, 1.5, 1.0, 0.5])).title.startswith("The training loss fell from 2.00 to 0.50")
    assert loss_picture(steps([1.0] * 30)).title.startswith("The network did not learn")


def test_accuracy_stands_beside_the_baseline_and_says_whether_it_still_rises():
    summary = make_summary()
    assert (
        accuracy_picture(summary["history"], summary).title
        == "80% of the held-out wells are right after 4 epochs, 30 points above the baseline, still rising"
    )
    flat = make_summary(history=[{"epoch": i, "val_accuracy": 0.4, "well_accuracy": 0.4} for i in range(1, 7)], leaky=True)
    picture = accuracy_picture(flat["history"], flat)
    assert picture.title == "40% of the held-out wells are right after 6 epochs, 10 points BELOW the baseline, no longer rising"
    assert any("[LEAKY]" in text for text in texts(picture))
    without = make_summary(baseline_accuracy=None, baseline_well_accuracy=None)
    assert "baseline" not in accuracy_picture(without["history"], without).title


def test_speed_names_what_a_step_waits_for():
    assert speed_picture(steps([1.0] * 5), make_summary()).title == "5 images/s on 2 ranks; 30% of a step is waiting for fields"
    busy = make_summary(step_seconds={"forward_backward_s": 0.95, "data_s": 0.05})
    assert speed_picture(steps([1.0] * 5), busy).title == "5 images/s on 2 ranks; 95% of a step is the network itself"


def test_facts_hold_the_command_and_what_was_skipped():
    rows = dict(facts(make_summary(skipped_fields=["P1/A01/1"]), "hcsdl train seed=3"))
    assert rows["exact command"] == "`hcsdl train seed=3`" and "P1/A01/1" in rows["skipped fields"] and "torch 2.8" in rows["versions"]
    assert "skipped fields" not in dict(facts(make_summary(), ""))


def test_steps_done_twice_count_once_as_the_later_attempt_had_them():
    lines = [{"event": "step", "step": s, "attempt": a, "loss": a} for a, s in ((1, 1), (1, 2), (1, 3), (2, 2), (2, 4))]
    assert [(line["step"], line["loss"]) for line in _latest(lines)] == [(1, 1), (2, 2), (3, 1), (4, 2)]
