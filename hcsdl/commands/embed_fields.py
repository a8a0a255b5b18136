"""`hcsdl embed`, a rank's work: the network over its share of the fields, saved every few seconds; at the end rank 0 writes the table.

In: a folder that `hcsdl.commands.embed` prepared. Out: the table; the folder is gone. Promised: a field always lies in the same mini-batch at the same
place, so its row does not depend on the number of ranks, nor on where a killed command went on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from hcsdl.commands.compose import config_hash
from hcsdl.commands.resume import elsewhere
from hcsdl.config import DataConfig, DataError, EmbedCommand, ModelConfig
from hcsdl.data.loading import EvalLoader
from hcsdl.data.preprocessing import load_preprocessing
from hcsdl.data.sending import Sender
from hcsdl.distributed.group import Group
from hcsdl.distributed.identity import Identity
from hcsdl.distributed.launcher import Stop
from hcsdl.kernels import choose_kernels
from hcsdl.kernels.device import device_name, own_device
from hcsdl.kernels.inference import for_inference
from hcsdl.machine.process import bar_options
from hcsdl.models import build_model
from hcsdl.plates.index import load_index
from hcsdl.training.checkpoint import load_checkpoint, load_model_state
from hcsdl.training.embeddings import WorkFolder, field_table, well_table, write_table
from hcsdl.training.predict import outputs
from hcsdl.training.run_folder import write_json
from hcsdl.training.summary import versions

log = logging.getLogger(__name__)


def embed_fields(config: EmbedCommand, folder: WorkFolder, identity: Identity, stop: Callable[[], bool], allocator: str) -> None:
    """Be one rank: compute, save, and on rank 0 write the table. Raises Stop once a signal asked for it and what is computed is saved."""
    about = json.loads(folder.plan.read_text(encoding="utf-8"))
    index = load_index(folder.path)
    device = own_device(config.machine.device, identity.local_rank)
    group = Group(identity, config.distributed, device)
    kernels = choose_kernels(config.kernels.name, device)
    checks = {"configuration": config_hash(config), "index": index.hash, "versions": versions(), "kernels": kernels}
    for what, value in (checks | {"number of threads": torch.get_num_threads()}).items():
        group.check_equal(what, value)
    network = for_inference(network_of(folder, config, about), kernels).to(device)
    size = config.embed.mini_batch_size
    done = set(
        group.all_gather_object({int(row) // size for part in folder.load() for row in part["rows"]} if identity.rank == 0 else None)[0]
    )
    todo = [number for number in range(-(-len(index.table) // size)) if number not in done]
    own = [np.arange(number * size, min((number + 1) * size, len(index.table))) for number in todo[group.rank :: group.world_size]]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *own])
    settings = DataConfig(**vars(config.data))
    sender = Sender(device) if device.type == "cuda" else None
    preprocessing = load_preprocessing(folder.preprocessing)
    loader = EvalLoader(index, rows, np.zeros(len(index.table)), preprocessing, settings, size, sender, kernels.image_dtype)
    say = log.info if group.rank == 0 else (lambda *_: None)
    if kernels.warning:
        say("warning: %s", kernels.warning)
    say(
        "kernels %s, %s (%s); %s; allocator: %s; %s",
        kernels.name,
        kernels.precision,
        kernels.reason,
        f"{network.folded} batch norms folded",
        allocator,
        device_name(device),
    )
    ran_on = {"kernels": f"{kernels.name} ({kernels.precision})", "threads a rank": str(torch.get_num_threads())}
    ran_on["processor"] = device_name(device)
    if done:
        say("%d of %d mini-batches were computed before.", len(done), len(done) + len(todo))
        if changed := elsewhere(json.loads(folder.ran_on.read_text(encoding="utf-8")), ran_on):
            say("warning: %s", changed)
    elif group.rank == 0:
        write_json(folder.ran_on, ran_on)

    begun = time.monotonic()
    with tqdm(
        total=len(index.table),
        initial=min(len(done) * size, len(index.table)),
        desc="embedding",
        unit="field",
        disable=group.rank > 0,
        **bar_options(),
    ) as bar:
        stream = outputs(network, loader, kernels, group.in_step, pad_to=size)
        _rounds(stream, -(-len(todo) // group.world_size), config.embed.save_every_s, folder, group, stop, bar)
    seconds = time.monotonic() - begun
    if todo:
        fields = min(len(todo) * size, len(index.table))
        waited = loader.wait_s / seconds
        say("%.2f images/s over %d fields, %.0f %% of the time waiting for them", fields / seconds, fields, 100 * waited)
    if group.rank == 0:
        about |= {"kernels": kernels.name, "precision": kernels.precision, "threads_per_rank": torch.get_num_threads()}
        about |= {"processor": device_name(device), "versions": versions()}
        _write(config, folder, about, index.table, [index.field_name(row) for row in range(len(index.table))])
    group.close()
    if group.rank == 0:
        folder.remove()


def network_of(folder: WorkFolder, config: EmbedCommand, about: dict) -> torch.nn.Module:
    """Return the checkpoint's network in evaluation mode, or one of its shape with weights drawn from `config.seed`.

    Drawn weights are all drawn: `model.zero_init_residual`, which switches every residual branch off until training switches it on, is not applied,
    for it would make the baseline a shallow one. Batch norm keeps its first statistics, 0 and 1.
    """
    checkpoint = load_checkpoint(folder.checkpoint)
    shape = dict(checkpoint.model_config)
    if about["weights"] == "random":
        shape["zero_init_residual"] = False
        torch.manual_seed(config.seed)
    model = build_model(ModelConfig(**shape), len(checkpoint.channels), len(checkpoint.classes), tuple(checkpoint.image_size))
    if about["weights"] == "trained":
        load_model_state(model, checkpoint)
    return model.eval()


def _rounds(
    stream: Iterator[tuple[torch.Tensor, ...]],
    left: int,
    save_every_s: float,
    folder: WorkFolder,
    group: Group,
    stop: Callable[[], bool],
    bar: tqdm,
) -> None:
    """Compute `left` mini-batches of this rank (the last may be missing), in rounds of about `save_every_s`, each of which rank 0 saves."""
    length = 1
    while left:
        started, found = time.monotonic(), []
        for rows, _, embedding, logits in islice(stream, length):
            found.append((rows.numpy(), embedding.numpy(), logits.numpy()))
            bar.update(len(rows))
        told = group.all_gather_object((found, stop(), (time.monotonic() - started) / length))
        left = max(0, left - length)
        parts = [part for rank, _, _ in told for part in rank]
        bar.update(sum(len(rows) for rank, _, _ in told[1:] for rows, *_ in rank))
        if group.rank == 0 and parts:
            rows, embedding, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
            folder.save(rows=rows, embedding=embedding, logits=logits)
        if left and any(asked for _, asked, _ in told):
            raise Stop("stopped by a signal; what was computed is saved: start the same command again to go on.")
        length = max(1, min(left, int(save_every_s / max(seconds for _, _, seconds in told))))


def _write(config: EmbedCommand, folder: WorkFolder, about: dict, fields: pd.DataFrame, names: list[str]) -> None:
    """Join the parts, check that they are all there, and write the table."""
    parts = folder.load()
    if not parts:
        raise DataError("at least one field must be readable. None is: `hcsdl check check.level=pixels` lists what is wrong with them.")
    rows, embedding, logits = (np.concatenate([part[name] for part in parts]) for name in ("rows", "embedding", "logits"))
    order = np.argsort(rows, kind="stable")
    rows, embedding, logits = rows[order], embedding[order], logits[order]
    missing = sorted(set(range(len(fields))) - set(rows.tolist()))
    about["skipped_fields"] = sorted({*about["skipped_fields"], *(names[row] for row in missing)})
    classes = about["classes"] if about["weights"] == "trained" else []
    make = field_table if config.embed.by == "field" else well_table
    table = make(fields.iloc[rows], embedding, logits, classes)
    output = Path(config.embed.output)
    write_table(table, about, output)
    simple = sum(c.startswith("Intensity_") for c in table)
    print(
        f"{len(table)} {config.embed.by}s of {table['Metadata_Plate'].nunique()} plates: {embedding.shape[1]} features, {len(classes)} class "
        f"probabilities, {simple} intensities, nucleus count; {len(about['skipped_fields'])} fields skipped"
    )
    print(f"table: {output}\nscore it: hcsdl score profiles={output}", flush=True)
