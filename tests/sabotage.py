"""Do the tests notice? Breaks one line of the package at a time, in a copy, and demands that a named test fails.

    python tests/sabotage.py            all faults
    python tests/sabotage.py 3 17       only those
    python tests/sabotage.py --list     the table, without running anything

In: this checkout as it stands, uncommitted files included. Out: a table on standard output; exit code 1 where a fault survives. Promises:
the checkout is left alone; the named tests pass in the unbroken copy; what is imported there is the copy; a fault counts as caught only where
its test fails in an assertion or with the error it names, so that a line that does not even import is no success. Run by hand: minutes.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SEEN = re.compile(r"assert |AssertionError|Failed: DID NOT RAISE")
"""How pytest's last line names a test that has noticed something; whatever else a fault may raise stands in its `error`."""


@dataclass(frozen=True)
class Fault:
    """One line made wrong: `old`, which must stand once in `file`, becomes `new`; then `test` must fail, or raise `error`."""

    what: str
    file: str
    old: str
    new: str
    test: str
    error: str = ""


FAULTS = [
    Fault(
        "compressed images are read upside down", "hcsdl/data/reading.py",
        "out[...] = page.asarray()", "out[...] = page.asarray()[::-1]",
        "tests/data/test_reading.py::test_pixels_come_back",
    ),
    Fault(
        "flips reach the first channel only", "hcsdl/data/conversion.py",
        "return window[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]",
        "return np.concatenate([window[:1, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1], window[1:]])",
        "tests/data/test_preprocessing.py::test_apply_is_what_it_promises_in_every_orientation",
    ),
    Fault(
        "intensities are scaled by all wells, not by the controls", "hcsdl/data/preprocessing.py",
        '(index.table["Metadata_Compound"] == base.control).to_numpy()', '(index.table["Metadata_Compound"] != "").to_numpy()',
        "tests/data/test_preprocessing.py::test_plate_without_controls_takes_the_others_together_and_is_listed",
    ),
    Fault(
        "ranks draw different changes for the same field", "hcsdl/data/loading.py",
        "return draw_augmentation(self.config, self.seed, epoch, name, shape)",
        "return draw_augmentation(self.config, self.seed + self.rank, epoch, name, shape)",
        "tests/data/test_loading.py::test_tensors_are_equal_for_any_number_of_workers_and_ranks",
    ),
    Fault(
        "held-out fields are changed at random too", "hcsdl/data/loading.py",
        "-> None:\n        return None", "-> None:\n        return draw_augmentation(self.config, 0, epoch, name, shape)",
        "tests/data/test_loading.py::test_evaluation_has_each_field_once_as_it_is",
    ),
    Fault(
        "a resumed run begins its pass anew", "hcsdl/data/loading.py",
        "for step in range(self.first_step, self.last_step):", "for step in range(self.last_step - self.first_step):",
        "tests/data/test_loading.py::test_resumed_in_mid_epoch_the_order_goes_on",
    ),
    Fault(
        "the ranks' shares overlap", "hcsdl/data/sampling.py",
        "return rows[rank * share : (rank + 1) * share], epochs[rank * share : (rank + 1) * share]",
        "return rows[rank : rank + share], epochs[rank : rank + share]",
        "tests/data/test_sampling.py::test_any_sizes_every_field_once_a_pass_and_shares_make_the_global_batch",
    ),
    Fault(
        "sites of a well stand on both sides of the split", "hcsdl/plates/splits.py",
        '"random_well": KEYS[:2]', '"random_well": KEYS',
        "tests/plates/test_splits.py::test_wells_stay_together_unless_leaky",
    ),
    Fault(
        "every fold holds out the same compound", "hcsdl/plates/splits.py",
        "{members[fold] for members", "{members[0] for members",
        "tests/plates/test_splits.py::test_compound_folds",
    ),
    Fault(
        "mechanisms are joined by compound, whatever the concentration", "hcsdl/plates/tables.py",
        'return compounds + "\\n" + concentrations.map("{:g}".format)', 'return compounds + "\\n" + concentrations.map("".format)',
        "tests/plates/test_index.py::test_no_moa_fits",
    ),
    Fault(
        "M-CNN's columns see averages, not maxima", "hcsdl/models/mcnn.py",
        "self.halve = nn.MaxPool2d(2)", "self.halve = nn.AvgPool2d(2)",
        "tests/models/test_mcnn.py::test_same_as_its_plain_description",
    ),
    Fault(
        "gradients are not averaged over the ranks", "hcsdl/distributed/group.py",
        "if self.world_size == 1:\n            return model", "if self.world_size >= 1:\n            return model",
        "tests/distributed/test_group.py::test_gradients_are_those_of_the_joined_batch",
    ),
    Fault(
        "batch-norm statistics are not averaged over the ranks", "hcsdl/distributed/group.py",
        "flat = self.all_reduce(torch.cat([b.flatten() for b in buffers.values()])) / self.world_size",
        "flat = torch.cat([b.flatten() for b in buffers.values()])",
        "tests/distributed/test_group.py::test_collectives_over_three_ranks",
    ),
    Fault(
        "a rank does not get its own statistics back after an evaluation", "hcsdl/training/predict.py",
        "_copy(model, own)", "_copy(model, buffers)",
        "tests/training/test_predict.py::test_swapped_buffers_come_back_bit_for_bit",
    ),
    Fault(
        "fields are predicted in training mode", "hcsdl/training/predict.py",
        "model.eval()", "model.train()",
        "tests/training/test_predict.py::test_every_row_once_in_order",
    ),
    Fault(
        "accumulated gradients are summed, not averaged", "hcsdl/training/loop.py",
        "loss = parts.objective.loss(logits, batch.labels) / len(batches)", "loss = parts.objective.loss(logits, batch.labels)",
        "tests/training/test_loop.py::test_a_step_follows_the_gradient_of_the_mean_over_all_mini_batches",
    ),
    Fault(
        "a gradient that is not a number moves the weights", "hcsdl/training/loop.py",
        "if bad_loss or bad_norm:", "if bad_loss:",
        "tests/training/test_loop.py::test_a_step_that_is_not_finite_moves_nothing",
    ),
    Fault(
        "the schedule is one step too long", "hcsdl/training/schedules.py",
        "decay_steps = total_steps - 1 - warmup_steps", "decay_steps = total_steps - warmup_steps",
        "tests/training/test_schedules.py::test_corners",
    ),
    Fault(
        "norms and biases are decayed", "hcsdl/training/optimizers.py",
        '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}',
        "tests/training/test_optimizers.py::test_norms_and_biases_are_not_decayed",
    ),
    Fault(
        "a well has the logits of one of its sites", "hcsdl/training/metrics.py",
        ".index_add_(0, well, logits.float().cpu())", ".index_copy_(0, well, logits.float().cpu())",
        "tests/training/test_metrics.py::test_a_well_is_the_mean_of_its_sites",
    ),
    Fault(
        "files are written in place", "hcsdl/training/run_folder.py",
        'temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")', "temporary = path",
        "tests/training/test_run_folder.py::test_writing_is_whole_or_not_at_all", error="FileNotFoundError",
    ),
    Fault(
        "two runs may write one folder", "hcsdl/training/run_folder.py",
        "fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/training/test_run_folder.py::test_second_writer_is_refused_and_a_dead_ones_lock_taken_over",
    ),
    Fault(
        "a checkpoint's checksums are not looked at", "hcsdl/training/checkpoint.py",
        "if broken := archive.testzip():", "if broken := None:",
        "tests/training/test_checkpoint.py::test_a_broken_checkpoint_is_passed_over_and_said",
    ),
    Fault(
        "a failing rank's exit code is lost", "hcsdl/distributed/launcher.py",
        'return code, "" if 0 in own', 'return 0, "" if 0 in own',
        "tests/distributed/test_launcher.py::test_a_failing_rank_ends_the_others",
    ),
    Fault(
        "a resumed run forgets its momentum", "hcsdl/commands/resume.py",
        "optimizer.load_state_dict(checkpoint.optimizer)", "pass",
        "tests/system/test_resume.py::test_signal_finishes_the_step_saves_and_exits_75[SIGUSR1]",
    ),
    Fault(
        "time in which a rank was itself suspended counts as the others' silence", "hcsdl/distributed/heartbeat.py",
        "passed_s, before = min(now - before, self._beat_s), now", "passed_s, before = now - before, now",
        "tests/distributed/test_heartbeat.py::test_of_ranks[a_rank_that_was_itself_suspended_accuses_nobody]", error="BrokenPipeError",
    ),
    Fault(
        "who waits for a stuck rank is taken for stuck, too", "hcsdl/distributed/heartbeat.py",
        "for rank, peer in self._peers.items() if peer.notes == fewest}", "for rank, peer in self._peers.items() if peer.notes < self._note[0]}",
        "tests/distributed/test_heartbeat.py::test_of_ranks[a_rank_that_beats_but_stays_behind_is_stuck_inside_a_step_only]",
    ),
    Fault(
        "cores kept aside are computed on", "hcsdl/machine/placement.py",
        "split = max(0, len(cores) - config.spare_cores)", "split = len(cores)",
        "tests/machine/test_placement.py::test_spare_cores_are_the_last_of_each_node",
    ),
    Fault(
        "communication does not hold computing up in the prediction", "hcsdl/distributed/scaling.py",
        "done = min(timeline.backward_s, done + together * overlap.compute_rate)", "done = min(timeline.backward_s, done + together)",
        "tests/distributed/test_scaling.py::test_computing_and_communicating_hold_each_other_up",
    ),
    Fault(
        "a copy is kept although its source has changed", "hcsdl/data/staging.py",
        "return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)", "return one.st_size == other.st_size",
        "tests/data/test_staging.py::test_a_later_run_copies_only_what_is_missing_or_has_changed",
    ),
    Fault(
        "a stopped job does not go back into the queue", "hcsdl/commands/slurm.py",
        "return code in (ExitCode.STOPPED, *RESTARTED) and", "return code in RESTARTED and",
        "tests/commands/test_sweep.py::test_a_job_goes_back_into_the_queue_only_where_that_can_help",
    ),
    Fault(
        "collectives are done last come, first served", "hcsdl/distributed/oneccl/work.py",
        "self._queue: SimpleQueue[Work | None] = SimpleQueue()", 'self._queue = __import__("queue").LifoQueue()',
        "tests/distributed/test_oneccl.py::test_collectives_in_flight_keep_order_and_tensors",
    ),
    Fault(
        "gradients sent as bf16 are summed, not averaged", "hcsdl/distributed/compression.py",
        "sent = (buffer / dist.get_world_size(group)).to(torch.bfloat16)", "sent = buffer.to(torch.bfloat16)",
        "tests/distributed/test_backends.py::test_gradients_sent_as_bf16_are_the_mean_to_rounding_and_alike_on_all_ranks",
    ),
    Fault(
        "the wait for the other ranks is no communication", "hcsdl/training/step_time.py",
        "exposed + agreement_s, optimizer_s]", "exposed, optimizer_s]",
        "tests/training/test_step_time.py::test_communication_is_what_passes_take_longer_than_alone_and_the_wait_before",
    ),
    Fault(
        "a shortcut of our blocks goes through a ReLU", "hcsdl/kernels/replacement.py",
        "batch_norm_relu(convolution(x), norm, relu=False)", "batch_norm_relu(convolution(x), norm)",
        "tests/kernels/test_replacement.py::test_evaluation_and_inference_are_the_plain_networks",
    ),
    Fault(
        "batch norm's backward pass forgets the mean of the gradient", "hcsdl/kernels/native/batch_norm.c",
        "mean_dz[i] = sums[i - start] / rows;", "mean_dz[i] = 0;",
        "tests/kernels/test_batch_norm.py::test_numbers_and_gradients_are_those_of_the_twin",
    ),
    Fault(
        "a shortcut's gradient is added unrounded", "hcsdl/kernels/native/batch_norm.c",
        "g = as_stored((pair){g.low + more.low, g.high + more.high}, type);", "g = (pair){g.low + more.low, g.high + more.high};",
        "tests/kernels/test_batch_norm.py::test_two_gradients_are_added_as_autograd_adds_them",
    ),
    Fault(
        "what recomputation keeps keeps itself", "hcsdl/models/layers.py",
        "return kept[-1].data", "return kept[-1]",
        "tests/kernels/test_replacement.py::test_what_is_kept_goes_with_the_graph",
    ),
    Fault(
        "the stem's statistics move twice a step", "hcsdl/models/resnet.py",
        "images, buffers_of=self.bn1)", "images, buffers_of=self.conv1)",
        "tests/models/test_models.py::test_recomputed_activations_change_nothing",
    ),
    Fault(
        "fused optimizers take any memory format", "hcsdl/kernels/__init__.py",
        "        _lay_out_alike(moving)\n", "",
        "tests/kernels/test_replacement.py::test_optimizers_move_weights_as_without",
    ),
    Fault(
        "the filter of an input's gradient is not turned round", "hcsdl/kernels/native/winograd.c",
        "w + (turned ? 8 - k : k) * step", "w + k * step",
        "tests/kernels/test_winograd.py::test_errors_are_at_most_about_twice_those_of_torchs_bf16",
    ),
    Fault(
        "recomputation makes our convolutions again", "hcsdl/models/layers.py",
        '("aten::convolution", "hcsdl::convolution")', '("aten::convolution",)',
        "tests/models/test_models.py::test_selective_keeps_what_costs_much",
    ),
    Fault(
        "a damaged library is loaded", "hcsdl/kernels/native/build.py",
        "return whole and about.st_uid", "return about.st_uid",
        "tests/kernels/test_build.py::test_a_damaged_or_foreign_file_is_made_anew", "OSError",
    ),
    Fault(
        "a batch norm's mean is lost when it is folded", "hcsdl/kernels/inference.py",
        "setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))",
        "setattr(parent, before[0], fuse_conv_bn_eval(before[1], child) if child.running_mean.zero_() is not None else None)",
        "tests/kernels/test_inference.py::test_folded_is_the_plain_network",
    ),
    Fault(
        "short mini-batches are not filled up", "hcsdl/training/predict.py",
        "if missing > 0:", "if missing > len(batch.images):",
        "tests/training/test_predict.py::test_short_mini_batches_are_filled_up_and_cut_again",
    ),
    Fault(
        "a plate of the same name is taken for the run's own", "hcsdl/commands/embed.py",
        "    for column in compared:", "    for column in []:",
        "tests/commands/test_embed.py::test_plates_of_the_same_name_with_other_images_are_not_the_runs",
    ),
    Fault(
        "a well with trained fields is called held out", "hcsdl/training/embeddings.py",
        'np.where(trained, "train",', 'np.where(~trained, "train",',
        "tests/training/test_embeddings.py::test_wells_are_the_means_of_their_fields",
    ),
    Fault(
        "bright pixels are negative on a GPU", "hcsdl/data/sending.py",
        "bits.int().bitwise_and_(0xFFFF).float()", "bits.float()",
        "tests/data/test_sending.py::test_the_numbers_are_those_of_apply",
    ),
]  # fmt: skip


def copied(folder: Path) -> Path:
    """Copy the checkout's files (tracked, and new ones that git does not ignore) into `folder`; return where they are."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    root = folder / "checkout"
    for name in filter(None, names):
        if (HERE / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HERE / name, root / name)
    (root / "hcsdl" / "conf").symlink_to(root / "conf")  # setup.cfg maps hcsdl.conf to conf: found here before the installed package's
    return root


def python(root: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python in the copy, which comes before an installed package; no byte code is kept, so that a changed line is seen at once."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, check=False)


def pytest(root: Path, *tests: str) -> subprocess.CompletedProcess:
    """Run tests of the copy, to the first that fails."""
    return python(root, "-m", "pytest", "-x", "-q", "-rfEsx", "--durations=0", "--tb=short", "-p", "no:cacheprovider", *tests)


def whats_imported(root: Path) -> str:
    """Return the file of `hcsdl` as tests in the copy import it; ends the program where it, or its configuration, is not the copy's."""
    script = "import hcsdl, importlib.util as u; print(hcsdl.__file__, *u.find_spec('hcsdl.conf').submodule_search_locations)"
    package, conf = (Path(word).resolve() for word in python(root, "-c", script).stdout.split())
    if root not in package.parents or root not in conf.parents:
        raise SystemExit(f"the copy must be imported. hcsdl is {package}, hcsdl.conf {conf}, and not in {root}.")
    return str(package)


def last_words(done: subprocess.CompletedProcess) -> str:
    """Return the reason in pytest's first line on a failed test; empty where none failed."""
    for line in done.stdout.splitlines():
        if line.startswith("FAILED "):
            return line.partition(" - ")[2] or line
    return ""


def judged(fault: Fault, done: subprocess.CompletedProcess) -> tuple[bool, str]:
    """Return whether a fault was caught, and pytest's reason."""
    said = last_words(done)
    if done.returncode == 0:
        return False, "the test passes"
    if done.returncode != 1 or not said:
        return False, f"pytest ended with {done.returncode}: {' '.join(done.stdout.split())[-200:]}"
    if SEEN.match(said) or (fault.error and fault.error in said):
        return True, said
    return False, f"not by an assertion: {said}"


def tried(fault: Fault, root: Path) -> tuple[bool, str]:
    """Break one line in the copy, run its test, and mend it."""
    path = root / fault.file
    text = path.read_text()
    broken = text.replace(fault.old, fault.new)
    if path.suffix == ".py":
        ast.parse(broken, str(path))
    path.write_text(broken)
    try:
        return judged(fault, pytest(root, fault.test))
    finally:
        path.write_text(text)


def checked(faults: list[Fault], root: Path) -> None:
    """End the program where a fault's text does not stand once in its file, or a named test does not pass in the unbroken copy."""
    for fault in faults:
        if (count := (root / fault.file).read_text().count(fault.old)) != 1:
            raise SystemExit(f"a fault's text must stand once in its file. {fault.file} has {count} times: {fault.old}")
    done = pytest(root, *dict.fromkeys(fault.test for fault in faults))
    if done.returncode or " skipped" in done.stdout:
        raise SystemExit(
            f"every named test must pass, and not be skipped, in the unbroken copy.\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
        )


def main() -> int:
    """Try the faults asked for; return 1 where one survives."""
    parser = argparse.ArgumentParser(description="Break one line at a time and see whether its test notices.")
    parser.add_argument("numbers", nargs="*", type=int, help=f"faults to try, 1 to {len(FAULTS)}; none: all")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    asked = parser.parse_args()
    if wrong := [number for number in asked.numbers if not 1 <= number <= len(FAULTS)]:
        parser.error(f"faults are numbered 1 to {len(FAULTS)}. Got {wrong[0]} instead.")
    numbers = asked.numbers or list(range(1, len(FAULTS) + 1))
    if asked.list:
        for number in numbers:
            print(f"{number:2d}  {FAULTS[number - 1].what}  ({FAULTS[number - 1].file}; {FAULTS[number - 1].test})")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="hcsdl-sabotage-") as folder:
        root = copied(Path(folder).resolve())
        print("imported:", whats_imported(root), flush=True)
        checked([FAULTS[number - 1] for number in numbers], root)
        print("the named tests pass in the unbroken copy\n\n| no. | fault | file | caught by | s |\n|---|---|---|---|---|", flush=True)
        for number in numbers:
            fault, begun = FAULTS[number - 1], time.monotonic()
            caught, said = tried(fault, root)
            by = fault.test.removeprefix("tests/") if caught else f"SURVIVES: {said}"
            print(f"| {number} | {fault.what} | {fault.file} | {by} | {time.monotonic() - begun:.0f} |", flush=True)
            print(f"    {said[:300]}", file=sys.stderr, flush=True)
            if not caught:
                survivors.append(number)
    print(f"\n{len(numbers) - len(survivors)} of {len(numbers)} faults caught" + (f", not {survivors}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
