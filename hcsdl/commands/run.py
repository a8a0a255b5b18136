"""One rank's run: everything built in order, model → optimizer → state from a checkpoint → kernels → distributed, then handed to the loop."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from hcsdl.commands.compose import config_hash, to_yaml
from hcsdl.commands.prepare import class_numbers, load_plan, make_sampler
from hcsdl.commands.results import summarise
from hcsdl.commands.resume import checkpoint_to_go_on_from, elsewhere, load_optimizer, on_processor, other_ranks
from hcsdl.config import ConfigError, TrainCommand
from hcsdl.data.loading import EvalLoader, TrainLoader
from hcsdl.data.preprocessing import Preprocessing, load_preprocessing
from hcsdl.data.sampling import evaluation_rows
from hcsdl.data.sending import Sender
from hcsdl.data.staging import Progress, stage_fields
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.launcher import Stop
from hcsdl.kernels import choose_kernels
from hcsdl.kernels.device import device_limit_gib, device_name, own_device, peak_device_gib, random_state, set_random_state
from hcsdl.kernels.memory import release_freed_tensors
from hcsdl.kernels.replacement import replaced
from hcsdl.machine.allocation import memory_limit_gib, time_limit
from hcsdl.machine.memory import peak_rss_gib
from hcsdl.machine.topology import read_machine
from hcsdl.models import build_model
from hcsdl.models.weights import load_weights
from hcsdl.plates.index import load_index
from hcsdl.training.budget import evaluations_left, gib, images_gib, objections, optimizer_gib, predict_s, prediction
from hcsdl.training.checkpoint import Checkpoint, load_model_state, save_checkpoint
from hcsdl.training.journal import Journal, Silence
from hcsdl.training.loop import Parts, State, train
from hcsdl.training.mini_batch import Footprint, Need, settle
from hcsdl.training.objectives import build_objective
from hcsdl.training.optimizers import SLOTS, build_optimizer
from hcsdl.training.predict import buffers_swapped, predict
from hcsdl.training.run_folder import RunFolder, write_atomically, write_json
from hcsdl.training.step_time import StepClock, probe, throw_away
from hcsdl.training.summary import versions

if TYPE_CHECKING:
    from hcsdl.training.metrics import Scores

log = logging.getLogger(__name__)
SCORES_GIB = 0.08  # torchmetrics and what it needs, small tensors, threads of another loader (measured here)


class Run:
    """A training run as one rank sees it; `train()` then `finish()`."""

    def __init__(self, config: TrainCommand, folder: RunFolder, identity: Identity, stop: Callable[[], bool], allocator: str) -> None:
        self.config, self.folder, self.allocator = config, folder, allocator
        self.journal: Silence = Silence()
        self.last_scores: tuple[Scores, Scores] | None = None
        self.evaluated = False
        self.bad_fields: dict[str, str] = {}
        self.plan = load_plan(folder.plan)
        self.index = load_index(folder.path)
        self.device = own_device(config.machine.device, identity.local_rank)
        self.sender = Sender(self.device) if self.device.type == "cuda" else None
        self.group = Group(identity, config.distributed, self.device)
        self.kernels = choose_kernels(config.kernels.name, self.device)
        self.threads = torch.get_num_threads()
        for what, value in (
            ("configuration", config_hash(config)),
            ("index", self.index.hash),
            ("versions", versions()),
            ("kernels", self.kernels),
        ):
            self.group.check_equal(what, value)
        if config.data.stage:
            node, leads = self.group.host, identity.local_rank == 0
            self.index = stage_fields(self.index, Path(config.data.stage), node=node, leads=leads, meet=self._meet(stop), say=self._say)

        checkpoint, foreign = checkpoint_to_go_on_from(folder, self.plan)
        self.group.check_equal("checkpoint", checkpoint and checkpoint.step)
        if checkpoint is None:
            self.preprocessing = load_preprocessing(folder.preprocessing)
        else:
            self.preprocessing = Preprocessing.from_state_dict(checkpoint.preprocessing)
        self.sampler_state = checkpoint.sampler if checkpoint and not foreign else {}
        self.labels = torch.from_numpy(class_numbers(self.index, self.plan.classes))
        self.sampler = make_sampler(config, self.index, self.plan.classes)
        self.share = config.training.global_batch_size // self.group.world_size
        self.mini_batch_size = config.training.fixed_mini_batch or self.share  # auto: settled before the first step
        self.steps_per_epoch = self.sampler.pass_length / config.training.global_batch_size
        self.planned_steps = math.ceil(config.training.epochs * self.steps_per_epoch - 1e-9)
        self.total_steps = min(self.planned_steps, config.training.max_steps or self.planned_steps)
        if foreign and checkpoint.step >= self.total_steps:
            raise ConfigError(
                f"training.epochs and max_steps must lead beyond the checkpoint's step {checkpoint.step}. This run would end at {self.total_steps}."
            )
        self._build(checkpoint, foreign)
        self.resumed = checkpoint is not None
        self._start_journal(stop)

    # What is built, in order.

    def _build(self, checkpoint: Checkpoint | None, foreign: bool) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(self.plan.channels), len(self.plan.classes), tuple(self.plan.image_size))
        if config.model.weights and checkpoint is None:
            self._say(load_weights(model, Path(config.model.weights)))
        model.to(self.device)
        optimizer = build_optimizer(model, config.training)
        self.state = State()
        own: dict = {}
        if checkpoint is not None:
            load_model_state(model, checkpoint)
            load_optimizer(optimizer, checkpoint, config.training.optimizer)
            self.state = State(checkpoint.step, list(checkpoint.history), checkpoint.elapsed_s)
            if len(checkpoint.ranks) == self.group.world_size:
                own = checkpoint.ranks[self.group.rank]
                if said := elsewhere(checkpoint.ran_on, self._ran_on()):
                    self._say(said)
            else:
                self._say(other_ranks(len(checkpoint.ranks), self.group.world_size, config.training, model))
            self._say(f"resumed from step {checkpoint.step}" + (f" of {self.plan.resume_from}" if foreign else ""))
        self.bare, self.optimizer = self.kernels.prepare(model, optimizer)
        if own:
            with torch.no_grad():
                for name, buffer in self.bare.named_buffers():
                    buffer.copy_(own["buffers"][name])
            set_random_state(self.device, own)
        self.group.choose_backend(self.bare, checkpoint.backend if checkpoint and own else "")
        self.model = self.group.wrap(self.bare)
        self.objective = build_objective(config.objective)

    def _ran_on(self) -> dict[str, str]:
        """Return what decides a run's last bits, by name."""
        return {
            "kernels": f"{self.kernels.name} ({self.kernels.precision})",
            "threads a rank": str(self.threads),
            "processor": device_name(self.device),
        }

    def _start_journal(self, stop: Callable[[], bool]) -> None:
        config, kernels = self.config, self.kernels
        if kernels.warning:
            self._say(f"warning: {kernels.warning}")
        replaced_by_ours = replaced(self.bare)
        counts = "".join(f"; {count} {kind}" for kind, count in replaced_by_ours.items())
        activations = config.model.checkpoint_activations
        kept = "" if activations == "none" else f" checkpoint_activations={activations};"
        self._say(
            f"kernels {kernels.name}, {kernels.precision} ({kernels.reason}{counts});{kept} allocator: {self.allocator}; {device_name(self.device)}"
        )
        if self.group.world_size > 1:
            self._say(f"{self.group.world_size} ranks over {self.group.backend} ({self.group.backend_reason})")
        self._say(
            f"{self.plan.num_train_fields} fields to train on, {self.plan.num_val_fields} fields of {self.plan.num_wells_val} wells held out. {self.plan.split_sentence}"
        )
        if self.group.rank == 0:
            self.journal = Journal(
                self.folder,
                every_s=config.training.journal_every_s,
                first_step=self.state.step,
                total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch,
            )
        self.journal.event(
            "start",
            self.state.step,
            {"resumed": self.resumed, "world_size": self.group.world_size, "kernels": kernels.name, "replaced": dict(replaced_by_ours)},
        )
        self.parts = Parts(
            model=self.model,
            optimizer=self.optimizer,
            objective=self.objective,
            kernels=kernels,
            group=self.group,
            config=config.training,
            loader=self._train_loader,
            field_name=self.index.field_name,
            evaluate=self.evaluate,
            save=self.save,
            journal=self.journal,
            stop_asked=stop,
            total_steps=self.total_steps,
            schedule_steps=self.planned_steps,
            steps_per_epoch=self.steps_per_epoch,
            clock=StepClock(self.device),
        )

    def _meet(self, stop: Callable[[], bool]) -> Callable[[Progress | None], list[Progress | None]]:
        def meet(progress: Progress | None) -> list[Progress | None]:
            told = self.group.all_gather_object((progress, stop()))
            if any(asked for _, asked in told):
                raise Stop("stopped by a signal before the first step; what was copied stays: start the same command again to go on.")
            return [progress for progress, _ in told]

        return meet

    def _say(self, text: str) -> None:
        if self.group.rank == 0:
            log.info("%s", text)

    def _train_loader(self, first_step: int, last_step: int) -> TrainLoader:
        self.loader = TrainLoader(
            self.index,
            self.labels,
            self.preprocessing,
            self.sampler,
            self.config.data,
            seed=self.config.seed,
            rank=self.group.rank,
            world_size=self.group.world_size,
            mini_batch_size=self.mini_batch_size,
            first_step=first_step,
            last_step=last_step,
            sender=self.sender,
            dtype=self.kernels.image_dtype,
        )
        return self.loader

    # What the loop calls.

    def train(self) -> None:
        """Run the loop to the last step."""
        self.mini_batch_size = self._settle_mini_batch()
        found = probe(self.model, self.group, lambda: self._throw_away_pass(self.mini_batch_size))
        mini_batches = self.share // self.mini_batch_size
        self.parts.clock.alone_s = mini_batches * found.alone_s if self.group.world_size > 1 else 0.0
        self._check_budget((mini_batches - 1) * found.alone_s + found.together_s)
        train(self.parts, self.state)
        if not self.evaluated:  # a run that was ended between its last step and its summary
            self.last_scores = self.scores()

    def _check_budget(self, step_s: float) -> None:
        """Say when the run will end and what its fullest node will hold, a step taking `step_s`. Where a limit does not allow it, warn, or raise
        ConfigError with training.strict_budget; the same on every rank."""
        config, steps = self.config, self.total_steps - self.state.step
        own_gib = self._peak_gib() + self._besides_passes_gib(self.mini_batch_size)
        allowed = time_limit() if self.group.rank == 0 else None  # one question to Slurm, not one a rank
        told = self.group.all_gather_object((self._memory_of, own_gib, self._limit_gib(), allowed))
        nodes = [
            (sum(gib for node, gib, _, _ in told if node == name), min(limit for node, _, limit, _ in told if node == name))
            for name in {node for node, *_ in told}
        ]
        peak_gib, limit_gib = max(nodes, key=lambda node: node[0] / node[1])
        allowed = told[0][3]
        evaluations = evaluations_left(self.state.step, self.total_steps, self.steps_per_epoch * config.training.validate_every_epochs)
        needed_s = predict_s(step_s, steps, evaluations, self.plan.num_val_fields, config.training.global_batch_size)
        now = datetime.now()
        self.journal.say(prediction(steps, needed_s, now, peak_gib, limit_gib, self._whose))
        wrong = objections(needed_s, allowed.left_s, allowed.length_s, now, peak_gib, limit_gib, self._whose)
        if wrong and config.training.strict_budget:
            raise ConfigError(f"training.strict_budget=true: {' '.join(wrong)}")
        for text in wrong:
            self.journal.say(f"warning: {text}")

    def _settle_mini_batch(self) -> int:
        """Return how many fields a rank takes at once, as asked, as the checkpoint has it, or as many as fit into memory; say what was chosen.

        Raises ConfigError, the same on every rank, where that does not fit.
        """
        training = self.config.training
        auto, kept = training.mini_batch_size == "auto", self.sampler_state.get("mini_batch_size")
        asked = kept if auto and kept and self.share % kept == 0 else None if auto else training.fixed_mini_batch or self.share
        limit_gib = self._limit_gib(enforced=asked is not None)

        def peak_after(fields: int) -> float:
            if fields:
                throw_away(self.model, self.group, lambda: self._throw_away_pass(fields))
            return self._peak_gib()

        def gather(passes: Footprint) -> list[Need]:
            peaks_gib = [passes.peak_gib(fields) + self._besides_passes_gib(fields) for fields in range(1, max(self.share, asked or 1) + 1)]
            return self.group.all_gather_object(Need(self._memory_of, peaks_gib, limit_gib))

        fields, peak_gib = settle(asked, self.share, training.memory_share, peak_after, gather, self._whose)
        if auto:
            filled = f"predicted to fill {gib(peak_gib)} of {gib(limit_gib)} GiB of a {self._whose}, of which it may fill {training.memory_share:.0%}"
            why = "as the run began with" if asked else filled
            self.journal.say(f"mini-batches of {fields} field{'s' * (fields > 1)} a rank, {self.share // fields} a step: {why}")
        return fields

    # Memory is that of the node, which its ranks share, or of the rank's own GPU.

    @property
    def _whose(self) -> str:
        return "node" if self.device.type == "cpu" else "GPU"

    @property
    def _memory_of(self) -> str:
        return self.group.host if self.device.type == "cpu" else f"{self.group.host}, rank {self.group.rank}"

    def _peak_gib(self) -> float:
        return peak_rss_gib() if self.device.type == "cpu" else peak_device_gib(self.device)

    def _limit_gib(self, enforced: bool = False) -> float:
        """Return what the node or the GPU may hold; with `enforced` not what Slurm has given us, but what the kernel would end us for."""
        if self.device.type == "cuda":
            return device_limit_gib(self.device)
        node_bytes = read_machine().memory_bytes
        return node_bytes / 2**30 if enforced else memory_limit_gib(node_bytes)

    def _besides_passes_gib(self, mini_batch_size: int) -> float:
        """Return what this rank will hold besides one pass, in GiB: fields that stand ready, those of the step in use that the pass has not, gradients
        that a step's later passes add to, the optimizer's state, and on the processor what comes with the first score.

        Validation and checkpoints need no more: a step's activations and gradients make room for them.
        """
        fields = max(self.config.data.prefetch * mini_batch_size, self.share) + self.share - mini_batch_size
        slots = SLOTS[self.config.training.optimizer] * (not self.optimizer.state)  # they come with the first step
        held = images_gib((fields, len(self.plan.channels), *self.plan.image_size), self.kernels.image_dtype.itemsize)
        held += optimizer_gib(sum(p.numel() for p in self.bare.parameters()), slots + (mini_batch_size < self.share))
        return held + (SCORES_GIB if self.device.type == "cpu" else 0)

    def _throw_away_pass(self, fields: int) -> None:
        shape = fields, len(self.plan.channels), *self.plan.image_size
        images = torch.zeros(shape, dtype=self.kernels.image_dtype, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)  # as the loader gives them
        with self.kernels.autocast():
            logits = self.model(images)
        self.objective.loss(logits, torch.zeros(len(images), dtype=torch.int64, device=self.device)).backward()

    def scores(self) -> tuple[Scores, Scores] | None:
        """Return the scores of the held-out fields and of their wells, with batch-norm statistics averaged over the ranks; None but on rank 0."""
        table = self.index.table
        val = (table["Metadata_Split"] == "val").to_numpy().nonzero()[0]
        rows = val[evaluation_rows(len(val), self.group.rank, self.group.world_size)]
        # What is ready for training stays so: no more beside it than keeps the threads at work, so that validation fits where a step does.
        enough = math.ceil(self.config.data.workers / self.mini_batch_size) or 1
        data = dataclasses.replace(self.config.data, prefetch=min(self.config.data.prefetch, enough))
        dtype = self.kernels.image_dtype
        loader = EvalLoader(self.index, rows, self.labels, self.preprocessing, data, self.mini_batch_size, self.sender, dtype)
        with buffers_swapped(self.bare, self.group.averaged_buffers(self.bare)):
            rows, labels, logits = predict(self.bare, loader, self.kernels, self.group)
        self.bad_fields |= loader.bad_fields
        if self.group.rank > 0:
            return None
        from hcsdl.training.metrics import score_fields, score_wells  # torchmetrics takes seconds to import

        seen = table.iloc[rows.numpy()]
        wells = list(zip(seen["Metadata_Plate"], seen["Metadata_Well"], strict=True))
        return score_fields(logits, labels, self.plan.classes), score_wells(logits, labels, wells, self.plan.classes)

    def evaluate(self, state: State) -> dict:
        """Return one line of the history: accuracies on the held-out part after `state.step` steps; say it. Empty but on rank 0."""
        self.last_scores, self.evaluated = self.scores(), True
        if self.last_scores is None:
            return {}
        fields, wells = self.last_scores
        found = {
            "step": state.step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "elapsed_s": round(state.elapsed_s, 3),
            "val_accuracy": fields.accuracy,
            "val_macro_f1": fields.macro_f1,
            "well_accuracy": wells.accuracy,
            "well_macro_f1": wells.macro_f1,
        }
        plan = self.plan
        both = (plan.baseline_well_accuracy, plan.baseline_accuracy)
        of_wells, of_fields = (f" (baseline {value:.3f})" if value is not None else "" for value in both)
        leaky = ", LEAKY" if plan.leaky else ""
        self.journal.say(
            f"epoch {found['epoch']:.2f}, step {state.step}: accuracy of wells {wells.accuracy:.3f}{of_wells}, of fields {fields.accuracy:.3f}{of_fields}, "
            f"macro-F1 {fields.macro_f1:.3f}, held out by {self.config.plates.split}{leaky}"
        )
        self.journal.event("evaluation", state.step, {k: v for k, v in found.items() if k != "step"})
        return found

    def save(self, state: State) -> None:
        """Write a checkpoint of this state (rank 0), with what every rank keeps for itself."""
        buffers = {name: buffer.detach().cpu().clone() for name, buffer in self.bare.named_buffers()}
        ranks = self.group.all_gather_object({"buffers": buffers} | random_state(self.device))
        averaged = self.group.averaged_buffers(self.bare)
        if self.group.rank > 0:
            return
        self.folder.check_newest()
        metric = self.config.training.metric
        scores = [entry[metric] for entry in state.history]
        path = save_checkpoint(
            Checkpoint(
                step=state.step,
                model=self._weights(averaged),
                optimizer=on_processor(self.optimizer.state_dict()),
                ranks=ranks,
                history=state.history,
                elapsed_s=state.elapsed_s,
                classes=self.plan.classes,
                channels=self.plan.channels,
                target=self.plan.target,
                image_size=self.plan.image_size,
                model_config=dataclasses.asdict(self.config.model),
                preprocessing=self.preprocessing.state_dict(),
                config=to_yaml(self.config),
                config_hash=config_hash(self.config),
                index_hash=self.plan.index_hash,
                backend=self.group.backend,
                ran_on=self._ran_on(),
                sampler={"step": state.step, "seed": self.config.seed, "mini_batch_size": self.mini_batch_size} | self.sampler.describe(),
            ),
            self.folder.checkpoints,
            keep=self.config.training.keep_checkpoints,
            best=bool(scores) and state.history[-1]["step"] == state.step and scores[-1] >= max(scores),
        )
        self.journal.event("checkpoint", state.step, {"file": path.name})

    def _weights(self, averaged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the network's state_dict as plain contiguous tensors on the processor, its floating-point buffers replaced by the averaged ones.

        They are copies only where they must be: write them before the next step.
        """
        return {name: averaged.get(name, value).detach().cpu().contiguous() for name, value in self.bare.state_dict().items()}

    def finish(self, seconds: float) -> None:
        """Write weights and summary, print the tables (rank 0)."""
        averaged = self.group.averaged_buffers(self.bare)
        rss, device = (max(one) for one in zip(*self.group.all_gather_object((peak_rss_gib(), peak_device_gib(self.device))), strict=True))
        bad = self.group.all_gather_object(self.loader.bad_fields | self.bad_fields)
        self.bad_fields = {name: reason for fields in bad for name, reason in sorted(fields.items())}
        if self.group.rank > 0:
            return
        self.folder.check_newest()
        release_freed_tensors()  # no step comes that would use their memory again
        write_atomically(self.folder.weights, safetensors.torch.save(self._weights(averaged)))
        rss = max(rss, peak_rss_gib())
        from hcsdl.training.metrics import format_scores

        assert self.last_scores is not None
        fields, wells = self.last_scores
        write_json(self.folder.summary, summarise(self, fields, wells, seconds, rss, device))
        self.journal.event("end", self.state.step, {"seconds": seconds})
        self.journal.close()
        plan, split = self.plan, self.config.plates.split
        print(format_scores(fields, split, leaky=plan.leaky, baseline=plan.baseline_accuracy))
        print(format_scores(wells, split, leaky=plan.leaky, baseline=plan.baseline_well_accuracy))
        print(f"run folder: {self.folder.path}", flush=True)
