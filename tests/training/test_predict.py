"""Every field is predicted once, in evaluation mode, and the network is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hcsdl.commands.run
from hcsdl.commands.compose import compose_command
from hcsdl.commands.train import open_run_folder, prepare_run
from hcsdl.config import DistributedConfig
from hcsdl.data.loading import MiniBatch
from hcsdl.data.sampling import evaluation_rows
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.kernels import Kernels, choose_kernels
from hcsdl.training.predict import buffers_swapped, outputs, predict
from tests.distributed.ranks import on_ranks

FIELDS, CLASSES = 11, 4


def network(seed: int = 0) -> nn.Module:
    """Return a network that answers differently in training mode, with statistics that are not the fresh ones."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 4, CLASSES))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


def images(rows: Tensor) -> Tensor:
    return torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(int(row))) for row in rows])


def batches(rows: list[int], size: int) -> list[MiniBatch]:
    cut = [torch.tensor(rows[at : at + size]) for at in range(0, len(rows), size)]
    return [MiniBatch(images(some), some % CLASSES, some) for some in cut]


def alone() -> Group:
    return Group(Identity(), DistributedConfig())


def expected(model: nn.Module) -> Tensor:
    """Return the logits of all fields, written out for this network."""
    conv, norm, last = model[0], model[1], model[5]
    features = conv(images(torch.arange(FIELDS)))
    shape = (1, -1, 1, 1)
    scaled = (features - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return last((scaled * norm.weight.view(shape) + norm.bias.view(shape)).relu().flatten(1)).detach()


@pytest.mark.parametrize("size", [1, 4, 11])
def test_every_row_once_in_order(size: int) -> None:
    model = network()
    mixed = torch.randperm(FIELDS, generator=torch.Generator().manual_seed(1)).tolist()
    rows, labels, logits = predict(model, batches(mixed, size), choose_kernels("reference"), alone())
    assert rows.tolist() == list(range(FIELDS)) and labels.tolist() == [row % CLASSES for row in range(FIELDS)]
    torch.testing.assert_close(logits, expected(model))
    assert logits.dtype == torch.float32 and not logits.requires_grad


def test_half_precision_comes_back_as_fp32() -> None:
    model = network()
    _, _, logits = predict(model, batches(list(range(FIELDS)), 4), Kernels("native", "bf16", "asked for"), alone())
    assert logits.dtype == torch.float32
    assert 0 < float((logits - expected(model)).abs().max()) < 0.05


@pytest.mark.parametrize("training", [True, False])
def test_mode_buffers_and_random_state_stay(training: bool) -> None:
    model = network().train(training)
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    predict(model, batches(list(range(FIELDS)), 4), choose_kernels("reference"), alone())
    assert all(part.training == training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random), "an evaluation must not move what comes after it"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ending", ["normally", "with an error"])
def test_swapped_buffers_come_back_bit_for_bit(ending: str) -> None:
    model = network()
    own = {name: value.clone() for name, value in model.named_buffers()}
    other = {"1.running_mean": torch.full((6,), 0.3), "1.running_var": torch.full((6,), 1 / 3)}
    try:
        with buffers_swapped(model, other):
            inside = {name: value.clone() for name, value in model.named_buffers()}
            model.train()(images(torch.arange(3)))  # moves the statistics
            if ending == "with an error":
                raise KeyError("a field")
    except KeyError:
        assert ending == "with an error"
    assert all(torch.equal(inside[name], other[name]) for name in other)
    assert inside["1.num_batches_tracked"] == own["1.num_batches_tracked"]
    assert all(torch.equal(value, own[name]) for name, value in model.named_buffers() if name in other)
    assert torch.equal(other["1.running_mean"], torch.full((6,), 0.3)), "what was given is not written to"


def evaluations(group: Group) -> list[dict]:
    """Evaluate as a run does, each of two ranks with statistics of its own: once with 4 and 7 fields, once with all and none."""
    model, told = network().train(), []
    model[1].running_mean.add_(group.rank)
    own = {name: value.clone() for name, value in model.named_buffers()}
    for parts in ([[0, 8, 2, 4], [1, 9, 3, 10, 5, 7, 6]], [evaluation_rows(FIELDS, 0, 1).tolist(), []]):
        with buffers_swapped(model, group.averaged_buffers(model)):
            rows, labels, logits = predict(model, batches(parts[group.rank], 2), choose_kernels("reference"), group)
        kept = all(torch.equal(value, own[name]) for name, value in model.named_buffers())
        told.append({"rows": rows.tolist(), "labels": labels.tolist(), "logits": logits.tolist(), "kept": kept, "training": model.training})
    return told


def test_ranks_with_uneven_parts_evaluate_one_network() -> None:
    first, second = (one["value"] for one in on_ranks(evaluations, 2))
    mean = network()
    mean[1].running_mean.add_(0.5)
    for one, other in zip(first, second, strict=True):
        assert one == other
        assert one["rows"] == list(range(FIELDS)) and one["labels"] == [row % CLASSES for row in range(FIELDS)]
        torch.testing.assert_close(torch.tensor(one["logits"]), expected(mean), msg="statistics must be the mean of the ranks'")
        assert one["kept"] and one["training"], "a rank's own statistics and mode must be as before"


def test_a_run_evaluates_with_the_averaged_statistics(tiny_plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=tiny", f"plates.root={tiny_plates}", f"run_dir={tmp_path}", "training.baseline=false", "kernels=reference"]
    prepare_run(config := compose_command("train", words), folder := open_run_folder(config))
    run = hcsdl.commands.run.Run(config, folder, Identity(), lambda: False, "system")
    own = {name: buffer.clone() for name, buffer in run.bare.named_buffers()}
    averaged = {name: buffer + 0.5 for name, buffer in own.items() if buffer.is_floating_point()}  # as if other ranks had other ones
    seen: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        return predict(model, *rest)

    monkeypatch.setattr(hcsdl.commands.run, "predict", watched)
    monkeypatch.setattr(run.group, "averaged_buffers", lambda model: averaged)
    fields, wells = run.scores()
    run.journal.close()
    folder.release()
    assert len(seen) == 1 and averaged and all(torch.equal(seen[0][name], value) for name, value in averaged.items())
    assert all(torch.equal(buffer, own[name]) for name, buffer in run.bare.named_buffers()), "a rank keeps its own"
    assert int(fields.confusion.sum()) == run.plan.num_val_fields and int(wells.confusion.sum()) == run.plan.num_wells_val


class Shapes(nn.Module):
    """A network that gives two outputs and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.inner = network()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(tuple(images.shape))
        return images.mean((2, 3)), self.inner(images)


def test_short_mini_batches_are_filled_up_and_cut_again() -> None:
    model, kernels = Shapes(), choose_kernels("reference")
    found = list(outputs(model, batches(list(range(FIELDS)), 4), kernels, pad_to=4))
    assert [shape[0] for shape in model.seen] == [4, 4, 4] and [len(part[0]) for part in found] == [4, 4, 3]
    assert all(len(part) == 4 and len(one) == len(part[0]) for part in found for one in part)
    torch.testing.assert_close(torch.cat([part[3] for part in found]), expected(model.inner))
    # What a field gives depends on nothing but the fields of its own mini-batch.
    alone_found = list(outputs(model, batches(list(range(8, FIELDS)), 4), kernels, pad_to=4))
    assert torch.equal(alone_found[0][3], found[2][3])


def test_a_model_is_in_its_own_mode_between_mini_batches() -> None:
    model = network().train()
    for _ in outputs(model, batches(list(range(FIELDS)), 4), choose_kernels("reference")):
        assert model.training
