"""`hcsdl embed`, the launcher's role: which run, which plates, where the table goes, and what is prepared before the ranks start.

In: a validated `EmbedCommand`. Out: an exit code, and a table by default in the run folder, from where `hcsdl score` knows what the network saw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from hcsdl.commands.compose import from_yaml, to_yaml, values
from hcsdl.commands.launch import Job, run_job
from hcsdl.commands.prepare import Plan, load_plan, measured, most_ranks, ranks_asked_for, usable_cache
from hcsdl.config import ConfigError, DataError, EmbedCommand, ScreenConfig, TrainCommand
from hcsdl.data.preprocessing import Preprocessing, extend, set_aside
from hcsdl.distributed.slurm import this_job
from hcsdl.machine.binding import affinity_kept
from hcsdl.machine.cores import usable_cores
from hcsdl.machine.placement import Place, plan_places
from hcsdl.machine.topology import read_machine
from hcsdl.plates.index import Index, find_images, load_index, read_index, root_folder
from hcsdl.plates.tables import KEYS, find_csv
from hcsdl.profiles.provenance import find_provenance
from hcsdl.training.embeddings import WorkFolder, read_about
from hcsdl.training.run_folder import RunFolder, write_atomically, write_json

log = logging.getLogger(__name__)

# What may differ when an embedding goes on: where and how it is computed, not what comes out.
MAY_CHANGE = (
    *("checkpoint", "embed.output", "embed.save_every_s", "machine.", "distributed.", "data.workers", "data.prefetch", "plates.cache"),
    "plates.pixel_size_um",
)


def run(config: EmbedCommand) -> int:
    """Embed, from the beginning or from where the folder beside the table stands; return the exit code."""

    @functools.cache
    def known() -> tuple[EmbedCommand, RunFolder]:
        """Return the completed settings and the run; not asked for before one rank alone opens the folder, so that an error is told once."""
        training = training_run(config.checkpoint)
        return completed(config, training), training

    return run_job(
        Job(
            "embed",
            config,
            places=lambda: plan_ranks(config),
            check=lambda ranks: None,
            open=lambda: open_work_folder(known()[0]),
            finished=lambda folder: finished(folder, *known()),
            prepare=lambda folder: prepare_or_remove(folder, *known()),
        )
    )


def training_run(checkpoint: str | None) -> RunFolder:
    """Return the run folder that `checkpoint` is or lies in. Raises ConfigError where there is none."""
    if checkpoint is None:
        raise ConfigError("checkpoint must be a run folder, or a checkpoint file in one. Got null instead; set checkpoint=runs/….")
    path = Path(checkpoint).absolute()
    if not path.exists():
        raise ConfigError(f"checkpoint must be a run folder, or a checkpoint file in one. There is nothing at {checkpoint}.")
    run = RunFolder(path if path.is_dir() else path.parent.parent)
    for needed in (run.config, run.plan, run.index):
        if not needed.is_file():
            raise ConfigError(
                f"checkpoint must be a run folder, or a checkpoint file in one, for there stands what the network saw. {run.path} has no "
                f"{needed.name}: name the folder that `hcsdl train` made, or copy it whole."
            )
    return run


def completed(config: EmbedCommand, training: RunFolder) -> EmbedCommand:
    """Return the settings with the run's own plates where none are given, and with the table's name."""
    trained: TrainCommand = from_yaml("train", training.config.read_text(encoding="utf-8"))  # type: ignore[assignment]
    plates, own = config.plates, trained.plates
    if plates.root is None:
        plates = ScreenConfig(
            trained_root(training, str(own.root)),
            plates.cache or own.cache,
            plates.query or own.query,
            own.control,
            plates.pixel_size_um or own.pixel_size_um,
        )
    plates = replace(plates, root=str(Path(str(plates.root)).expanduser().absolute()))
    output = (
        Path(config.embed.output) if config.embed.output else training.path / "embeddings" / f"{default_name(config, plates.root)}.parquet"
    )
    if output.suffix != ".parquet":
        raise ConfigError(f"embed.output must end in .parquet. Got {output} instead.")
    return replace(config, plates=plates, embed=replace(config.embed, output=str(output.absolute())))


def trained_root(training: RunFolder, given: str) -> str:
    """Return the folder of a run's plates, `given` in its settings; where that is relative, as it was where the training was started."""
    about = training.index.with_suffix(".json")
    if Path(given).expanduser().is_absolute() or not about.is_file():
        return given
    kept = json.loads(about.read_text(encoding="utf-8"))["root"]
    return kept if Path(kept).is_dir() else given


def default_name(config: EmbedCommand, root: str) -> str:
    """Return what a table is called: the plates' folder, and what else was asked for that is not the usual."""
    parts = [Path(root).absolute().name or "plates"]
    path = Path(str(config.checkpoint))
    if path.is_file():
        parts.append(path.stem)
    if config.embed.weights == "random":
        parts.append(f"random{config.seed}")
    if config.embed.by == "well":
        parts.append("wells")
    return "_".join(parts)


def plan_ranks(config: EmbedCommand) -> tuple[Place, ...]:
    """Return the place of each rank to start here, by default as many as in training."""
    machine, asked = read_machine(), ranks_asked_for(config.distributed)
    most = most_ranks(config.machine, machine, asked)
    return plan_places(machine, asked or most, config.machine)


def work_folder(config: EmbedCommand) -> WorkFolder:
    """Return the folder in which the table of a command is made, whether or not its settings are completed."""
    return WorkFolder(Path(str(completed(config, training_run(config.checkpoint)).embed.output)).with_suffix(".work"))


def open_work_folder(config: EmbedCommand) -> WorkFolder:
    """Return the folder in which the table is made, locked for us."""
    if Path(str(config.embed.output)).is_dir():
        raise ConfigError(f"embed.output must be a file. {config.embed.output} is a folder.")
    folder, job = work_folder(config), this_job()
    folder.acquire((job.number, job.restarts) if job else ("", 0))
    return folder


def finished(folder: WorkFolder, config: EmbedCommand, training: RunFolder) -> bool:
    """Return whether the table is there as asked for, saying so. Raises ConfigError where the table or the work begun is another one."""
    output = Path(config.embed.output)
    if output.exists():
        folder.remove()
        about = read_about(output)
        if about is None or about["config"] != deciding(config) or about["checkpoint_sha256"] != sha256(find_file(config, training)):
            raise ConfigError(
                f"embed.output must be new, or what the same command made. {output} is another table: remove it, or name another embed.output."
            )
        log.info("%s is there already, of %s. Nothing to do; remove it to embed anew.", output, about["checkpoint"])
        return True
    if folder.config.exists():
        before = deciding(from_yaml("embed", folder.config.read_text(encoding="utf-8")))  # type: ignore[arg-type]
        changed = [f"{key} was {before[key]!r} and is {value!r}" for key, value in deciding(config).items() if before[key] != value]
        if changed:
            raise ConfigError(
                f"an embedding goes on with its own settings. In {folder.path} {', '.join(changed[:3])}; name another embed.output, or "
                "remove that folder."
            )
        if folder.plan.exists():
            _go_on(json.loads(folder.plan.read_text(encoding="utf-8")), folder, config, training)
    return False


def _go_on(begun: dict, folder: WorkFolder, config: EmbedCommand, training: RunFolder) -> None:
    """Say with which checkpoint an embedding goes on: the one it began with, though the run may have a later one by now.

    Raises ConfigError where another is asked for.
    """
    path = Path(str(config.checkpoint)).absolute()
    named = path if path.is_file() else training.checkpoints / begun["checkpoint"]
    if named.is_file():
        same = sha256(named) == begun["checkpoint_sha256"]
    else:  # the run has dropped it since
        same = begun["run"] == str(training.path.resolve())
    if not same or (path.is_dir() and not begun["checkpoint"].startswith("step-")):
        raise ConfigError(
            f"an embedding goes on with the checkpoint it began with. In {folder.path} that was {begun['checkpoint']} of {begun['run']}, and not "
            f"what {config.checkpoint} is now; name another embed.output, or remove that folder."
        )
    log.info("going on with %s, as begun.", begun["checkpoint"])


def deciding(config: EmbedCommand) -> dict[str, object]:
    """Return the settings that decide what comes out, by key."""
    return {key: value for key, value in values(config).items() if not key.startswith(MAY_CHANGE)}


def find_file(config: EmbedCommand, training: RunFolder) -> Path:
    """Return the checkpoint file that is asked for. Raises DataError where the run has none yet."""
    path = Path(str(config.checkpoint)).absolute()
    if path.is_file():
        return path
    files = sorted(training.checkpoints.glob("step-*.pt"))
    if not files:
        raise DataError(f"a run folder must hold a checkpoint to embed with. {training.checkpoints} holds none: train first.")
    return files[-1]


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_or_remove(folder: WorkFolder, config: EmbedCommand, training: RunFolder) -> None:
    """Call `prepare_embedding`; where it fails before anything was computed, leave no folder behind."""
    try:
        prepare_embedding(folder, config, training)
    except BaseException:
        if not folder.last_saved():
            folder.remove()
        raise


def prepare_embedding(folder: WorkFolder, config: EmbedCommand, training: RunFolder) -> None:
    """Write checkpoint, index with measurements, preprocessing and plan into the folder, and the configuration last. Raises DataError, ConfigError."""
    goes_on = folder.config.exists() and folder.plan.exists() and folder.checkpoint.exists()
    if not goes_on:
        source = find_file(config, training)
        shutil.rmtree(folder.parts)
        folder.parts.mkdir()
        folder.checkpoint.unlink(missing_ok=True)
        link_or_copy(source, folder.checkpoint)
    with affinity_kept():
        from hcsdl.training.checkpoint import load_checkpoint  # imports torch
    try:
        checkpoint = load_checkpoint(folder.checkpoint)
    except DataError as error:  # of our link to it, which goes when nothing comes of it
        raise DataError(str(error).replace(str(folder.checkpoint), str(find_file(config, training)))) from error
    trained: TrainCommand = from_yaml("train", training.config.read_text(encoding="utf-8"))  # type: ignore[assignment]
    plan, run_index = load_plan(training.plan), load_index(training.path)
    if (checkpoint.classes, list(checkpoint.channels)) != (plan.classes, list(run_index.channels)):
        raise DataError(
            f"a checkpoint must be of the run it lies in. {find_file(config, training)} is of {len(checkpoint.classes)} classes "
            f"({_some(checkpoint.classes)}) and channels {', '.join(checkpoint.channels)}, the run of {len(plan.classes)} ({_some(plan.classes)}) "
            f"and {', '.join(run_index.channels)}: name a checkpoint of {training.path}."
        )

    index, skipped = fields_to_embed(config, folder)
    fitted = Preprocessing.from_state_dict(checkpoint.preprocessing)
    own = own_plates(index, run_index, set(fitted.plates))
    index = replace(index, table=index.table.assign(Metadata_Split=known_split(index.table, run_index.table, own)))
    index = index.select(np.arange(len(index.table)))  # whose hash counts the split
    if goes_on and index.hash != (before := json.loads(folder.plan.read_text(encoding="utf-8")))["index_hash"]:
        raise DataError(
            f"an embedding goes on with the fields it began with. The index was {before['index_hash']} and is {index.hash}: "
            f"the plates have changed; remove {folder.path} to begin anew."
        )
    if not goes_on:
        strange = [plate for plate in dict.fromkeys(index.table["Metadata_Plate"]) if plate not in own]
        if strange:
            log.info("%d of %d plates are not of the run: their intensities are fitted here, as the run's were.",
                     len(strange), index.table["Metadata_Plate"].nunique())  # fmt: skip
        extended = extend(set_aside(fitted, strange), index, True, usable_cores(), config.data.on_bad_image == "skip")
        extended.save(folder.preprocessing)
        about = provenance(config, training, trained, plan, checkpoint.step)
        about |= {"checkpoint": source.name, "checkpoint_sha256": sha256(folder.checkpoint)}
        about |= {"skipped_fields": skipped, "new_plates": strange, "plates_root": str(index.root), "index_hash": index.hash}
        write_json(folder.plan, about)
    index.save(folder.path)
    write_atomically(folder.config, to_yaml(config).encode())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def link_or_copy(path: Path, new: Path) -> None:
    """Let `new` be the file `path`, which may then be removed."""
    try:
        os.link(path, new)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(path, new)


def fields_to_embed(config: EmbedCommand, folder: WorkFolder) -> tuple[Index, list[str]]:
    """Return the index of all usable fields, labelled or not, with `Intensity_*` and `Count_Nuclei`, and the names of fields that are skipped."""
    root = root_folder(config.plates)
    labels = find_csv(root, "moa") is not None
    index = read_index(config.plates, moa=labels, files=config.data.on_bad_image == "raise")
    if config.data.on_bad_image == "skip":
        index, _ = find_images(index)
    for note in [*index.notes, *([] if labels else ["There is no *_moa.csv: Metadata_MoA stays empty."])]:
        log.info("%s", note)
    index, features, skipped = measured(config.data, index, usable_cache(config.plates, folder), "pixels")
    simple = features[[c for c in features if c.startswith(("Intensity_", "Count_"))]]
    return replace(index, table=pd.concat([index.table, simple], axis=1)), skipped


def own_plates(index: Index, run: Index, fitted: set[str]) -> set[str]:
    """Return those plates of `index` that are plates of the run, and not others of the same name.

    In the run's own folder all of the fitted ones are. Elsewhere (the plates were moved, or are others) those are with whose fields in the run's
    index everything agrees: file names, and measurements where the run made them.
    """
    if index.root.resolve() == run.root.resolve():
        return set(index.table["Metadata_Plate"]) & fitted
    compared = [c for c in index.table if c in run.table and c.startswith("QC_")]
    names = [f"Path_{channel}" for channel in index.channels if f"Path_{channel}" in run.table]
    both = index.table[[*KEYS, *names, *compared]].merge(run.table[[*KEYS, *names, *compared]], on=KEYS, suffixes=("", " run"))
    same = np.ones(len(both), dtype=bool)
    for column in names:
        file, other = (both[c].str.rpartition("/")[2].str.lower() for c in (column, f"{column} run"))
        same &= (file == other).to_numpy()
    for column in compared:
        same &= ((both[column] == both[f"{column} run"]) | (both[column].isna() & both[f"{column} run"].isna())).to_numpy()
    agree = pd.Series(same).groupby(both["Metadata_Plate"]).all()
    return set(agree.index[agree]) & fitted


def known_split(table: pd.DataFrame, run: pd.DataFrame, own: set[str]) -> pd.Series:
    """Return "train" or "val" for the fields that were one of these in the run, None for the others."""
    split = run.set_index(KEYS)["Metadata_Split"]
    found = split.reindex(pd.MultiIndex.from_frame(table[KEYS])).to_numpy(dtype=object)
    known = table["Metadata_Plate"].isin(own).to_numpy() & pd.notna(found)
    return pd.Series(np.where(known, found, None), index=table.index, dtype=object)


def provenance(config: EmbedCommand, training: RunFolder, trained: TrainCommand, plan: Plan, step: int) -> dict:
    """Return, as plain values, what the table is of and what its network saw when it was trained; random weights saw nothing."""
    seen = find_provenance(training.weights) if config.embed.weights == "trained" else None
    return {
        "run": str(training.path.resolve()),
        "step": step,
        "weights": config.embed.weights,
        "by": config.embed.by,
        "seed": trained.seed if seen else config.seed,
        "target": plan.target,
        "trained": [{"target": part.target, "compounds": sorted(part.compounds)} for part in seen.trained] if seen else [],
        "complete": seen.complete if seen else True,
        "classes": plan.classes,
        "channels": plan.channels,
        "training_config": dataclasses.asdict(trained),
        "config": deciding(config),
    }
