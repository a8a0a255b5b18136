"""The loop, in this process: what a step does to the weights, when it evaluates and saves, and how it ends."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcsdl.config import DataError, DistributedConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from hcsdl.data.loading import MiniBatch
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.launcher import Stop
from hcsdl.kernels import choose_kernels
from hcsdl.models import build_model
from hcsdl.training.journal import Silence
from hcsdl.training.loop import NonFiniteLoss, Parts, State, train, train_step
from hcsdl.training.objectives import build_objective
from hcsdl.training.optimizers import build_optimizer
from hcsdl.training.schedules import learning_rate

BATCH, CLASSES, SHAPE = 6, 3, (3, 2, 2)
NEVER = {"checkpoint_every_s": 1e9}
PLAIN = {"momentum": 0, "weight_decay": 0, "warmup_epochs": 0, "schedule": "constant", "learning_rate": 0.5, **NEVER}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5), nn.ReLU(), nn.Linear(5, CLASSES))


def batch(step: int, shape: Sequence[int] = SHAPE) -> MiniBatch:
    """Return the fields of a step: images that depend on its number only, and rows from 6 × step."""
    images = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step))
    return MiniBatch(images, torch.arange(BATCH) % CLASSES, torch.arange(BATCH) + BATCH * step)


def pieces(whole: MiniBatch, count: int) -> list[MiniBatch]:
    """Cut the fields of a step into `count` equal mini-batches."""
    return [MiniBatch(*parts) for parts in zip(*(t.chunk(count) for t in (whole.images, whole.labels, whole.rows)), strict=True)]


@dataclass
class Fields:
    """A loader that has its fields in memory, waits `pause_s` for each step, and can fail at one."""

    first: int
    last: int
    mini_batches: int = 1
    pause_s: float = 0.0
    spoil: Callable[[int, MiniBatch], MiniBatch] = lambda step, whole: whole
    wait_s: float = 0.0
    closed: int = 0

    def __iter__(self) -> Iterator[list[MiniBatch]]:
        for step in range(self.first, self.last):
            began = time.perf_counter()
            time.sleep(self.pause_s)
            self.wait_s += time.perf_counter() - began
            yield pieces(self.spoil(step, batch(step)), self.mini_batches)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Notes(Silence):
    """What the loop has asked for, in order: ("step" | "evaluation" | "save", step), besides what each had to say."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    values: list[dict] = field(default_factory=list)
    elapsed: list[float] = field(default_factory=list)
    loaders: list[Fields] = field(default_factory=list)

    def of(self, what: str) -> list[int]:
        return [step for name, step in self.calls if name == what]

    def step(self, step: int, fields: int, values: dict) -> None:
        assert fields == BATCH
        self.calls.append(("step", step))
        self.values.append(values)

    def evaluate(self, state: State) -> dict:
        self.calls.append(("evaluation", state.step))
        return {"step": state.step}

    def save(self, state: State) -> None:
        self.calls.append(("save", state.step))
        self.elapsed.append(state.elapsed_s)


def parts(model: nn.Module, total_steps: int = 4, steps_per_epoch: float = 1000, **settings: object) -> tuple[Parts, Notes]:
    """Return real parts around a small network; the loader and the callbacks write down what is asked of them."""
    config = TrainingConfig(**{"global_batch_size": BATCH, **PLAIN, **settings})
    notes = Notes()

    def loader(first: int, last: int) -> Fields:
        notes.loaders.append(Fields(first, last))
        return notes.loaders[-1]

    return Parts(
        model=model,
        optimizer=build_optimizer(model, config),
        objective=build_objective(ObjectiveConfig()),
        kernels=choose_kernels("reference"),
        group=Group(Identity(), DistributedConfig()),
        config=config,
        loader=loader,
        field_name=lambda row: f"field {row}",
        evaluate=notes.evaluate,
        save=notes.save,
        journal=notes,
        stop_asked=lambda: False,
        total_steps=total_steps,
        schedule_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    ), notes


def with_loader(own: Parts, notes: Notes, **options: object) -> Parts:
    """Return `own` with loaders that have other options."""

    def loader(first: int, last: int) -> Fields:
        notes.loaders.append(Fields(first, last, **options))
        return notes.loaders[-1]

    return replace(own, loader=loader)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def by_hand(model: nn.Module, whole: MiniBatch) -> tuple[float, Tensor]:
    """Return the loss of all fields at once, and its gradient."""
    loss = F.cross_entropy(model(whole.images), whole.labels, label_smoothing=0.1)
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# One step.


@pytest.mark.parametrize("mini_batches", [1, 2, 3, 6])
def test_a_step_follows_the_gradient_of_the_mean_over_all_mini_batches(mini_batches: int) -> None:
    own, _ = parts(model := network())
    before, (loss, gradient) = weights(model), by_hand(model, batch(0))
    outcome = train_step(own, pieces(batch(0), mini_batches), 0, False)
    torch.testing.assert_close(weights(model), before - 0.5 * gradient, rtol=0, atol=1e-6)
    assert outcome.loss == pytest.approx(loss, rel=1e-6) and outcome.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert all(p.grad is None for p in model.parameters()), "the next step must start from no gradient"


@pytest.mark.parametrize("clip_norm", [0.01, 1e6, None])
def test_clipping_shortens_a_long_gradient_only(clip_norm: float | None) -> None:
    own, _ = parts(model := network(), clip_norm=clip_norm)
    before, (_, gradient) = weights(model), by_hand(model, batch(0))
    outcome = train_step(own, [batch(0)], 0, False)
    factor = min(1.0, (clip_norm or math.inf) / float(gradient.norm()))
    torch.testing.assert_close(weights(model), before - 0.5 * factor * gradient, rtol=0, atol=1e-6)
    assert (factor < 1) == (clip_norm == 0.01)
    assert outcome.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-5), "what is reported is the norm before"


def test_every_parameter_group_gets_the_schedules_rate() -> None:
    own, notes = parts(network(), 8, steps_per_epoch=2.5, warmup_epochs=1, schedule="cosine")
    own = replace(own, schedule_steps=12)  # a run cut short by max_steps keeps the schedule of the whole
    for step in range(8):
        train_step(own, [batch(step)], step, False)
        rate = learning_rate(step, 12, 2.5, own.config)
        assert [group["lr"] for group in own.optimizer.param_groups] == [rate, rate]
    train(own, State())
    assert [values["learning_rate"] for values in notes.values] == [learning_rate(step, 12, 2.5, own.config) for step in range(8)]


MODELS = {
    "resnet18": (ModelConfig(), (3, 40, 48)),
    "mcnn": (ModelConfig(name="mcnn", head="pool"), (3, 64, 64)),
    "narrow": (ModelConfig(width=0.125), (3, 48, 40)),
}


@pytest.mark.parametrize(("config", "shape"), MODELS.values(), ids=MODELS)
def test_two_steps_of_a_real_network_are_those_of_a_plain_loop(config: ModelConfig, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build_model(config, shape[0], CLASSES, shape[1:])
    plain, met = copy.deepcopy(model), set()
    own, _ = parts(model, learning_rate=0.01, momentum=0.9, weight_decay=1e-3)
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: met.add(name) if p.grad.isfinite().all() else None)
    losses = [train_step(own, [batch(step, shape)], step, False).loss for step in range(2)]

    decayed, bare = ([p for p in plain.parameters() if (p.ndim > 1) == whether] for whether in (True, False))
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-3}, {"params": bare, "weight_decay": 0}], lr=0.01, momentum=0.9, nesterov=True
    )
    for step in range(2):
        whole = batch(step, shape)
        loss = F.cross_entropy(plain(whole.images), whole.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    assert met == {name for name, _ in model.named_parameters()}, "every parameter must get a gradient"


def test_one_mini_batch_is_learnt_by_heart() -> None:
    own, notes = parts(network(), 150, optimizer="adamw", learning_rate=0.05)
    own = with_loader(
        replace(own, objective=build_objective(ObjectiveConfig(label_smoothing=0))), notes, spoil=lambda step, whole: batch(0)
    )
    train(own, State())
    assert notes.values[0]["loss"] > 0.5 and notes.values[-1]["loss"] < 1e-3


# What is not a number.


def black_hole(step: int, whole: MiniBatch) -> MiniBatch:
    """Put one pixel that is not a number into the last field of step 2."""
    if step == 2:
        whole.images[-1, 0, 0, 0] = math.nan
    return whole


def far_apart(model: nn.Module, step: int) -> None:
    """Let one logit be the largest float and another the smallest: an infinite loss whose gradient is finite."""
    if step == 2:
        model[3].bias.data[:] = torch.tensor([3e38, -3e38, 0])


def no_gradient(model: nn.Module, step: int) -> None:
    if step == 2:
        model[3].weight.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize("kind", ["loss nan", "loss inf", "gradient nan"])
def test_a_step_that_is_not_finite_moves_nothing(kind: str, mini_batches: int) -> None:
    own, notes = parts(model := network(), momentum=0.9)
    kept: list = []

    def spoil(step: int, whole: MiniBatch) -> MiniBatch:
        if kind == "loss nan":
            whole = black_hole(step, whole)
        else:
            {"loss inf": far_apart, "gradient nan": no_gradient}[kind](model, step)
        kept[:] = [weights(model), copy.deepcopy(own.optimizer.state_dict()["state"])]
        return whole

    own = with_loader(own, notes, spoil=spoil, mini_batches=mini_batches)
    state = State()
    with pytest.raises(NonFiniteLoss) as caught:
        train(own, state)
    said = str(caught.value)
    assert caught.value.exit_code == 4 and "At step 2 the" in said and "\n" not in said
    if kind == "gradient nan":
        assert "gradient's norm was nan (the loss was finite) on rank 0" in said
    else:
        assert f"rank 0: {', '.join(f'field {row}' for row in range(12, 18))}" in said
    assert state.step == 2 and notes.of("save") == [] and notes.loaders[0].closed == 1
    assert torch.equal(weights(model), kept[0])
    after = own.optimizer.state_dict()["state"]
    assert after.keys() == kept[1].keys() and len(after) == 4
    assert all(torch.equal(after[key]["momentum_buffer"], kept[1][key]["momentum_buffer"]) for key in after)


# When it evaluates, saves and ends.


def test_a_stop_ends_after_a_whole_step_that_is_saved() -> None:
    own, notes = parts(model := network(), 9)
    state = State()
    with pytest.raises(Stop, match="after step 3, which is saved"):
        train(replace(own, stop_asked=lambda: len(notes.of("step")) == 2), state)
    assert state.step == 3 and notes.calls[-2:] == [("step", 3), ("save", 3)] and notes.of("save") == [3]
    assert notes.of("evaluation") == [] and notes.loaders[0].closed == 1

    other, _ = parts(same := network(), 3)
    train(other, State())
    assert torch.equal(weights(model), weights(same))


def test_a_stop_in_the_last_step_is_no_stop() -> None:
    own, notes = parts(network(), 3)
    train(replace(own, stop_asked=lambda: len(notes.of("step")) == 2), State())
    assert notes.of("evaluation") == notes.of("save") == [3]


@pytest.mark.parametrize(("pass_length", "passes"), [(6, 1), (7, 1), (12, 1), (15, 1), (20, 1), (23, 1), (15, 2), (14, 3)])
def test_every_pass_is_evaluated_once_wherever_it_ends(pass_length: int, passes: int) -> None:
    steps = 25
    own, notes = parts(network(), steps, steps_per_epoch=pass_length / BATCH, validate_every_epochs=passes)
    state = train(own, State())
    ends = {math.ceil(Fraction(pass_length * passes * number, BATCH)) for number in range(1, steps + 1)}
    expected = sorted({step for step in ends if step <= steps} | {steps})
    assert notes.of("evaluation") == [entry["step"] for entry in state.history] == expected
    assert notes.of("save") == expected, "what an evaluation has found is saved"
    assert all(notes.calls[at - 1] == ("evaluation", step) for at, (what, step) in enumerate(notes.calls) if what == "save")


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({}, [7]),
        ({"checkpoint_every_steps": 2}, [2, 4, 6, 7]),
        ({"checkpoint_every_steps": 7}, [7]),
        ({"checkpoint_every_s": 0}, [1, 2, 3, 4, 5, 6, 7]),
        ({"checkpoint_every_s": 0, "checkpoint_every_steps": 3}, [1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=str,
)
def test_checkpoints_come_when_asked_for_and_at_the_end(settings: dict, saved: list[int]) -> None:
    own, notes = parts(network(), 7, **settings)
    train(own, State())
    assert notes.of("save") == saved


@pytest.mark.parametrize(("steps", "saved"), [(None, [3, 6, 7]), (2, [2, 4, 6, 7])])
def test_a_checkpoint_is_due_that_long_after_the_last_one(monkeypatch: pytest.MonkeyPatch, steps: int | None, saved: list[int]) -> None:
    clock = SimpleNamespace(now=10.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("hcsdl.training.loop.time", clock)

    def tick(step: int, whole: MiniBatch) -> MiniBatch:
        clock.now += 2.0
        return whole

    own, notes = parts(network(), 7, checkpoint_every_s=5, checkpoint_every_steps=steps)
    train(with_loader(own, notes, spoil=tick), State())
    assert notes.of("save") == saved, "the clock starts again at every checkpoint, whatever it was written for"


def test_seconds_go_on_where_the_last_attempt_stopped() -> None:
    own, notes = parts(network(), 8, checkpoint_every_steps=1)
    own = with_loader(own, notes, pause_s=0.005)
    first = train(replace(own, total_steps=4), State(elapsed_s=100.0))
    again = train(own, State(first.step, list(first.history), first.elapsed_s))
    assert [(loader.first, loader.last) for loader in notes.loaders] == [(0, 4), (4, 8)]
    assert notes.elapsed[0] >= 100.005 and again.elapsed_s >= 100.04
    gaps = [later - sooner for sooner, later in zip(notes.elapsed, notes.elapsed[1:], strict=False)]
    assert min(gaps) >= 0.005
    assert [entry["step"] for entry in again.history] == [4, 8]


def test_speed_and_waiting_are_of_the_settled_steps() -> None:
    own, notes = parts(network(), 5)
    state = train(with_loader(own, notes, pause_s=0.01), State())
    assert state.fields_timed == 3 * BATCH
    assert 0.03 <= state.waited_s <= state.seconds_timed
    assert all(0.01 <= values["data_wait_s"] <= values["step_s"] for values in notes.values)
    assert state.waited_s == pytest.approx(sum(values["data_wait_s"] for values in notes.values[2:]))


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    settings = {"momentum": 0.9, "weight_decay": 1e-3, "schedule": "cosine", "clip_norm": 0.5}
    alone, _ = parts(model := network(), 6, **settings)
    train(alone, State())

    half, _ = parts(begun := network(), 6, **settings)
    state = train(replace(half, total_steps=3), State())
    onward, _ = parts(resumed := network(seed=1), 6, **settings)
    resumed.load_state_dict(begun.state_dict())
    onward.optimizer.load_state_dict(copy.deepcopy(half.optimizer.state_dict()))
    train(onward, State(state.step, list(state.history), state.elapsed_s))
    assert torch.equal(weights(model), weights(resumed))


def test_nothing_left_to_do_does_nothing() -> None:
    own, notes = parts(model := network(), 4)
    before = weights(model)
    assert train(own, State(step=4)).step == 4
    assert notes.calls == [] and notes.loaders[0].closed == 1 and torch.equal(weights(model), before)


@pytest.mark.parametrize("where", ["loader", "evaluate", "save", "journal"])
def test_the_loader_is_closed_whatever_fails(where: str) -> None:
    def fail(*_: object) -> None:
        raise DataError("a field cannot be read")

    own, notes = parts(network(), 4, checkpoint_every_steps=2)
    if where == "loader":
        own = with_loader(own, notes, spoil=lambda step, whole: fail() if step == 2 else whole)
    elif where == "journal":
        notes.step = fail  # type: ignore[method-assign]
    else:
        own = replace(own, **{where: fail})
    with pytest.raises(DataError, match="a field cannot be read"):
        train(own, State())
    assert notes.loaders[0].closed == 1
