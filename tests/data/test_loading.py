"""Loaders: the same tensors whatever the number of threads and ranks; what happens to bad images, early exits and memory layout."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from hcsdl.config import ConfigError, DataConfig, DataError, PlatesConfig
from hcsdl.data import loading
from hcsdl.data.augmentation import draw_augmentation
from hcsdl.data.loading import EvalLoader, MiniBatch, TrainLoader
from hcsdl.data.preprocessing import Preprocessing, fit_preprocessing
from hcsdl.data.reading import read_field
from hcsdl.data.sampling import Sampler
from hcsdl.plates.index import Index, read_index
from tests.plates.screens import write_screen


class Screen:
    """A small screen with everything a loader needs."""

    def __init__(self, root: Path, **options) -> None:
        write_screen(root, **{"plates": 1, "wells": 6, "sites": 2, "shape": (24, 24)} | options)
        self.index: Index = read_index(PlatesConfig(root=str(root)))
        self.labels = self.index.table["Metadata_MoA"].astype("category").cat.codes.to_numpy().astype(np.int64)
        self.preprocessing: Preprocessing = fit_preprocessing(self.index, DataConfig(), "DMSO", None, False, 1)

    def sampler(self, size: int = 4, seed: int = 0) -> Sampler:
        rows = np.arange(len(self.index.table))
        return Sampler(
            rows,
            [self.index.field_name(row) for row in rows],
            self.labels,
            list(self.index.table["Metadata_Treatment"]),
            sampling="all",
            cap=12,
            global_batch_size=size,
            seed=seed,
        )

    def train(
        self,
        *,
        size: int = 4,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        mini: int | None = None,
        steps=(0, 5),
        sender=None,
        dtype=torch.float32,
        **settings,
    ) -> TrainLoader:
        return TrainLoader(
            self.index,
            self.labels,
            self.preprocessing,
            self.sampler(size, seed),
            DataConfig(**settings),
            seed=seed,
            rank=rank,
            world_size=world,
            mini_batch_size=mini or size // world,
            first_step=steps[0],
            last_step=steps[1],
            sender=sender,
            dtype=dtype,
        )

    def evaluate(self, mini: int = 5, rows=None, sender=None, dtype=torch.float32, **settings) -> EvalLoader:
        rows = np.arange(len(self.index.table)) if rows is None else rows
        return EvalLoader(self.index, rows, self.labels, self.preprocessing, DataConfig(**settings), mini, sender, dtype)

    def harm(self, row: int) -> str:
        """Make a field unreadable and return its name."""
        self.index.paths(row)[1].write_bytes(b"II*\0 no image")
        return self.index.field_name(row)


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> Screen:
    return Screen(tmp_path_factory.mktemp("plates"))


@pytest.fixture()
def own_screen(tmp_path) -> Screen:
    """A screen that a test may harm."""
    return Screen(tmp_path)


def fingerprint(batches: list[MiniBatch]) -> list[str]:
    """Return a hash of each field's pixels, label and row, in order."""
    return [
        hashlib.sha256(image.contiguous().numpy().tobytes() + bytes(f"{label} {row}", "ascii")).hexdigest()
        for batch in batches
        for image, label, row in zip(batch.images, batch.labels.tolist(), batch.rows.tolist(), strict=True)
    ]


def steps_of(loader: TrainLoader) -> list[list[str]]:
    return [fingerprint(step) for step in loader]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hcsdl-loader")]


def test_tensors_are_equal_for_any_number_of_workers_and_ranks(screen):
    """Pixels, labels and rows, bit by bit: 0, 1, 3 workers; 1 and 2 ranks, whose shares laid end to end are the global batch."""
    expected = steps_of(screen.train(workers=0))
    assert len(expected) == 5
    assert len(set(sum(expected, []))) == 20
    for workers in (1, 3):
        assert steps_of(screen.train(workers=workers)) == expected
    for workers in (0, 3):
        shares = [steps_of(screen.train(rank=rank, world=2, workers=workers)) for rank in range(2)]
        assert [one + other for one, other in zip(*shares, strict=True)] == expected
    assert steps_of(screen.train(mini=1, workers=2, prefetch=1)) == expected


def test_another_seed_and_another_epoch_change_a_field(screen):
    def seen(**options) -> dict[int, list[bytes]]:
        found: dict[int, list[bytes]] = {}
        for step in screen.train(size=12, steps=(0, 2), workers=0, **options):
            for image, row in zip(step[0].images, step[0].rows.tolist(), strict=True):
                found.setdefault(row, []).append(image.contiguous().numpy().tobytes())
        return found

    one, other = seen(seed=0), seen(seed=1)
    for row in one:
        assert len({*one[row], *other[row]}) == 4
    still = seen(flips=False, quarter_turns=False, intensity_jitter=0.0)
    assert all(first == second for first, second in still.values())


def test_a_field_is_what_preprocessing_makes_of_it(screen):
    """In its place, with its label, drawn for its epoch and name."""
    rows, epochs = screen.sampler().global_batch(4)
    [batch] = next(iter(screen.train(seed=0, steps=(4, 5))))
    assert batch.rows.tolist() == rows.tolist()
    assert batch.labels.tolist() == screen.labels[rows].tolist()
    for image, row, epoch in zip(batch.images, rows, epochs, strict=True):
        field, plate = read_field(screen.index.paths(row)), screen.index.table["Metadata_Plate"][row]
        drawn = draw_augmentation(DataConfig(), 0, int(epoch), screen.index.field_name(row), field.shape)
        np.testing.assert_array_equal(image.numpy(), screen.preprocessing.apply(field, plate, drawn))


def test_resumed_in_mid_epoch_the_order_goes_on(screen):
    expected = steps_of(screen.train(steps=(0, 8), size=5))
    assert steps_of(screen.train(steps=(0, 4), size=5)) + steps_of(screen.train(steps=(4, 8), size=5)) == expected
    assert len(screen.train(steps=(4, 8))) == 4


def test_every_field_once_a_pass(screen):
    rows = [row for step in screen.train(steps=(0, 6)) for batch in step for row in batch.rows.tolist()]
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))


@pytest.mark.parametrize(("channels", "dtype"), [(("one",), "uint8"), (("a", "b", "c", "d", "e"), "uint16")])
def test_any_channels_in_channels_last_layout(tmp_path, channels, dtype):
    made = Screen(tmp_path, channels=channels, dtype=dtype, shape=(16, 20))
    for batch in [*made.evaluate(), *next(iter(made.train()))]:
        n, c = len(batch.rows), len(channels)
        assert batch.images.shape == (n, c, 16, 20)
        assert batch.images.dtype == torch.float32
        assert batch.images.stride() == (16 * 20 * c, 1, 20 * c, c)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.rows.dtype == torch.int64


def test_images_in_bf16_are_those_in_float32_rounded(screen):
    """As the network's first convolution would round them, in training and in evaluation, and where a field is left out."""
    for make in (screen.train, screen.evaluate):
        whole, rounded = (list(make(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
        pairs = zip(whole, rounded, strict=True) if make == screen.evaluate else zip(sum(whole, []), sum(rounded, []), strict=True)
        for one, other in pairs:
            assert torch.equal(other.images, one.images.to(torch.bfloat16)) and other.images.is_contiguous(
                memory_format=torch.channels_last
            )
            assert torch.equal(other.rows, one.rows)


def test_crop_and_downsample_reach_the_network(screen):
    settings = {"crop_px": [12, 16], "downsample": 2}
    small = Screen.__new__(Screen)
    small.index, small.labels = screen.index, screen.labels
    small.preprocessing = fit_preprocessing(screen.index, DataConfig(**settings), "DMSO", None, False, 1)
    assert next(iter(small.train(**settings)))[0].images.shape == (4, 3, 6, 8)
    assert next(iter(small.evaluate(**settings))).images.shape == (5, 3, 6, 8)


def test_evaluation_has_each_field_once_as_it_is(screen):
    batches = list(screen.evaluate(mini=5, workers=2))
    assert [len(batch.rows) for batch in batches] == [5, 5, 2]
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(12))
    plain = screen.preprocessing.apply(read_field(screen.index.paths(7)), screen.index.table["Metadata_Plate"][7])
    np.testing.assert_array_equal(batches[1].images[2].numpy(), plain)
    assert [batch.rows.tolist() for batch in screen.evaluate(rows=[9, 2], mini=1)] == [[9], [2]]
    assert list(screen.evaluate(rows=[])) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_gradient_accumulation_cuts_a_share_into_equal_mini_batches(screen, workers):
    steps = list(screen.train(size=12, mini=2, world=2, rank=1, steps=(0, 2), workers=workers, prefetch=1))
    assert [[len(batch.rows) for batch in step] for step in steps] == [[2, 2, 2]] * 2
    with pytest.raises(ConfigError, match="must divide a rank's share of the global batch, 6 fields"):
        screen.train(size=12, world=2, mini=4)


# Threads.


@pytest.mark.parametrize("leave", ["break", "close", "collect", "exhaust"])
def test_no_thread_outlives_the_iteration(screen, leave):
    loader = screen.train(workers=3, steps=(0, 4))
    if leave == "collect":
        stream = iter(loader)
        next(stream)
        assert loader_threads()
        del stream, loader
        gc.collect()
    elif leave == "close":
        stream = iter(loader)
        next(stream)
        assert loader_threads()
        loader.close()
        assert list(stream) == []
    else:
        for _ in loader:
            assert loader_threads()
            if leave == "break":
                break
    assert loader_threads() == []


def test_no_more_mini_batches_than_asked_for_are_loaded_ahead(screen, monkeypatch):
    started: list[int] = []
    fill = loading._Loader._fill

    def counting(self, *arguments) -> None:
        started.append(1)
        fill(self, *arguments)

    monkeypatch.setattr(loading._Loader, "_fill", counting)
    stream = iter(screen.train(size=2, workers=2, prefetch=3, steps=(0, 100)))
    for used in range(1, 4):
        next(stream)
        time.sleep(0.05)
        assert len(started) <= 2 * (used + 3)
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_that_is_done_is_let_go(screen, workers):
    """Before the next is asked for: validation needs its room."""
    stream = iter(screen.train(size=4, mini=2, workers=workers, steps=(0, 2)))
    step = next(stream)
    held = [weakref.ref(batch.images) for batch in step]
    assert all(images() is not None for images in held) and len(held) == 2
    del step
    assert all(images() is None for images in held)
    stream.close()


def test_waiting_is_measured(screen, monkeypatch):
    """On a clock that reading moves on by 1 and using a step by 1000: reading in the calling thread is waiting, using is not."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()

    def reading(paths: list[Path]) -> np.ndarray:
        clock.now += 1
        return read_field(paths)

    monkeypatch.setattr(loading, "time", clock)
    monkeypatch.setattr(loading, "read_field", reading)
    for workers in (0, 2):
        loader = screen.train(workers=workers)
        for _ in loader:
            clock.now += 1000
        assert loader.wait_s == 20 if workers == 0 else 0 <= loader.wait_s <= 20


def test_error_of_a_worker_is_raised_where_batches_are_used(own_screen, monkeypatch):
    name = own_screen.harm(7)
    for workers in (0, 2):
        with pytest.raises(DataError, match=f"Field {name} cannot be used: .*{own_screen.index.paths(7)[1].name}"):
            steps_of(own_screen.train(workers=workers))
        with pytest.raises(DataError, match=name):
            list(own_screen.evaluate(workers=workers))
    monkeypatch.setattr(loading, "draw_augmentation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        steps_of(own_screen.train(workers=2))
    assert "while loading field Week1_20000/" in caught.value.__notes__[0]
    del caught
    assert loader_threads() == []


# Bad images.


def test_skip_takes_the_next_field_of_the_class_and_counts_each_once(own_screen):
    """Places, sizes and labels stay as they were; the same for any number of workers."""
    expected = [row for step in own_screen.train(steps=(0, 6)) for row in step[0].rows.tolist()]
    labels = own_screen.labels
    alike = np.flatnonzero(labels == labels[3])
    bad, following = int(alike[1]), int(alike[2])
    name = own_screen.harm(bad)
    hashes = []
    for workers in (0, 3):
        loader = own_screen.train(steps=(0, 6), workers=workers, on_bad_image="skip")
        steps = list(loader)
        found = [row for step in steps for row in step[0].rows.tolist()]
        assert found == [following if row == bad else row for row in expected]
        assert [label for step in steps for label in step[0].labels.tolist()] == labels[expected].tolist()
        assert list(loader.bad_fields) == [name]
        assert own_screen.index.paths(bad)[1].name in loader.bad_fields[name]
        hashes.append([fingerprint(step) for step in steps])
    assert hashes[0] == hashes[1]


def test_skip_goes_on_past_the_last_field_and_past_other_bad_ones(own_screen):
    alike = np.flatnonzero(own_screen.labels == own_screen.labels[0])
    for row in alike[2:]:
        own_screen.harm(int(row))
    loader = own_screen.train(size=12, steps=(0, 1), on_bad_image="skip")
    [batch] = next(iter(loader))
    rows = [row for row in batch.rows.tolist() if row in alike]
    assert sorted(rows) == sorted([alike[1]] + [alike[0]] * (len(alike) - 1))
    assert len(loader.bad_fields) == len(alike) - 2


def test_skip_leaves_the_field_out_of_an_evaluation(own_screen):
    names = [own_screen.harm(row) for row in (0, 6, 10, 11)]
    loader = own_screen.evaluate(mini=5, on_bad_image="skip")
    batches = list(loader)
    assert [batch.rows.tolist() for batch in batches] == [[1, 2, 3, 4], [5, 7, 8, 9]]
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert [len(batch.labels) for batch in batches] == [4, 4]
    assert sorted(loader.bad_fields) == sorted(names)


def test_skip_stops_above_its_limit_and_without_any_readable_field(own_screen):
    for row in (1, 4, 8):
        own_screen.harm(row)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"At most 2 fields may be unreadable \(data.max_bad_fields\). Found 3"):
            list(own_screen.evaluate(on_bad_image="skip", max_bad_fields=2, workers=workers))
    assert len(list(own_screen.evaluate(on_bad_image="skip", max_bad_fields=3))) == 3
    alike = np.flatnonzero(own_screen.labels == own_screen.labels[0])
    for row in alike:
        own_screen.harm(int(row))
    with pytest.raises(DataError, match=f"Found none of the {len(alike)} of class"):
        steps_of(own_screen.train(on_bad_image="skip"))
    for row in range(12):
        own_screen.harm(row)
    with pytest.raises(DataError, match="Found none among 12"):
        list(own_screen.evaluate(on_bad_image="skip"))
    assert loader_threads() == []


def test_field_of_another_size_is_a_bad_field(own_screen):
    import tifffile

    for path in own_screen.index.paths(5):
        tifffile.imwrite(path, np.ones((24, 20), np.uint16))
    with pytest.raises(DataError, match="3 × 24 × 24 here. Found 3 × 24 × 20"):
        list(own_screen.evaluate())
    loader = own_screen.evaluate(on_bad_image="skip")
    assert sum(len(batch.rows) for batch in loader) == 11
