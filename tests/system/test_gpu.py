"""machine.device=cuda: what it says where there is no GPU; and, where there is one, that the same runs come out of it."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hcsdl
from hcsdl.commands.compose import compose_command
from hcsdl.config import ConfigError
from hcsdl.training.checkpoint import list_checkpoints
from tests import forked, runs
from tests.gpu import needs_gpu, needs_no_gpu, needs_two_gpus

CUDA, ONE = ["machine=cuda"], ["distributed.ranks=1", "training.epochs=2"]


@needs_no_gpu
@pytest.mark.parametrize("command", ["train", "embed", "bench step"])
def test_without_a_gpu_is_said_in_a_line_before_any_work(tiny_plates: Path, trained: Path, tmp_path: Path, command: str) -> None:
    words = {
        "train": ["train", "experiment=tiny", f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'out'}"],
        "embed": ["embed", f"checkpoint={trained}", f"embed.output={tmp_path / 'out' / 'a.parquet'}"],
        "bench step": ["bench", "step", f"bench.output={tmp_path / 'out'}"],
    }[command]
    done = runs.run(*words, "machine.device=cuda", code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("hcsdl: machine.device=cuda needs a GPU that torch can use. torch.cuda.is_available() is False on ")
    assert not (tmp_path / "out").exists()


@needs_no_gpu
def test_a_rank_of_torchrun_says_so_too(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["train", "experiment=tiny", f"plates.root={tiny_plates}", f"run_dir={tmp_path / 'out'}", *CUDA]
    (rank,) = forked.start_ranks(words, 1, tmp_path)
    assert rank.wait(100) == 2 and "needs a GPU that torch can use" in rank.said()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train", ["kernels=ipex"], "kernels=ipex is for processors"),
        ("embed", ["kernels=fused"], "kernels=fused is for processors"),
        ("train", ["distributed.backend=ccl"], "distributed.backend=ccl is for processors"),
        ("bench_step", ["bench.targets=true"], "bench.targets=true is of processors"),
        ("bench_data", [], "machine.device=cuda is for train, embed and bench step"),
        ("bench_scale", [], "machine.device=cuda is for train, embed and bench step"),
        ("check_machine", [], "machine.device=cuda is for train, embed and bench step"),
    ],
)
def test_what_cannot_be_combined_is_refused(command: str, words: list[str], said: str) -> None:
    name = command.replace("_", " ")
    compose_command(name, words)
    with pytest.raises(ConfigError, match=said):
        compose_command(name, [*words, "machine.device=cuda"])


@needs_gpu
@pytest.mark.parametrize("model", ["resnet18", "mcnn"])
def test_training_comes_out_as_on_the_processor(tiny_plates: Path, tmp_path: Path, model: str) -> None:
    """In fp32 the first losses agree closely, the same fields having been drawn and changed; in bf16 to its precision."""
    for name, words in {"cpu": [], "gpu": CUDA}.items():
        runs.train(tiny_plates, tmp_path / name, f"model={model}", "kernels=reference", *ONE, *words)
    runs.train(tiny_plates, tmp_path / "bf16", f"model={model}", *ONE, *CUDA)
    cpu, gpu, bf16 = ([e["loss"] for e in runs.journal(tmp_path / name) if e["event"] == "step"] for name in ("cpu", "gpu", "bf16"))
    assert len(cpu) == len(gpu) == len(bf16)
    np.testing.assert_allclose(gpu[:2], cpu[:2], rtol=1e-3)
    np.testing.assert_allclose(bf16[:2], cpu[:2], rtol=0.05)
    found = runs.summary(tmp_path / "bf16")
    assert (found["device"], found["kernels"], found["precision"], found["backend"]) == ("cuda", "native", "bf16", "none")
    assert found["device_name"] == torch.cuda.get_device_name() and found["peak_device_gib"] > 0


@needs_gpu
@pytest.mark.parametrize("model", ["resnet18", "mcnn"])
def test_a_resumed_run_ends_with_the_same_bits(tiny_plates: Path, tmp_path: Path, model: str) -> None:
    words = [f"model={model}", *ONE, *CUDA]
    runs.train(tiny_plates, tmp_path / "alone", *words)
    process = runs.start_train(tiny_plates, tmp_path / "stopped", *words)
    runs.wait_for_step(process, tmp_path / "stopped", 3)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 75
    runs.train(tiny_plates, tmp_path / "stopped", *words)
    assert runs.digest(tmp_path / "stopped") == runs.digest(tmp_path / "alone")


@needs_gpu
def test_what_was_trained_on_a_gpu_is_of_use_without_one(tiny_plates: Path, tmp_path: Path) -> None:
    """Its checkpoint holds nothing of a GPU, and its embeddings are those of the processor but for rounding."""
    folder = tmp_path / "run"
    runs.train(tiny_plates, folder, "training.mini_batch_size=auto", *ONE, *CUDA)

    def devices(value: object) -> set[str]:
        if torch.is_tensor(value):
            return {value.device.type}
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set().union(*map(devices, items))

    assert devices(torch.load(list_checkpoints(folder / "checkpoints")[0], weights_only=True)) == {"cpu"}
    assert next(hcsdl.load_run(folder).model.parameters()).device.type == "cpu"
    tables = {}
    for name, words in {"cpu": ["kernels=reference"], "gpu": ["kernels=reference", *CUDA], "bf16": CUDA}.items():
        runs.run("embed", f"checkpoint={folder}", "distributed.ranks=1", f"embed.output={tmp_path / name}.parquet", *words)
        tables[name] = pd.read_parquet(tmp_path / f"{name}.parquet").filter(like="Embedding_").to_numpy()
    scale = np.abs(tables["cpu"]).max()
    assert np.abs(tables["gpu"] - tables["cpu"]).max() < 1e-3 * scale
    assert np.abs(tables["bf16"] - tables["cpu"]).max() < 0.05 * scale


@needs_two_gpus
def test_two_gpus_train_one_network_over_nccl(tiny_plates: Path, tmp_path: Path) -> None:
    words = ["training.epochs=2", *CUDA, "distributed.ranks=2"]
    runs.train(tiny_plates, tmp_path / "alone", *words)
    found = runs.summary(tmp_path / "alone")
    assert (found["world_size"], found["backend"]) == (2, "nccl") and math.isfinite(found["images_per_s"])
    process = runs.start_train(tiny_plates, tmp_path / "stopped", *words)
    runs.wait_for_step(process, tmp_path / "stopped", 3)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 75
    runs.train(tiny_plates, tmp_path / "stopped", *words)
    assert runs.digest(tmp_path / "stopped") == runs.digest(tmp_path / "alone")


@needs_gpu
def test_steps_are_measured_on_a_gpu(tmp_path: Path) -> None:
    words = ["bench.models=[resnet18]", "bench.image_size=[64,96]", "bench.width=0.125", "bench.steps=2", "bench.rounds=1"]
    variants = "bench.variants=[bf16,ipex_recipe,hcsdl_best]"
    runs.run("bench", "step", *words, variants, "machine.device=cuda", f"bench.output={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "result.json").read_text())["models"]["resnet18"]
    rows = {row["variant"]: row for row in found["rows"]}
    assert found["device_name"] == torch.cuda.get_device_name() and found["memory"]["bf16"]["peaks_gib"][0] > 0
    assert (rows["ipex_recipe"]["status"], rows["ipex_recipe"]["reason"]) == ("missing", "it is for processors")
    assert all(0 < rows[name]["mfu"] < 1 and rows[name]["peak_device_gib"] > 0 for name in ("bf16", "hcsdl_best"))
