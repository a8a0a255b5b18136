"""A finished run → its `summary.json`: what was asked, what came out, how fast, on what."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hcsdl.commands.compose import config_hash
from hcsdl.kernels.device import device_name
from hcsdl.machine.cores import processor
from hcsdl.training.run_folder import SCHEMA_VERSION
from hcsdl.training.summary import git_commit, time_to_accuracy, versions

if TYPE_CHECKING:
    from hcsdl.commands.run import Run
    from hcsdl.training.metrics import Scores


def summarise(run: Run, fields: Scores, wells: Scores, seconds: float, rss: float, device: float) -> dict:
    """Return the summary of `run`: scores of the held-out `fields` and `wells`, `seconds` of this attempt, `rss` and `device` the largest rank's
    peaks of memory and GPU memory in GiB."""
    state, plan, config = run.state, run.plan, run.config
    timed = state.seconds_timed or math.nan
    timed_steps = state.fields_timed // config.training.global_batch_size
    return {
        "schema_version": SCHEMA_VERSION,
        "name": config.name,
        "target": plan.target,
        "classes": plan.classes,
        "channels": plan.channels,
        "metric": config.training.metric,
        "split": config.plates.split,
        "split_sentence": plan.split_sentence,
        "leaky": plan.leaky,
        "val_accuracy": fields.accuracy,
        "val_macro_f1": fields.macro_f1,
        "well_accuracy": wells.accuracy,
        "well_macro_f1": wells.macro_f1,
        "baseline_accuracy": plan.baseline_accuracy,
        "baseline_well_accuracy": plan.baseline_well_accuracy,
        "per_class": fields.per_class.to_dict("records"),
        "confusion_fields": fields.confusion.tolist(),
        "confusion_wells": wells.confusion.tolist(),
        "num_fields": len(run.index.table),
        "num_val_fields": plan.num_val_fields,
        "num_wells_val": plan.num_wells_val,
        "skipped_fields": sorted({*plan.skipped_fields, *run.bad_fields}),
        "plates_without_control": plan.plates_without_control,
        **run.sampler.describe(),
        "model": config.model.name,
        "num_parameters": sum(p.numel() for p in run.bare.parameters()),
        "image_size": plan.image_size,
        "images_per_s": state.fields_timed / timed,
        "data_wait_share": state.waited_s / timed,
        "step_seconds": {name: value / max(1, timed_steps) for name, value in state.parts_s.items()},
        "epochs": state.step / run.steps_per_epoch,
        "steps": state.step,
        "planned_steps": run.planned_steps,
        "seconds": seconds,
        "training_seconds": state.elapsed_s,
        "time_to_accuracy_s": time_to_accuracy(state.history, "val_accuracy"),
        "time_to_well_accuracy_s": time_to_accuracy(state.history, "well_accuracy"),
        "history": state.history,
        "world_size": run.group.world_size,
        "threads_per_rank": run.threads,
        "global_batch_size": config.training.global_batch_size,
        "backend": run.group.backend,
        "backend_reason": run.group.backend_reason,
        "gradient_dtype": config.distributed.gradient_dtype,
        "kernels": run.kernels.name,
        "kernels_reason": run.kernels.reason,
        "precision": run.kernels.precision,
        "allocator": run.allocator,
        "peak_rss_gib": rss,
        "device": run.device.type,
        "device_name": device_name(run.device),
        "peak_device_gib": device,
        "resumed": run.resumed,
        "attempts": run.folder.attempt,
        "versions": versions(),
        "processor": processor(),
        "git_commit": git_commit(),
        "config_hash": config_hash(config),
        "index_hash": plan.index_hash,
        "seed": config.seed,
    }
