"""What is done once before the ranks start: plates → index, split, measurements, baseline, fitted preprocessing, all in the run folder or the
cache. No torch, so that it is quick and a bad plate or setting is told at once.

In: a `TrainCommand` and a locked run folder. Out: a `Plan`, which the ranks read back from `plan.json`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hcsdl.config import ConfigError, DataError, DistributedConfig, LoadingConfig, MachineConfig, ScreenConfig, TrainCommand
from hcsdl.data.measure import breaks_training, measure_index
from hcsdl.data.preprocessing import fit_preprocessing
from hcsdl.data.reading import read_header
from hcsdl.data.sampling import Sampler
from hcsdl.distributed.identity import alone_in_step
from hcsdl.machine.cores import usable_cores
from hcsdl.machine.gpus import check_gpus
from hcsdl.machine.placement import Place, default_ranks, plan_places
from hcsdl.machine.topology import Machine, read_machine
from hcsdl.plates.index import Index, cache_folder, find_images, read_index
from hcsdl.plates.splits import LEAKY, describe, split_fields, target_column, target_labels
from hcsdl.training.run_folder import SCHEMA_VERSION, RunFolder, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What the launcher decided and the ranks obey; `plan.json`."""

    target: str
    classes: list[str]
    channels: list[str]
    image_size: list[int]
    split_sentence: str
    leaky: bool
    num_train_fields: int
    num_val_fields: int
    num_wells_val: int
    baseline_accuracy: float | None
    baseline_well_accuracy: float | None
    skipped_fields: list[str]
    plates_without_control: list[str]
    index_hash: str
    resume_from: str | None
    schema_version: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, dataclasses.asdict(self))


def load_plan(path: Path) -> Plan:
    """Return the plan that `Plan.save` wrote."""
    return Plan(**json.loads(path.read_text(encoding="utf-8")))


def plan_ranks(config: TrainCommand) -> tuple[Place, ...]:
    """Return the place of each rank to start here. Raises ConfigError where the global batch cannot be shared evenly.

    Unless asked for, ranks are one a NUMA node (two where there is one node of several cores) or one a GPU, fewer where the batch needs it, and one
    where this is the only task of an srun step: a task is a rank, however many there are.
    """
    machine, batch = read_machine(), config.training.global_batch_size
    ranks = ranks_asked_for(config.distributed)
    most = most_ranks(config.machine, machine, ranks)
    if ranks is None:
        mini = config.training.fixed_mini_batch
        ranks = next(
            (r for r in range(most, 0, -1) if batch % r == 0 and (not mini or batch // r % mini == 0)),
            1,
        )
    check_batch(config, ranks)
    return plan_places(machine, ranks, config.machine)


def most_ranks(config: MachineConfig, machine: Machine, asked: int | None) -> int:
    """Return the ranks to start here where none are `asked` for. Raises ConfigError where there are no GPUs for them."""
    return check_gpus(config, asked or 1) or default_ranks(machine, config.spare_cores)


def ranks_asked_for(distributed: DistributedConfig) -> int | None:
    """Return how many ranks the settings ask for here, or the only task of an srun step stands for; None where it is ours to choose."""
    if distributed.ranks is None and alone_in_step():
        log.info("one task of srun is one rank; distributed.ranks=… starts more in it.")
        return 1
    return distributed.ranks


def check_batch(config: TrainCommand, ranks: int) -> None:
    """Raise ConfigError where the global batch does not divide into equal mini-batches over `ranks` ranks."""
    batch, mini = config.training.global_batch_size, config.training.fixed_mini_batch
    if batch % ranks:
        raise ConfigError(
            f"training.global_batch_size must be a multiple of the number of ranks, {ranks}. Got {batch} instead: change it, or distributed.ranks."
        )
    if mini and (batch // ranks) % mini:
        raise ConfigError(f"training.mini_batch_size must divide a rank's share of the global batch, {batch // ranks}. Got {mini} instead.")


def prepare(config: TrainCommand, folder: RunFolder, resume_from: Path | None) -> None:
    """Do everything that comes before the ranks; write index, preprocessing and plan into the run folder. Raises ConfigError, DataError."""
    everything, index, target = labelled_index(config)
    cache = usable_cache(config.plates, folder)
    index, features, skipped = measured(config.data, index, cache, "pixels" if config.training.baseline else "files")
    split = split_column(config, index, target)
    index = replace(index, table=index.table.assign(Metadata_Split=split))
    index = index.select(split.notna())
    features = features[split.notna().to_numpy()].reset_index(drop=True)
    index.save(folder.path)

    table = index.table
    val, train = table[table["Metadata_Split"] == "val"], table[table["Metadata_Split"] == "train"]
    classes = sorted(train["Metadata_Class"].unique())
    make_sampler(config, index, classes)  # refuses a global batch larger than the fields, before anything is computed
    field_accuracy, well_accuracy = None, None
    if config.training.baseline:
        from hcsdl.training.baseline import baseline_scores  # scikit-learn takes a second to import

        simple = features[[c for c in features if c.startswith(("Intensity_", "Count_"))]]
        field_accuracy, well_accuracy = baseline_scores(simple, table, table["Metadata_Split"], "Class", config.plates.control)
    everything = everything.select([row for row in range(len(everything.table)) if everything.field_name(row) not in set(skipped)])
    preprocessing = fit_preprocessing(everything, config.data, config.plates.control, cache, True, usable_cores())
    preprocessing.save(folder.preprocessing)
    shape, _ = read_header(index.paths(0)[0])
    plan = Plan(
        target=target,
        classes=classes,
        channels=list(index.channels),
        image_size=list(preprocessing.output_shape((len(index.channels), *shape))[1:]),
        split_sentence=describe(config.plates.split),
        leaky=config.plates.split in LEAKY,
        num_train_fields=len(train),
        num_val_fields=len(val),
        num_wells_val=val.groupby(["Metadata_Plate", "Metadata_Well"]).ngroups,
        baseline_accuracy=field_accuracy,
        baseline_well_accuracy=well_accuracy,
        skipped_fields=skipped,
        plates_without_control=list(preprocessing.plates_without_control),
        index_hash=index.hash,
        resume_from=str(resume_from) if resume_from else None,
    )
    plan.save(folder.plan)


def labelled_index(config: TrainCommand) -> tuple[Index, Index, str]:
    """Return the index of all fields, that of those with a class, which is its column `Metadata_Class`, and the target's column.

    The MoA file is read only where it is needed. With data.on_bad_image=skip a missing file is left to be counted with the broken ones.
    """
    moa = config.training.target.lower().removeprefix("metadata_") == "moa" or config.plates.split == "compound_folds"
    index = read_index(config.plates, moa=moa, files=config.data.on_bad_image == "raise")
    if config.data.on_bad_image == "skip":
        index, _ = find_images(index)
    for note in index.notes:
        log.info("%s", note)
    target, classes = target_column(index.table, config.training.target), target_labels(index.table, config.training.target)
    torn = classes.groupby([index.table["Metadata_Plate"], index.table["Metadata_Well"]]).nunique() > 1
    if torn.any():
        raise ConfigError(
            f"training.target must be the same for all sites of a well. {target} differs within {int(torn.sum())} wells, "
            f"{'/'.join(torn.index[torn.to_numpy().argmax()])} the first; learn another target."
        )
    labelled = classes.notna()
    if not labelled.all():
        log.info("%d of %d fields have no %s and are left out.", (~labelled).sum(), len(labelled), target)
    return index, replace(index, table=index.table.assign(Metadata_Class=classes)).select(labelled), target


def usable_cache(config: ScreenConfig, folder: RunFolder) -> Path:
    """Return the folder for what is computed once: the plates' own, or the run folder where that cannot be written."""
    cache = cache_folder(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s cannot be written (%s): what is computed once goes into the run folder.", cache, error.strerror)
        return folder.path / "cache"
    if os.access(cache, os.W_OK):
        return cache
    log.warning("%s cannot be written: what is computed once goes into the run folder.", cache)
    return folder.path / "cache"


def measured(config: LoadingConfig, index: Index, cache: Path, level: str) -> tuple[Index, pd.DataFrame, list[str]]:
    """Look at every image once (its pixels, or with level "files" its header; cached). Return what can be used, and the names of skipped fields.

    Raises DataError naming the broken fields, or, with data.on_bad_image=skip, where they are more than data.max_bad_fields.
    """
    found = measure_index(index, level=level, workers=usable_cores(), cache=cache, progress=True)
    bad = breaks_training(found["QC_Problem"])
    saturated = found["QC_Problem"].notna() & ~bad
    if saturated.any():
        log.info("%d fields have saturated pixels and are kept: `hcsdl check check.level=pixels` lists them.", saturated.sum())
    names = [index.field_name(row) for row in bad.to_numpy().nonzero()[0]]
    sentences = "; ".join(f"{name}: {problem.rstrip('.')}" for name, problem in zip(names[:5], found["QC_Problem"][bad], strict=False))
    more = f" (+{len(names) - 5} more)" if len(names) > 5 else ""
    if names and config.on_bad_image == "raise":
        raise DataError(
            f"every image must be usable. {len(names)} fields are not: {sentences}{more}. Mend them, or set data.on_bad_image=skip."
        )
    if len(names) > config.max_bad_fields:
        raise DataError(
            f"at most data.max_bad_fields={config.max_bad_fields} fields may be skipped. {len(names)} are broken: {sentences}{more}."
        )
    if names:
        log.warning("%d broken fields are skipped: %s%s", len(names), sentences, more)
    index = replace(index, table=pd.concat([index.table, found.filter(like="QC_").drop(columns="QC_Problem")], axis=1))
    return index.select(~bad), found[~bad].reset_index(drop=True), names


def split_column(config: TrainCommand, index: Index, target: str) -> pd.Series:
    """Return "train", "val" or None for each field."""
    seed = config.seed if config.plates.split_seed is None else config.plates.split_seed
    plates = config.plates
    return split_fields(index.table, kind=plates.split, target=target, val_fraction=plates.val_fraction, fold=plates.fold, seed=seed)


def class_numbers(index: Index, classes: list[str]) -> np.ndarray:
    """Return each field's class as its place in `classes`, int64 (N,)."""
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in index.table["Metadata_Class"]], dtype=np.int64)


def make_sampler(config: TrainCommand, index: Index, classes: list[str]) -> Sampler:
    """Return the sampler over the training fields of a prepared index. Raises ConfigError where there are too few for a global batch."""
    rows = (index.table["Metadata_Split"] == "train").to_numpy().nonzero()[0]
    return Sampler(
        rows,
        [index.field_name(row) for row in rows],
        class_numbers(index, classes)[rows],
        list(index.table["Metadata_Treatment"].iloc[rows].astype(str)),
        sampling=config.data.sampling,
        cap=config.data.cap,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
    )
