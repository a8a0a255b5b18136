"""A Slurm job from inside, without Slurm: who we are, one exit code for all tasks, what is still going."""

from __future__ import annotations

import os

import pytest

from hcsdl.distributed.slurm import Job, one_code, pass_through, still_going, this_job

pytestmark = pytest.mark.xeon_only


def test_a_job_and_an_array_element_know_themselves() -> None:
    assert this_job({}) is None
    assert this_job({"SLURM_JOB_ID": "12"}) == Job("12", "12", 0)
    array = {
        "SLURM_ARRAY_JOB_ID": "20",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "7",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    assert this_job({"SLURM_JOB_ID": "23", "SLURM_RESTART_COUNT": "2"} | array) == Job("23", "20_3", 2, "20", 3, (0, 7, 4))


@pytest.mark.parametrize(
    ("highest", "said", "code"),
    [(0, [], 0), (75, [75, 75], 75), (5, [5, 3, 5], 3), (5, [5, 5], 5), (137, [5], 5), (138, [], 5), (-9, [], 5), (2, [], 2)],
)
def test_a_tasks_own_reason_goes_before_the_others_loss_and_a_killed_task_is_a_lost_rank(highest: int, said: list[int], code: int) -> None:
    assert one_code(highest, said) == code


def test_codes_are_found_among_what_the_tasks_say(capfd: pytest.CaptureFixture) -> None:
    text = b"  5 %|#  |\rsrun: error: n2: task 1: Exited with exit code 3\nhcsdl: no\nsrun: error: n[1,3]: tasks 0,2-3: Exited with exit code 5\nend"
    for size in (len(text), 7):
        read, write = os.pipe()
        for start in range(0, len(text), size):
            os.write(write, text[start : start + size])
        os.close(write)
        assert pass_through(read) == [3, 5]
        assert capfd.readouterr().err.encode() == text
        os.close(read)


def test_going_means_that_slurm_runs_it_or_will_by_itself() -> None:
    assert still_going({0: "COMPLETED", 1: "PENDING Resources"}) and still_going({0: "RUNNING"}) and still_going({0: "COMPLETING"})
    assert not still_going({0: "COMPLETED", 1: "FAILED NonZeroExitCode", 2: "NODE_FAIL"})
    assert not still_going({}), "Slurm has forgotten the job"
    assert not still_going({0: "PENDING launch failed requeued held"}), "it waits for a person"
    for reason in (
        "DependencyNeverSatisfied",
        "PartitionTimeLimit",
        "PartitionNodeLimit",
        "BadConstraints",
        "QOSMaxWallDurationPerJobLimit",
        "JobHeldUser",
    ):
        assert not still_going({0: "COMPLETED", 1: f"PENDING {reason}"}), "no time mends that"
    assert still_going({0: "PENDING Dependency", 1: "PENDING Priority"})
    assert still_going(None), "Slurm's silence says nothing"
