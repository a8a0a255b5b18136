"""The learning rate at its corners and between them."""

import pytest

from hcsdl.config import TrainingConfig
from hcsdl.training.schedules import learning_rate

PUBLISHED = {"learning_rate": 0.008, "warmup_learning_rate": 0.001, "final_learning_rate": 1e-4, "warmup_epochs": 5}


def rates(schedule, total=201, per_epoch=10.0, **settings):
    """Return the rates of a whole run."""
    config = TrainingConfig(schedule=schedule, **{**PUBLISHED, **settings})
    return [learning_rate(step, total, per_epoch, config) for step in range(total)]


@pytest.mark.parametrize("schedule, middle, last", [("linear", 0.00405, 1e-4), ("cosine", 0.00405, 1e-4), ("constant", 0.008, 0.008)])
def test_corners(schedule, middle, last):
    """Start, half of the warm-up, peak, half of the decay, end."""
    run = rates(schedule)
    assert [run[step] for step in (0, 25, 50, 125, 200)] == pytest.approx([0.001, 0.0045, 0.008, middle, last])
    assert max(run) == run[50]


def test_shapes():
    """Linear falls by equal steps; cosine is flat at both ends and never above its line's other half."""
    line, cosine = rates("linear")[50:], rates("cosine")[50:]
    falls = [before - after for before, after in zip(line, line[1:], strict=False)]
    assert falls == pytest.approx([falls[0]] * 150)
    assert cosine[37] - line[37] == pytest.approx(line[113] - cosine[113], rel=0.05) and cosine[37] > line[37]
    assert all(after < before for before, after in zip(cosine, cosine[1:], strict=False))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_no_warmup_starts_at_the_peak(schedule):
    """Without warm-up step 0 has the peak rate, even in a run of one step."""
    assert rates(schedule, warmup_epochs=0)[0] == 0.008
    assert rates(schedule, total=1, warmup_epochs=0) == [0.008]


def test_warmup_of_part_of_a_step_and_longer_than_the_run():
    """Passes need not be whole steps; a run that ends within its warm-up is cut off there."""
    run = rates("linear", per_epoch=2.5, warmup_epochs=1, total=8)
    assert run[2] == pytest.approx(0.001 + 0.007 * 2 / 2.5) and run[3] < 0.008 and run[7] == pytest.approx(1e-4)
    short = rates("cosine", total=20)
    assert short == pytest.approx([0.001 + 0.007 * step / 50 for step in range(20)])


def test_steps_beyond_the_end():
    """They get the last step's rate, and no cosine that rises again."""
    config = TrainingConfig(schedule="cosine", **PUBLISHED)
    assert learning_rate(500, 201, 10.0, config) == pytest.approx(1e-4)
