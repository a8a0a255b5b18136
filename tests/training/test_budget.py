"""Whether the end that is predicted is the end that comes, and what is said where it would come too late or take too much."""

from __future__ import annotations

import itertools
import math
from datetime import datetime
from fractions import Fraction

import pytest

from hcsdl.training.budget import duration, evaluations_left, images_gib, moment, objections, predict_s, prediction

NOW = datetime(2026, 11, 24, 11, 55)  # a Tuesday


@pytest.mark.parametrize("every", [Fraction(1), Fraction(5, 2), Fraction(7), Fraction(10, 3)], ids=str)
def test_evaluations_are_counted_as_the_loop_makes_them(every: Fraction) -> None:
    def made(first: int, last: int) -> int:  # a pass ends inside the step, or it is the last step
        return sum(step == last or step // every > (step - 1) // every for step in range(first + 1, last + 1))

    for first, last in itertools.combinations(range(24), 2):
        assert evaluations_left(first, last, float(every)) == made(first, last), (first, last)


def test_time_is_that_of_steps_and_of_forward_passes() -> None:
    assert predict_s(2.0, 100, 0, 500, 8) == 200
    assert predict_s(2.0, 100, 3, 80, 8) == pytest.approx(200 + 3 * 10 * 2 / 3)


def test_the_sentence_names_steps_time_end_and_memory() -> None:
    said = prediction(3520, 7800, NOW, 31.04, 384.0)
    assert said == "predicted: 3,520 steps in 2 h 10 min, done about Tue 14:05; peak memory about 31 of 384 GiB a node"
    assert prediction(1, 45, NOW, 0.5234, 1007.4).startswith(
        "predicted: 1 step in 45 s, done about Tue 11:55; peak memory about 0.523 of 1007 GiB"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "1 h 0 min"), (3570, "1 h 0 min"), (3 * 86400 + 4 * 3600, "3 d 4 h")],
)
def test_lengths_of_time_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_moment_more_than_six_days_ahead_has_its_date() -> None:
    assert moment(NOW, 5 * 86400) == "Sun 11:55" and moment(NOW, 7 * 86400) == "Tue 01 Dec 2026"


def test_what_fits_is_not_objected_to() -> None:
    assert objections(3600, 3600, 3600, NOW, 31, 31) == []
    assert objections(1e9, math.inf, math.inf, NOW, 31, 384) == []


def test_a_job_that_is_too_short_says_how_often_it_must_be_requeued() -> None:
    (said,) = objections(9.5 * 3600, 3600, 4 * 3600, NOW, 31, 384)
    assert "It needs 9 h 30 min and Slurm ends the job in 1 h 0 min, about Tue 12:55" in said
    assert "requeued about 3 times, each going on for up to 4 h 0 min from the last checkpoint" in said
    assert "requeued about 1 time," in objections(3601, 3600, 4 * 3600, NOW, 31, 384)[0]


def test_ranks_that_do_not_fit_say_what_would_help() -> None:
    (said,) = objections(1, math.inf, math.inf, NOW, 410, 384)
    assert "They will hold about 410 GiB and may hold 384" in said and "training.mini_batch_size" in said


def test_images_kept_ready() -> None:
    assert images_gib((5, 3, 1024, 1280), 2) == 5 * 3 * 1024 * 1280 * 2 / 2**30
