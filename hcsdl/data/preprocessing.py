"""Fields as stored → fields as the network sees them: shading, scaling, crop, down-sampling, and the drawn changes.

In: an index and the data settings, once, for `fit_preprocessing`; then unsigned integer images (C, H, W), one at a time. Out:
float32 images. Promised: what is fitted is fitted once and cached; the object alone (its `state_dict`) is enough to feed a trained
network; pixels become floats once; numpy only, so loader threads start no further threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from hcsdl.config import DataConfig, DataError
from hcsdl.data.augmentation import Augmentation, cropped_size, window_size
from hcsdl.data.conversion import Conversion, ShadingView, convert
from hcsdl.data.illumination import coarse_grid, fit_shading
from hcsdl.data.intensity import BINS, histogram, scaling
from hcsdl.data.reading import read_field
from hcsdl.machine.process import bar_options
from hcsdl.plates.index import Index

T = TypeVar("T")
log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_ARRAYS = ("offset", "scale", "pooled_offset", "pooled_scale", "dark", "pooled_dark", "shading", "pooled_shading")
_NAMES = ("channels", "plates", "plates_without_control")


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Everything between a stored field and the network's input, fitted.

    Attributes
    ----------
    channels : channel names, in order.
    plates : plates that were fitted.
    offset, scale : float32 (plates, C), in stored units and their inverse; 0 and 1 with ``data.intensity=none``.
    pooled_offset, pooled_scale : float32 (C,), from the control wells of all fitted plates together, for a plate that was never fitted.
    dark, pooled_dark : float32 (plates, C) camera offsets, in stored units, and their mean (C,); 0 without shading correction.
    shading, pooled_shading : float32 (plates, C, h, w) coarse shading functions, and their mean (C, h, w); None without correction.
    plates_without_control : the fitted plates that took the pooled values.
    illumination, intensity, control : how it was fitted, and on which compound.
    crop_px, downsample : see `DataConfig`.
    """

    channels: tuple[str, ...]
    plates: tuple[str, ...]
    offset: np.ndarray
    scale: np.ndarray
    pooled_offset: np.ndarray
    pooled_scale: np.ndarray
    dark: np.ndarray
    pooled_dark: np.ndarray
    shading: np.ndarray | None
    pooled_shading: np.ndarray | None
    plates_without_control: tuple[str, ...]
    illumination: str
    intensity: str
    control: str
    crop_px: tuple[int, int] | None
    downsample: int

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (C, H', W') of what `apply` makes of a field of `shape` (C, H, W)."""
        rows, columns = window_size(shape, self.crop_px, self.downsample)
        return shape[0], rows // self.downsample, columns // self.downsample

    def apply(self, image: np.ndarray, plate: str, augmentation: Augmentation | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Return a field as the network sees it: ``((image - dark) / shading - offset) * scale``, then the augmentation's gain and offset.

        Crop, turns and flips are strided views of `image`; the crop is centred without an augmentation. Down-sampling averages the stored
        pixels and then divides by the shading at their centre, which differs from the other order by less than the shading changes there.

        Parameters
        ----------
        image
            (C, H, W) uint8 or uint16, as stored.
        plate
            Its plate; one that was never fitted takes the pooled values.
        out
            float32 (C, H', W') with any strides, to write into; or uint16, for the bits of the values rounded to bf16.

        Raises
        ------
        ConfigError
            The crop or the down-sampling does not fit the field.
        DataError
            The field has another number of channels than was fitted.
        """
        conversion = self.conversion(image.shape, plate, augmentation)
        view = conversion.turned(image)
        if out is None:
            out = np.empty((len(view), view.shape[1] // self.downsample, view.shape[2] // self.downsample), np.float32)
        convert(view, conversion.downsample, conversion.shading, conversion.gain, conversion.shift, out)
        return out

    def conversion(self, shape: tuple[int, ...], plate: str, augmentation: Augmentation | None = None) -> Conversion:
        """Return what `apply` does to a field of `shape` (C, H, W). Raises as `apply`."""
        if shape[0] != len(self.channels):
            raise DataError(
                f"A field must have the channels {', '.join(self.channels)}. Found an array of shape {shape} on plate "
                f"{plate}: give it the same channels, in the same order."
            )
        height, width = shape[1:]
        rows, columns = window_size(shape, self.crop_px, self.downsample)
        if augmentation is None:
            cropped = cropped_size(shape, self.crop_px)
            top, left = (height - cropped[0]) // 2, (width - cropped[1]) // 2
            transpose, flip_rows, flip_columns = False, False, False
        else:
            top, left = augmentation.origin_px
            transpose, flip_rows, flip_columns = augmentation.orientation()
        offset, scale, dark, grid = self._plate(plate)
        gain = np.asarray(augmentation.gain if augmentation else 1.0) * scale
        shift = (augmentation.offset if augmentation else 0.0) - offset * gain
        shading = None
        if grid is not None:
            row_px, column_px = (
                origin + (self.downsample - 1) / 2 + np.arange(0, count, self.downsample, dtype=np.float32)
                for origin, count in ((top, rows), (left, columns))
            )
            sides = (height, width)
            if transpose:
                row_px, column_px, sides, grid = column_px, row_px, sides[::-1], grid.swapaxes(1, 2)
            shading = ShadingView(grid, dark, row_px[:: -1 if flip_rows else 1], column_px[:: -1 if flip_columns else 1], sides)
        return Conversion(
            rows=slice(top, top + rows),
            columns=slice(left, left + columns),
            transpose=transpose,
            flip_rows=flip_rows,
            flip_columns=flip_columns,
            downsample=self.downsample,
            shading=shading,
            gain=gain.astype(np.float32),
            shift=shift.astype(np.float32),
        )

    def _plate(self, plate: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Return a plate's offset and scale, float64 (C,), dark (C,) and shading (C, h, w); the pooled ones if it was never fitted."""
        if plate not in self.plates:
            return self.pooled_offset.astype(np.float64), self.pooled_scale.astype(np.float64), self.pooled_dark, self.pooled_shading
        at = self.plates.index(plate)
        shading = None if self.shading is None else self.shading[at]
        return self.offset[at].astype(np.float64), self.scale[at].astype(np.float64), self.dark[at], shading

    def state_dict(self) -> dict[str, object]:
        """Return everything as plain values (arrays as their bytes and shape), which ``torch.load(weights_only=True)`` accepts."""
        state: dict[str, object] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for name in _ARRAYS:
            array = getattr(self, name)
            state[name] = None if array is None else {"shape": list(array.shape), "float32": array.astype("<f4").tobytes()}
        return state | {name: list(getattr(self, name)) for name in _NAMES} | {"schema_version": SCHEMA_VERSION}

    def save(self, path: Path) -> None:
        """Write an .npz file, under another name first, so that nobody ever reads half of it. Raises OSError."""
        state = {name: value for name, value in self.state_dict().items() if name not in _ARRAYS}
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        new = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        try:
            np.savez(new, state=json.dumps(state), **arrays)
            os.replace(new, path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    @classmethod
    def from_state_dict(cls, state: dict) -> Preprocessing:
        """Return the object that `state_dict` described.

        Raises
        ------
        DataError
            The state is of another schema version.
        """
        if state.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"A preprocessing state must have schema version {SCHEMA_VERSION}. Found {state.get('schema_version')}: train "
                "anew, or use the version of hcsdl that wrote it."
            )
        values = {name: value for name, value in state.items() if name != "schema_version"}
        for name in _ARRAYS:
            if values[name] is not None:
                values[name] = np.frombuffer(values[name]["float32"], "<f4").astype(np.float32).reshape(values[name]["shape"])
        values |= {name: tuple(values[name]) for name in _NAMES}
        return cls(**values | {"crop_px": None if values["crop_px"] is None else tuple(values["crop_px"])})


def fit_preprocessing(index: Index, config: DataConfig, control: str, cache: Path | None, progress: bool, workers: int) -> Preprocessing:
    """Fit shading and scaling of every plate of an index, or take them from the cache.

    Parameters
    ----------
    index
        All fields of the plates: shading is fitted on all of them, scaling on those whose compound is `control`.
    cache
        Folder for ``preprocessing-<key>.npz``, the key made of the index's hash and folder and of what was asked for; None: no cache.
        A file that is corrupt, or older than the first image of a plate, is not used; a folder that cannot be written to is noted, no more.
    progress
        Show a progress bar over the fields to read.
    workers
        Threads that read.

    Raises
    ------
    ConfigError
        Shading is asked for and a plate has fewer than 50 fields.
    DataError
        A field cannot be read (with ``data.on_bad_image=raise``), no plate has control wells, or a channel is constant in them.
    """
    empty = _unfitted(index, config, control)
    crop_px = None if config.crop_px is None else tuple(config.crop_px)
    if config.illumination == "none" and config.intensity == "none":
        return dataclasses.replace(empty, crop_px=crop_px)
    path = _cache_path(cache, index, config, control) if cache is not None else None
    fitted = _read_cache(path, index) if path is not None else None
    if fitted is None:
        plates = tuple(dict.fromkeys(index.table["Metadata_Plate"]))
        fitted = _fit(empty, index, plates, progress, workers, skip=config.on_bad_image == "skip")
        if path is not None:
            _write_cache(path, fitted)
    return dataclasses.replace(fitted, crop_px=crop_px)


def extend(preprocessing: Preprocessing, index: Index, progress: bool, workers: int, skip: bool = False) -> Preprocessing:
    """Return `preprocessing` with those plates of `index` fitted, in the same way, that it does not know; what it knows stays as it is.

    A new plate without control wells takes the pooled values of the plates fitted first. `skip` leaves out fields that cannot be read.

    Raises
    ------
    DataError
        The index has other channels; else as `fit_preprocessing`.
    """
    if tuple(index.channels) != preprocessing.channels:
        raise DataError(
            f"New plates must have the channels {', '.join(preprocessing.channels)}. Found {', '.join(index.channels)} in "
            f"{index.root}: give them the same channels, in the same order."
        )
    plates = tuple(plate for plate in dict.fromkeys(index.table["Metadata_Plate"]) if plate not in preprocessing.plates)
    if not plates or (preprocessing.illumination == "none" and preprocessing.intensity == "none"):
        return preprocessing
    return _fit(preprocessing, index, plates, progress, workers, skip)


def set_aside(preprocessing: Preprocessing, plates: Collection[str]) -> Preprocessing:
    """Return `preprocessing` with `plates` under other names, so that `extend` fits other plates of the same names; all values stay."""

    def renamed(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{name} (another of this name)" if name in plates else name for name in names)

    return dataclasses.replace(
        preprocessing, plates=renamed(preprocessing.plates), plates_without_control=renamed(preprocessing.plates_without_control)
    )


def _unfitted(index: Index, config: DataConfig, control: str) -> Preprocessing:
    channels = len(index.channels)
    return Preprocessing(
        channels=tuple(index.channels),
        plates=(),
        offset=np.zeros((0, channels), np.float32),
        scale=np.ones((0, channels), np.float32),
        pooled_offset=np.zeros(channels, np.float32),
        pooled_scale=np.ones(channels, np.float32),
        dark=np.zeros((0, channels), np.float32),
        pooled_dark=np.zeros(channels, np.float32),
        shading=None,
        pooled_shading=None,
        plates_without_control=(),
        illumination=config.illumination,
        intensity=config.intensity,
        control=control,
        crop_px=None,
        downsample=config.downsample,
    )


def _fit(base: Preprocessing, index: Index, plates: tuple[str, ...], progress: bool, workers: int, skip: bool) -> Preprocessing:
    """Return `base` with `plates` fitted. Pooled values are made only if `base` has no plates yet."""
    rows = {plate: np.flatnonzero(index.table["Metadata_Plate"] == plate) for plate in plates}
    is_control = (index.table["Metadata_Compound"] == base.control).to_numpy() & (base.intensity != "none")
    total = sum(int(is_control[some].sum()) + (len(some) if base.illumination != "none" else 0) for some in rows.values())
    shadings: list[tuple[np.ndarray, np.ndarray]] = []
    scalings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    pooled_counts = np.zeros((len(base.channels), BINS), np.int64)
    bar = tqdm(total=total, desc="fitting shading and intensity", unit="field", disable=not progress, leave=False, **bar_options())
    with bar, ThreadPoolExecutor(max(workers, 1)) as pool:
        measured = partial(_measured, index, pool, bar, skip)
        for plate in plates:
            if base.illumination != "none":
                shadings.append(_plate_shading(list(measured(rows[plate], _shape_and_grid)), base.illumination, plate))
            counts = np.zeros_like(pooled_counts)
            corrected = partial(_corrected_histogram, _only_shading(base, plate, shadings[-1] if shadings else None), plate)
            for one in measured(rows[plate][is_control[rows[plate]]], corrected):
                counts += one
            if counts.any():
                scalings[plate] = scaling(counts, base.intensity, plate, base.channels)
                pooled_counts += counts
    return _joined(base, plates, shadings, scalings, pooled_counts)


def _joined(
    base: Preprocessing,
    plates: tuple[str, ...],
    shadings: list[tuple[np.ndarray, np.ndarray]],
    scalings: dict[str, tuple[np.ndarray, np.ndarray]],
    pooled_counts: np.ndarray,
) -> Preprocessing:
    """Return `base` with what was fitted on `plates` added; plates without scaling take the pooled one, which a note tells."""
    pooled = base.pooled_offset, base.pooled_scale
    shading, pooled_shading, pooled_dark = base.shading, base.pooled_shading, base.pooled_dark
    dark = np.zeros((len(plates), len(base.channels)), np.float32)
    without: tuple[str, ...] = ()
    if not base.plates and base.intensity != "none":
        if not scalings:
            raise DataError(
                f"data.intensity={base.intensity} needs wells of the control compound {base.control!r} (plates.control) on at "
                f"least one plate. Found none on {len(plates)} plates: correct plates.control, or set data.intensity=none."
            )
        pooled = scaling(pooled_counts, base.intensity, "(all plates)", base.channels)
    if shadings:
        grids, dark = (np.stack(part) for part in zip(*shadings, strict=True))
        shading = grids if base.shading is None else np.concatenate([base.shading, grids])
        if not base.plates:
            pooled_shading, pooled_dark = grids.mean(axis=0, dtype=np.float32), dark.mean(axis=0, dtype=np.float32)
    if base.intensity != "none":
        without = tuple(plate for plate in plates if plate not in scalings)
    if without:
        log.warning(
            "No wells of %s on %d of %d plates (%s): their intensities are scaled with the values of the other plates together.",
            base.control,
            len(without),
            len(plates),
            ", ".join(without[:5]) + (", …" if len(without) > 5 else ""),
        )
    offsets, scales = (np.stack([scalings.get(plate, pooled)[part] for plate in plates]) for part in (0, 1))
    return dataclasses.replace(
        base,
        plates=base.plates + plates,
        offset=np.concatenate([base.offset, offsets]),
        scale=np.concatenate([base.scale, scales]),
        pooled_offset=pooled[0],
        pooled_scale=pooled[1],
        dark=np.concatenate([base.dark, dark]),
        pooled_dark=pooled_dark,
        shading=shading,
        pooled_shading=pooled_shading,
        plates_without_control=base.plates_without_control + without,
    )


def _measured(
    index: Index, pool: ThreadPoolExecutor, bar: tqdm, skip: bool, rows: np.ndarray, measure: Callable[[np.ndarray], T]
) -> Iterator[T]:
    """Yield ``measure(field)`` in the rows' order, a few fields at a time; unreadable ones raise, or are left out with a note."""

    def one(row: int) -> T | DataError:
        try:
            return measure(read_field(index.paths(row)))
        except DataError as error:
            return error

    for first in range(0, len(rows), 16):
        chunk = rows[first : first + 16]
        for row, result in zip(chunk, pool.map(one, chunk), strict=True):
            bar.update()
            if not isinstance(result, DataError):
                yield result
            elif skip:
                log.warning("Field %s is left out of the fit: %s", index.field_name(row), result)
            else:
                raise DataError(f"Field {index.field_name(row)}: {result}") from result


def _shape_and_grid(image: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    return image.shape[1:], coarse_grid(image)


def _plate_shading(found: list[tuple[tuple[int, int], np.ndarray]], how: str, plate: str) -> tuple[np.ndarray, np.ndarray]:
    shapes = sorted({shape for shape, _ in found})
    if len(shapes) > 1:
        raise DataError(
            f"The fields of a plate must be of one size for data.illumination={how}. Found {shapes} px on plate {plate}: leave "
            "some out (plates.query), or set data.illumination=none."
        )
    return fit_shading(np.array([grid for _, grid in found]), how, plate, shapes[0] if shapes else (1, 1))


def _only_shading(base: Preprocessing, plate: str, fitted: tuple[np.ndarray, np.ndarray] | None) -> Preprocessing:
    """Return a preprocessing of one plate that corrects shading and nothing else."""
    zeros = np.zeros((1, len(base.channels)), np.float32)
    return dataclasses.replace(
        base,
        plates=(plate,),
        offset=zeros,
        scale=zeros + 1,
        dark=zeros if fitted is None else fitted[1][None],
        shading=None if fitted is None else fitted[0][None],
        crop_px=None,
    )


def _corrected_histogram(shading: Preprocessing, plate: str, image: np.ndarray) -> np.ndarray:
    return histogram(shading.apply(image, plate))


def _cache_path(cache: Path, index: Index, config: DataConfig, control: str) -> Path:
    asked = {
        "schema": SCHEMA_VERSION,
        "index": index.hash,
        "root": str(index.root.resolve()),
        "control": control,
        "illumination": config.illumination,
        "intensity": config.intensity,
        "downsample": config.downsample,
    }
    return cache / f"preprocessing-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]}.npz"


def load_preprocessing(path: Path) -> Preprocessing:
    """Return what `Preprocessing.save` wrote. Raises OSError, ValueError and others at a file that is missing or garbage."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        state = json.loads(str(stored["state"]))
        arrays = {name: stored.get(name) for name in _ARRAYS}
    state |= {name: None if array is None else {"shape": array.shape, "float32": array.tobytes()} for name, array in arrays.items()}
    return Preprocessing.from_state_dict(state)


def _write_cache(path: Path, fitted: Preprocessing) -> None:
    """Save, a failure is noted, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fitted.save(path)
    except OSError as error:
        log.warning("What was fitted is not kept for the next run: %s cannot be written (%s).", path, error.strerror or error)


def _read_cache(path: Path, index: Index) -> Preprocessing | None:
    """Return what the file holds; None if there is none, or it is corrupt or older than the first image of a plate."""
    try:
        written = path.stat().st_mtime
        found = load_preprocessing(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a parser raises on garbage
        log.warning("%s cannot be used and is made anew (%s).", path, " ".join(str(error).split()) or type(error).__name__)
        return None
    firsts = index.table.drop_duplicates("Metadata_Plate").index
    images = [index.paths(row)[0] for row in firsts]
    if any(image.exists() and image.stat().st_mtime > written for image in images):
        log.warning("%s is older than the images and is made anew.", path)
        return None
    return found
