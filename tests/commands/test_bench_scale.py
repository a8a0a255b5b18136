"""`hcsdl bench scale`: predictions by hand from made-up measurements, and the whole command on real ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from hcsdl.commands.bench_scale import Here, Taken, check_link, cluster_all_reduce, format_predictions, predictions, typical, verify
from hcsdl.commands.compose import compose_command
from hcsdl.config import BenchScaleConfig, ConfigError
from hcsdl.distributed.scaling import Overlap, Timeline
from tests import runs

MIB = 2**20
GIVEN = {"bandwidth_gbit_s": 8e-3 * MIB / 1e6, "latency_us": 1e3}  # 1 MiB/s, 1 ms
TIMELINES = {1: Timeline(3.0, 2.0, (1.0, 2.0), (MIB, 2 * MIB)), 2: Timeline(5.0, 4.0, (2.0, 4.0), (MIB, 2 * MIB))}


def here(hosts: int = 1) -> Here:
    """Two ranks of one thread; an all_reduce takes a second a MiB and no latency; computing and communicating do not disturb each other."""
    return Here(2, hosts, 1, {1: 1 / MIB, MIB: 1.0}, {"mcnn": TIMELINES}, {"mcnn": Overlap(1.0, 1.0)})


def test_within_a_node_as_measured_and_between_nodes_as_given() -> None:
    bench = BenchScaleConfig(**GIVEN, ranks_per_node=4)
    one, three = cluster_all_reduce(here(), bench, 1, 1.0), cluster_all_reduce(here(), bench, 3, 0.5)
    assert one(MIB) == pytest.approx(1.5)  # 2·3/4 against 2·1/2
    assert three(MIB) == pytest.approx(1.5 + 2 * 2 / 3 / 0.5 + 4e-3, rel=1e-5)
    assert cluster_all_reduce(here(), BenchScaleConfig(**GIVEN, ranks_per_node=1), 1, 1.0) is None


def test_over_hosts_the_measured_ring_is_made_longer() -> None:
    all_reduce = cluster_all_reduce(here(hosts=2), BenchScaleConfig(), 4, 1.0)
    assert all_reduce(MIB) == pytest.approx(1.5, rel=1e-5)


def test_a_row_by_hand() -> None:
    bench = BenchScaleConfig(
        **GIVEN, nodes=[1, 2], ranks_per_node=1, cores_per_rank=2, mini_batch=4, core_speed=[0.5, 1.0], network_efficiency=[0.5, 1.0],
        images=100, epochs=2,
    )  # fmt: skip
    alone_low, alone_high, low, high = predictions("mcnn", here(), bench)
    assert [(row["nodes"], row["ranks"], row["assumption"]) for row in (alone_low, low, high)] == [
        (1, 1, "low"),
        (2, 2, "low"),
        (2, 2, "high"),
    ]
    # a mini-batch of 4 takes 9 s here (backward 8, buckets 4 and 8), as long on two cores of half the speed, half as long on two equal ones
    assert (alone_low["step_s"], alone_high["step_s"], alone_low["efficiency"]) == (9.0, 4.5, 1.0)
    assert low["step_s"] == pytest.approx(9 + 4 + 2e-3, rel=1e-4)  # the first bucket, 2 s, is hidden, the second, 4 s, is not
    assert high["step_s"] == pytest.approx(4.5 + 2 + 2e-3, rel=1e-4)
    assert high["images_per_s"] == pytest.approx(8 / high["step_s"]) and high["efficiency"] == pytest.approx(4.5 / high["step_s"])
    assert high["time_to_train_s"] == pytest.approx(200 / high["images_per_s"])


def rounds() -> list[Here]:
    """Three rounds, the second and third with all_reduces of 3 and 2 s a MiB; the last did not come to the largest size."""
    return [
        here(),
        dataclasses.replace(here(), all_reduces={1: 3 / MIB, MIB: 3.0}, overlaps={"mcnn": Overlap(0.5, 0.2)}),
        dataclasses.replace(here(), all_reduces={1: 2 / MIB}, overlaps={"mcnn": Overlap(0.9, 0.1)}),
    ]


def test_medians_over_the_rounds() -> None:
    found = typical(rounds())
    assert found.all_reduces == {1: 2 / MIB}
    assert found.overlaps == {"mcnn": Overlap(0.9, 0.2)} and found.timelines["mcnn"][2] == TIMELINES[2]


def test_each_round_predicts_the_steps_of_these_ranks() -> None:
    slow = dataclasses.replace(here(), all_reduces={1: 3 / MIB, MIB: 3.0})
    row = verify("mcnn", [here(), slow, here()], Taken(alone_s=[4.0, 5.0, 6.0], real_s=[8.0, 10.0, 9.0]), BenchScaleConfig())
    assert row["predicted_runs_s"] == pytest.approx(
        [5 + 2, 5 + 1 + 6, 5 + 2]
    )  # a bucket of 2 MiB after the end, of a slow one of 1 MiB 1 s more
    assert (row["predicted_step_s"], row["measured_step_s"]) == (pytest.approx(7), 9.0)
    assert (row["one_rank_images_per_s"], row["measured_images_per_s"]) == (2 / 5, 4 / 9)
    assert row["predicted_to_measured"] == pytest.approx(7 / 9)


def test_the_link_is_given_or_measured() -> None:
    with pytest.raises(ConfigError, match="must be given where all ranks are on one host"):
        check_link(BenchScaleConfig(nodes=[1, 2]), 2, hosts=1)
    with pytest.raises(ConfigError, match="the link between them is measured"):
        check_link(BenchScaleConfig(**GIVEN), 2, hosts=2)
    check_link(BenchScaleConfig(nodes=[1]), 2, hosts=1)
    check_link(BenchScaleConfig(), 2, hosts=2)


def test_over_hosts_one_node_of_several_ranks_is_not_predicted() -> None:
    """The measured link says nothing of ranks that talk through a node's memory; of one rank a node there is nothing to know."""
    bench = BenchScaleConfig(nodes=[1, 2], ranks_per_node=2)
    rows = predictions("mcnn", here(hosts=2), bench)
    assert [row["nodes"] for row in rows] == [2]
    assert "not of 1 node" in format_predictions(rows, bench, here(hosts=2), None).splitlines()[0]
    assert [row["nodes"] for row in predictions("mcnn", here(hosts=2), BenchScaleConfig(nodes=[1, 2]))] == [1, 2]
    with pytest.raises(ConfigError, match="bench.nodes must have more than one node where 4 ranks measure on 2 hosts"):
        check_link(BenchScaleConfig(nodes=[1]), 4, hosts=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench.latency_us=null"], "must be given together"),
        (["bench.core_speed=[1,2,3]"], "one value, or both a low and a high one"),
        (["bench.mini_batches=[2]"], "bench.mini_batch=8 can be predicted from two bench.mini_batches"),
        (["bench.models=[vgg]"], "bench.models must be one of"),
    ],
)
def test_settings_that_cannot_be(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_command("bench scale", words)


def test_predicted_and_taken_on_real_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = runs.run(
        "bench", "scale", "distributed.ranks=2", "machine.threads_per_rank=1", "distributed.backend=gloo", "distributed.timeout_s=60",
        "bench.image_px=[128,128]", "bench.models=[mcnn]", "bench.rounds=2", "bench.steps=1", "bench.verify=true", "bench.nodes=[1,8]",
        f"bench.output={folder}",
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    assert (result["schema_version"], result["command"], result["backend"], result["published"]) == (1, "hcsdl bench scale", "gloo", None)
    assert [(r["nodes"], r["ranks"], r["assumption"]) for r in result["predicted"]] == [
        (1, 4, "low"), (1, 4, "high"), (8, 32, "low"), (8, 32, "high"),
    ]  # fmt: skip
    rates = [row["images_per_s"] for row in result["predicted"]]
    assert rates[0] < rates[1] < rates[3] and rates[0] < rates[2] < 8 * rates[0]
    assert len(result["measured"]) == 2
    for seen in result["measured"]:
        assert seen["all_reduces"]["1024"] < seen["all_reduces"][str(25 * MIB)]
        for timeline in seen["timelines"]["mcnn"].values():
            assert timeline["ready_s"][0] > 0 and timeline["ready_s"] == sorted(timeline["ready_s"])
            assert timeline["ready_s"][-1] <= timeline["backward_s"] <= timeline["step_s"]
            assert sum(timeline["num_bytes"]) == 4 * 1_158_509  # M-CNN's parameters at 128 × 128
        assert 0 < seen["overlaps"]["mcnn"]["compute_rate"] <= 1 and 0 < seen["overlaps"]["mcnn"]["communication_rate"] <= 1
    (verified,) = result["verified"]
    assert len(verified["predicted_runs_s"]) == len(verified["measured_runs_s"]) == 2 and min(verified["measured_runs_s"]) > 0
    assert verified["predicted_step_s"] > verified["predicted_exposed_s"] > 0
    assert verified["predicted_to_measured"] == pytest.approx(verified["predicted_step_s"] / verified["measured_step_s"])
    assert done.stdout.startswith("PREDICTED, not measured: 4 ranks a node × 10 cores, 100 Gbit/s, 20 µs, 8 fields a rank and step")
    assert "over these 2 ranks on 1 host" in done.stdout and "published" not in done.stdout
    assert Image.open(folder / "scaling.png").convert("L").getextrema()[0] == 0
