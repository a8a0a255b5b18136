"""Every setting of every command: type, default, unit, and one line on each.

In: nothing. Out: one dataclass per group (`training`, `plates`, …) and one per command (`TrainCommand`, …), registered with
Hydra by `register()`. Values are checked when an object is made; a bad one raises `ConfigError`, whose text names the key.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, List, Optional, Union

SPLITS = ("random_field", "random_well", "plate", "batch", "compound_folds")
NORMALISATIONS = (
    *("standardise_all", "standardise_control", "robust_all", "robust_control"),
    *("sphere_pca", "sphere_zca", "tvn", "combat", "select"),
)
MODELS = ("resnet18", "resnet34", "resnet50", "mcnn")
STEP_VARIANTS = (
    *("fp32", "bf16", "ipex_recipe", "bf16_preloaded", "ipex_recipe_preloaded", "compiled"),
    *("hcsdl_native", "hcsdl_ipex", "hcsdl_best", "hcsdl_lean"),
)


class ExitCode(IntEnum):
    """How a command ends, whatever the number of ranks; 130 besides, as shells have it, where Ctrl-C came before anything had begun."""

    DONE = 0
    FAILED = 1  # anything else
    BAD_CONFIG = 2
    BAD_DATA = 3
    NON_FINITE_LOSS = 4
    LOST_RANK = 5
    STOPPED = 75  # by a signal, and resumable


class ConfigError(ValueError):
    """A setting that cannot be: its text names the key, what must hold, what was found."""

    exit_code = ExitCode.BAD_CONFIG


class DataError(RuntimeError):
    """Plates, images or a checkpoint that cannot be used: its text says what, where and what to do."""

    exit_code = ExitCode.BAD_DATA


def option(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a dataclass field that carries its documentation and its limits (`low`, `high` inclusive, `above` exclusive)."""
    metadata = {"doc": doc, "unit": unit, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of the group classes: checks every value against the limits its field declares."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value, limits = getattr(self, item.name), item.metadata
            if value is None or not limits:
                continue
            for one in value if isinstance(value, list) else [value]:
                _check(self.prefix() + item.name, one, limits)

    @classmethod
    def prefix(cls) -> str:
        """Return what stands before a field's name in its key: the group and a dot, nothing for a command's own fields."""
        name = cls.__name__
        return name.removesuffix("Config").lower() + "." if name.endswith("Config") else ""


def _check(key: str, value: Any, limits: Any) -> None:
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f"{key} must be one of {', '.join(map(str, limits['choices']))}. Got {value!r} instead.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number. Got {value} instead.")
    if limits["low"] is not None and value < limits["low"]:
        raise ConfigError(f"{key} must be at least {limits['low']}. Got {value} instead.")
    if limits["high"] is not None and value > limits["high"]:
        raise ConfigError(f"{key} must be at most {limits['high']}. Got {value} instead.")
    if limits["above"] is not None and value <= limits["above"]:
        raise ConfigError(f"{key} must be above {limits['above']}. Got {value} instead.")


@dataclass
class MachineConfig(Checked):
    """What we run on."""

    device: str = option("cpu", "cpu: the processor; cuda: GPUs, a rank each (train, embed, bench step)", choices=("cpu", "cuda"))
    threads_per_rank: Optional[int] = option(None, "compute threads of each rank; null: the usable cores divided by the ranks", low=1)
    spare_cores: int = option(
        0, "cores of each NUMA node on which nothing is computed: room for the loader's threads and the one that calls oneCCL", low=0
    )
    pin: bool = option(True, "bind each rank to its own cores and the memory next to them")
    allocator: str = option(
        "keep",
        "keep: hold on to freed memory, large tensors in huge pages (about 1.3× faster); system: leave malloc and torch alone",
        choices=("keep", "system"),
    )


@dataclass
class ScreenConfig(Checked):
    """What was imaged: where the plates are, and which fields of view to use."""

    root: Optional[str] = option(None, "folder with the CSV files (plain or .gz) and the images")
    cache: Optional[str] = option(None, "folder for what is computed once (index, measurements, shading); null: <plates.root>/.hcsdl")
    query: Optional[str] = option(None, "pandas expression over the index's columns that selects fields; null: all")
    control: str = option("DMSO", "compound name of the negative control")
    pixel_size_um: Optional[float] = option(None, "edge of a pixel; null: unknown", unit="µm", above=0)

    @classmethod
    def prefix(cls) -> str:
        """Return what stands before a field's name in its key."""
        return "plates."


@dataclass
class PlatesConfig(ScreenConfig):
    """What was imaged: where the plates are, which fields of view to use, and how they are split."""

    split: str = option(
        "random_well", "how fields are parted into train and val; random_field is leaky: sister fields on both sides", choices=SPLITS
    )
    val_fraction: float = option(0.2, "share of fields, wells, plates or batches held out", above=0, high=0.9)
    fold: int = option(0, "which fold is held out, with split=compound_folds", low=0)
    split_seed: Optional[int] = option(None, "seed of the split; null: the command's seed", low=0, high=2**63 - 1)


@dataclass
class CheckConfig(Checked):
    """How deep `hcsdl check` looks."""

    level: str = option(
        "files",
        "metadata: CSV files only; files: and every image's header; pixels: and every pixel",
        choices=("metadata", "files", "pixels"),
    )
    workers: Optional[int] = option(None, "processes; null: the usable cores", low=1)


@dataclass
class LoadingConfig(Checked):
    """How fields are read."""

    workers: int = option(2, "loader threads a rank; 0: load in the computing thread", low=0)
    prefetch: int = option(4, "mini-batches kept ready", low=1)
    on_bad_image: str = option(
        "raise", "raise: stop at an unreadable image; skip: leave the field out, count and list it", choices=("raise", "skip")
    )
    max_bad_fields: int = option(20, "more unreadable fields than this stop the run, with on_bad_image=skip", unit="fields", low=0)

    @classmethod
    def prefix(cls) -> str:
        """Return what stands before a field's name in its key."""
        return "data."


@dataclass
class DataConfig(LoadingConfig):
    """Index table → mini-batches."""

    crop_px: Optional[List[int]] = option(None, "rows and columns of a random (val: centred) crop; null: whole fields", unit="px", low=8)
    downsample: int = option(1, "average this many pixels a side into one; 1: full resolution", low=1)
    illumination: str = option(
        "none", "shading correction per plate and channel, smoothed over its fields", choices=("none", "median", "mean")
    )
    intensity: str = option(
        "dmso_meansd", "scaling per plate and channel, fitted on its control wells", choices=("none", "dmso_meansd", "dmso_percentiles")
    )
    flips: bool = option(True, "flip rows and columns at random when training")
    quarter_turns: bool = option(True, "turn by quarter turns at random when training (half turns only where fields are not square)")
    intensity_jitter: float = option(0.1, "sd of a random gain and offset per channel when training, in units of the scaled image", low=0)
    sampling: str = option(
        "all",
        "all: every field once a pass; capped: at most data.cap fields a treatment; balanced: classes alike",
        choices=("all", "capped", "balanced"),
    )
    cap: int = option(12, "fields a treatment and pass, with sampling=capped", unit="fields", low=1)
    stage: Optional[str] = option(
        None, "folder on the node's own disk; fields are copied there once and read from there; null: read plates.root"
    )


@dataclass
class ModelConfig(Checked):
    """Tensor → feature map → embedding → logits."""

    name: str = option("resnet18", "the network", choices=MODELS)
    width: float = option(1.0, "multiplies the number of channels of every layer", above=0, high=16)
    zero_init_residual: bool = option(True, "start every residual branch at zero (ResNet)")
    head: str = option(
        "fc", "M-CNN: fc, the published 41.9 M fully connected layer; pool: global average pooling instead", choices=("fc", "pool")
    )
    weights: Optional[str] = option(None, "torchvision .pth or .safetensors file to start from; null: from scratch")
    checkpoint_activations: str = option(
        "none",
        "what the backward pass recomputes instead of keeping it: none; selective: all but convolutions that cost much "
        "(ResNet-50: 0.6 of the memory an image, a tenth slower; M-CNN: as none); full: whole blocks or columns, about a third slower",
        choices=("none", "selective", "full"),
    )


@dataclass
class KernelsConfig(Checked):
    """How the model's operators run on this processor."""

    name: str = option(
        "auto",
        "reference: fp32; native: bf16, stock PyTorch; ipex: bf16, IPEX; fused: native and our own operators, compiled at their first use; "
        "auto: fused, else ipex, else native; all but reference fp32 where the processor has no bf16; on GPUs auto is native, ipex and fused are not to be had",
        choices=("auto", "reference", "native", "ipex", "fused"),
    )


@dataclass
class DistributedConfig(Checked):
    """Many ranks, one model."""

    backend: str = option(
        "auto",
        "collective communication library; auto: the faster of ccl (oneCCL) and gloo, timed at start, and nccl between GPUs",
        choices=("auto", "ccl", "gloo", "nccl"),
    )
    ranks: Optional[int] = option(
        None,
        "ranks on this machine; null: one a NUMA node, two where there is one node of several cores, one in a single task of srun; one a GPU",
        low=1,
    )
    interface: Optional[str] = option(
        None, "network interface the ranks talk over, e.g. ib0; null: the one the first rank's host is reached by"
    )
    bucket_mib: float = option(
        25.0, "gradients are averaged in buckets of this size while the backward pass goes on", unit="MiB", above=0, high=1e5
    )
    gradient_dtype: str = option("fp32", "what gradients are sent as; bf16: half the bytes, rounded", choices=("fp32", "bf16"))
    timeout_s: float = option(600.0, "a collective or rendezvous that takes longer means a lost rank", unit="s", above=0, high=1e6)
    silence_s: float = option(30.0, "a rank not heard of for so long is lost", unit="s", low=1, high=1e6)
    stall_s: float = option(
        45.0,
        "a rank that stays behind the others inside a step, or over a mini-batch that is scored or embedded, for so long is lost, or for two recent ones if longer",
        unit="s",
        low=1,
        high=1e6,
    )
    max_restarts: int = option(0, "times the ranks are started again after one was lost, from the last checkpoint", low=0)


@dataclass
class ObjectiveConfig(Checked):
    """What the network learns."""

    name: str = option("classification", "cross-entropy over the classes of training.target", choices=("classification",))
    label_smoothing: float = option(0.1, "probability mass spread over the other classes", low=0, high=0.99)


@dataclass
class TrainingConfig(Checked):
    """Objective + loop → weights."""

    target: str = option("MoA", "metadata column to learn: MoA, Compound, Treatment, or any other Metadata_* column")
    epochs: float = option(20, "passes over the sampled fields", unit="epochs", above=0, high=1e6)
    max_steps: Optional[int] = option(None, "stop after this many steps; null: after training.epochs", unit="steps", low=1)
    global_batch_size: int = option(8, "fields an optimizer step, over all ranks", unit="fields", low=1)
    mini_batch_size: Optional[Union[int, str]] = option(
        None,
        "fields a rank takes at once, a number; fewer than its share: gradients accumulate; null: its share; auto: the most that fit into memory",
        unit="fields",
    )
    memory_share: float = option(0.8, "share of a node's or GPU's memory that mini_batch_size=auto may fill", above=0, high=1)
    optimizer: str = option("sgd", "sgd (Nesterov), adamw or lars", choices=("sgd", "adamw", "lars"))
    learning_rate: float = option(0.05, "peak learning rate", above=0)
    warmup_learning_rate: float = option(0.0, "learning rate the warm-up starts from", low=0)
    final_learning_rate: float = option(0.0, "learning rate the schedule ends at", low=0)
    warmup_epochs: float = option(1.0, "length of the linear warm-up", unit="epochs", low=0)
    schedule: str = option("cosine", "learning rate after the warm-up", choices=("linear", "cosine", "constant"))
    momentum: float = option(0.9, "momentum of sgd and lars", low=0, high=0.999)
    weight_decay: float = option(5e-5, "L2 penalty (adamw: decoupled); none on norms and biases", low=0)
    clip_norm: Optional[float] = option(None, "largest gradient norm; null: no clipping", above=0)
    resume: str = option("auto", "auto: go on where this run folder stands; never: refuse a used folder; <path>: start from a checkpoint")
    validate_every_epochs: int = option(1, "passes between two evaluations; the last step is always evaluated", unit="epochs", low=1)
    checkpoint_every_s: float = option(300.0, "time between two checkpoints; one is also written after every evaluation", unit="s", low=0)
    checkpoint_every_steps: Optional[int] = option(
        None, "steps between two checkpoints, besides the above; null: none", unit="steps", low=1
    )
    keep_checkpoints: int = option(2, "newest checkpoints kept, besides the best", low=1)
    journal_every_s: float = option(2.0, "time between two journal lines", unit="s", low=0)
    metric: str = option(
        "well_accuracy",
        "what `best` means, and what a sweep's table is sorted by",
        choices=("well_accuracy", "val_accuracy", "val_macro_f1"),
    )
    strict_budget: bool = option(False, "refuse to start what would outlast Slurm's time limit or the node's memory; false: warn")
    baseline: bool = option(True, "print a logistic regression on simple intensity features beside every figure")

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.mini_batch_size
        if not (size in (None, "auto") or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)):
            raise ConfigError(f"training.mini_batch_size must be a number from 1, null or auto. Got {size!r} instead.")

    @property
    def fixed_mini_batch(self) -> int | None:
        """The mini-batch size where it is a number; None where it follows from the ranks or from the memory."""
        return self.mini_batch_size if isinstance(self.mini_batch_size, int) else None


@dataclass
class SimulateConfig(Checked):
    """Drawn plates in BBBC021's layout; null fields are taken from the preset."""

    preset: str = option(
        "demo",
        "tiny: seconds, 128 × 160; demo: full resolution, six MoAs and DMSO; bbbc021_like: BBBC021's plate map, ten batches, full resolution; "
        "bbbc021_reduced: 512 × 640 of it; bbbc021_tiny: three MoAs of it, 128 × 160",
        choices=("tiny", "demo", "bbbc021_like", "bbbc021_reduced", "bbbc021_tiny"),
    )
    effect: float = option(1.0, "strength of every compound's phenotype; 0: no compound does anything", low=0, high=10)
    height_px: Optional[int] = option(None, "rows of a field", unit="px", low=32)
    width_px: Optional[int] = option(None, "columns of a field", unit="px", low=32)
    moas: Optional[int] = option(None, "mechanisms of action, besides DMSO", low=1, high=12)
    compounds_per_moa: Optional[int] = option(None, "compounds of each mechanism", low=1)
    concentrations: Optional[int] = option(None, "active concentrations of each compound", low=1)
    replicates: Optional[int] = option(None, "wells of each treatment, each on another plate", low=1)
    sites: Optional[int] = option(None, "fields a well", low=1)
    batches: Optional[int] = option(None, "batches of plates", low=1)
    plates_per_batch: Optional[int] = option(None, "plates a batch", low=1)
    workers: Optional[int] = option(None, "processes; null: the usable cores", low=1)


class BenchConfig(Checked):
    """Base of the benchmarks' groups, each of which is its command's `bench`."""

    @classmethod
    def prefix(cls) -> str:
        """Return what stands before a field's name in its key."""
        return "bench."


@dataclass
class BenchCommConfig(BenchConfig):
    """What `hcsdl bench comm` measures."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, bench/<date>_<time>_comm")
    backends: List[str] = option(
        ["gloo", "ccl"], "libraries to compare; one that cannot be used is listed with the reason", choices=("gloo", "ccl")
    )
    operations: List[str] = option(["all_reduce"], "collectives", choices=("all_reduce", "broadcast", "all_gather"))
    dtypes: List[str] = option(["fp32", "bf16"], "element types", choices=("fp32", "bf16"))
    sizes_kib: List[int] = option([1, 8, 64, 1024, 8192, 25600, 102400, 262144], "sizes of the whole buffer", unit="KiB", low=1, high=2**24)
    rounds: int = option(10, "rounds; in each every size is timed 20 times (to 64 KiB), 5 times (to 4 MiB) or once", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("backends", "operations", "dtypes", "sizes_kib"):
            if not getattr(self, name):
                raise ConfigError(f"bench.{name} must not be empty.")


@dataclass
class BenchScaleConfig(BenchConfig):
    """What `hcsdl bench scale` measures here, and the cluster it predicts."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, bench/<date>_<time>_scale")
    models: List[str] = option(["resnet18", "mcnn"], "networks", choices=MODELS)
    image_px: List[int] = option([1024, 1280], "rows and columns of a field", unit="px", low=32)
    mini_batches: List[int] = option([1, 2], "fields a rank and step that are measured; the largest is verified", unit="fields", low=1)
    rounds: int = option(3, "rounds of all measurements; medians over them are reported", low=1)
    steps: int = option(2, "steps of each kind a round", unit="steps", low=1)
    verify: bool = option(False, "also take real training steps over these ranks, interleaved, and compare")
    nodes: List[int] = option([1, 2, 4, 8, 16], "nodes to predict", low=1)
    ranks_per_node: Optional[int] = option(None, "ranks on each of them; null: as here", low=1)
    cores_per_rank: Optional[int] = option(None, "cores of each rank; null: as many as threads here", low=1)
    mini_batch: Optional[int] = option(None, "fields a rank and step to predict; null: the largest measured", unit="fields", low=1)
    bandwidth_gbit_s: Optional[float] = option(
        None, "a node's link; null: measured, which takes ranks on two hosts", unit="Gbit/s", above=0
    )
    latency_us: Optional[float] = option(None, "time of the shortest message between nodes; null with bandwidth null", unit="µs", above=0)
    core_speed: List[float] = option([1.0], "speed of a core among cores_per_rank against one here: one value, or low and high", above=0)
    network_efficiency: List[float] = option(
        [1.0], "share of bandwidth_gbit_s that is reached: one value, or low and high", above=0, high=1
    )
    images: int = option(10104, "fields of the training set whose time is predicted", unit="fields", low=1)
    epochs: float = option(22.0, "passes over them", unit="epochs", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bandwidth_gbit_s is None) != (self.latency_us is None):
            raise ConfigError("bench.bandwidth_gbit_s and bench.latency_us must be given together, or both be null. Got one of them.")
        if len(self.core_speed) not in (1, 2) or len(self.core_speed) != len(self.network_efficiency):
            raise ConfigError(
                "bench.core_speed and bench.network_efficiency must both have one value, or both a low and a high one. "
                f"Got {self.core_speed} and {self.network_efficiency}."
            )
        if len(self.image_px) != 2 or not self.mini_batches or not self.models or not self.nodes:
            raise ConfigError("bench.image_px must be rows and columns, and bench.models, mini_batches and nodes must not be empty.")
        if len(set(self.mini_batches)) == 1 and self.mini_batch not in (None, self.mini_batches[0]):
            raise ConfigError(
                f"bench.mini_batch={self.mini_batch} can be predicted from two bench.mini_batches or itself. Got {self.mini_batches}."
            )


@dataclass
class BenchStepConfig(BenchConfig):
    """What `hcsdl bench step` measures: one whole training step on random images in memory, every variant in processes of its own."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, bench/<date>_<time>_step")
    models: List[str] = option(list(MODELS), "networks", choices=MODELS)
    variants: Optional[List[str]] = option(
        None,
        "ways to run a step; fp32 and compiled in the first round only; null: all, hcsdl_lean only with bench.targets and ResNet-50",
        choices=STEP_VARIANTS,
    )
    rounds: int = option(
        5, "rounds at most, in each of which every variant has its turn; fewer, but 3, where a network would take over 7 minutes", low=1
    )
    steps: Optional[int] = option(None, "steps timed in a turn, after one that is not; null: as many as fit into 3 s", unit="steps", low=1)
    mini_batch_size: int = option(2, "images a rank and step", unit="images", low=1)
    image_size: List[int] = option([1024, 1280], "rows and columns of an image", unit="px", low=33)
    width: float = option(1.0, "multiplies the number of channels of every layer", above=0, high=16)
    memory: bool = option(True, "also measure memory per image, in short processes with 2 and 6 images")
    targets: bool = option(False, "also measure each network's ceiling, and mark each target of this project met or not")
    preload: Optional[str] = option(
        None, "allocator's shared library for the variants that preload one; null: the system's tcmalloc, else jemalloc"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_images(self)
        if self.variants is not None and not self.variants:
            raise ConfigError("bench.variants must not be empty. Got []: name some, or null for all.")


@dataclass
class BenchProfileConfig(BenchConfig):
    """What `hcsdl bench profile` looks into."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, bench/<date>_<time>_profile")
    models: List[str] = option(["resnet50"], "networks", choices=MODELS)
    rounds: int = option(3, "rounds over the ways to run a convolution; the median counts", low=1)
    mini_batch_size: int = option(2, "images a step", unit="images", low=1)
    image_size: List[int] = option([1024, 1280], "rows and columns of an image", unit="px", low=33)
    width: float = option(1.0, "multiplies the number of channels of every layer", above=0, high=16)
    operators: int = option(12, "operators printed; all are saved", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_images(self)


def _check_images(bench: Any) -> None:
    if len(bench.image_size) != 2 or not bench.models:
        raise ConfigError(
            f"bench.image_size must be rows and columns, and bench.models not empty. Got {bench.image_size} and {bench.models}."
        )


@dataclass
class BenchDataConfig(BenchConfig):
    """What `hcsdl bench data` measures: the loader alone, on drawn fields in the page cache."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, bench/<date>_<time>_data")
    compressions: List[str] = option(["none", "deflate", "lzw"], "how the TIFF files are compressed", choices=("none", "deflate", "lzw"))
    image_size: List[int] = option([1024, 1280], "rows and columns of a field", unit="px", low=32)
    fields: int = option(12, "different fields, rounded up to a multiple of three", unit="fields", low=1)
    mini_batch_size: int = option(2, "fields a mini-batch", unit="fields", low=1)
    seconds: float = option(2.0, "length of a turn at least", unit="s", above=0)
    rounds: int = option(5, "rounds, in each of which every compression has its turn", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_size) != 2 or not self.compressions:
            raise ConfigError("bench.image_size must be rows and columns, and bench.compressions not empty.")


@dataclass
class EmbedConfig(Checked):
    """How a network's view of the plates becomes a table."""

    output: Optional[str] = option(
        None, "the table, a .parquet file; null: <run folder>/embeddings/<name of plates.root>.parquet, other choices added to the name"
    )
    by: str = option("field", "a row per field of view, or per well: the mean of its fields", choices=("field", "well"))
    weights: str = option(
        "trained",
        "trained: the checkpoint's; random: drawn from the seed, the baseline that has the same shape and has learned nothing",
        choices=("trained", "random"),
    )
    mini_batch_size: int = option(4, "fields a rank takes at once; the last mini-batch is padded", unit="fields", low=1)
    save_every_s: float = option(10.0, "time between two saves of what is computed; a killed command goes on from there", unit="s", low=0)


@dataclass
class ScoreConfig(Checked):
    """How profiles are read, normalised and scored."""

    output: Optional[str] = option(None, "folder for the results; null: a new one, scores/<date>_<time>")
    names: List[str] = option([], "names of the tables; tables of one name are runs of one method; empty: taken from run folders and files")
    control: str = option("DMSO", "compound name of the negative control")
    columns: List[str] = option([], "Metadata_Plate:Its_Name pairs, for metadata columns of another name")
    features: List[str] = option(
        [], "beginnings of the feature columns; empty: Embedding_, else CellProfiler's compartments, else all other numbers"
    )
    query: Optional[str] = option(None, "pandas expression over the table's columns that selects rows; null: all")
    pipeline: List[str] = option(
        ["standardise_control"],
        "normalisation steps, in turn, of the scores; the ladder of usual ones is always printed too",
        choices=NORMALISATIONS,
    )
    regularisation: float = option(
        0.01, "share of the mean eigenvalue added to the controls' covariance before sphering and TVN", low=0, high=100
    )
    target: Optional[str] = option(None, "metadata column that Prob_<class> predict; null: the one the classes' names occur in")
    folds: bool = option(False, "the tables are the folds of plates.split=compound_folds: merge their held-out compounds")
    draws: int = option(10_000, "draws of compounds for intervals and p-values", low=100, high=1_000_000)
    null_size: int = option(10_000, "random rankings for the p-values of mean average precision", low=100, high=1_000_000)


@dataclass
class ReportConfig(Checked):
    """What stands in a report, and where it goes."""

    output: Optional[str] = option(None, "folder for report.html and pictures/; null: a new one, reports/<date>_<time>")
    title: Optional[str] = option(None, "head of the page; null: what the report is of")
    compound: Optional[str] = option(None, "compound to look at closely; null: the one most worth a look")
    columns: List[str] = option(
        [], "columns of the profile table to draw on the plates; empty: nucleus count, and the intensity that differs most"
    )
    plates: Optional[str] = option(None, "folder of the plates, for pictures of fields; null: where the run read them")
    fields: int = option(4, "best and worst fields shown, of each; 0: none", unit="fields", low=0, high=24)


@dataclass
class Command(Checked):
    """Settings every command has."""

    seed: int = option(0, "seed of everything random", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "machine", None) and self.machine.device == "cuda":  # type: ignore[attr-defined]
            _check_on_gpus(self)


def _check_on_gpus(command: Any) -> None:
    """Raise ConfigError where a command, or a way it is to work in, is of processors alone."""
    if not isinstance(command, (TrainCommand, EmbedCommand, BenchStepCommand)):
        raise ConfigError(
            "machine.device=cuda is for train, embed and bench step; this command looks at processors: set machine.device=cpu."
        )
    kernels = command.kernels.name if hasattr(command, "kernels") else "auto"
    if kernels in ("ipex", "fused"):
        raise ConfigError(f"kernels={kernels} is for processors. With machine.device=cuda use auto, native (bf16) or reference (fp32).")
    if command.distributed.backend == "ccl":
        raise ConfigError("distributed.backend=ccl is for processors. With machine.device=cuda use auto, nccl or gloo.")
    if getattr(getattr(command, "bench", None), "targets", False):
        raise ConfigError("bench.targets=true is of processors. Got machine.device=cuda too: set one of them otherwise.")


@dataclass
class TrainCommand(Command):
    """Train a network on plates: a run folder with weights, journal and summary."""

    run_dir: Optional[str] = option(None, "run folder; null: a new one, runs/<date>_<time>_<name>")
    name: str = option("train", "short name of the experiment")
    machine: MachineConfig = field(default_factory=MachineConfig)
    plates: PlatesConfig = field(default_factory=PlatesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or "/" in self.name:
            raise ConfigError(f"name must be a word that can end a folder's name. Got {self.name!r} instead.")


@dataclass
class CheckCommand(Command):
    """Look at plates before training: counts, missing and broken images, quality."""

    plates: PlatesConfig = field(default_factory=PlatesConfig)
    check: CheckConfig = field(default_factory=CheckConfig)


@dataclass
class SimulateCommand(Command):
    """Draw plates in BBBC021's exact layout into plates.root."""

    plates: PlatesConfig = field(default_factory=PlatesConfig)
    simulate: SimulateConfig = field(default_factory=SimulateConfig)


@dataclass
class RanksCommand(Command):
    """Settings of the commands that are about ranks, not plates."""

    machine: MachineConfig = field(default_factory=MachineConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass
class CheckMachineCommand(RanksCommand):
    """Look at this machine before training: cores, bf16, libraries, network, limits, and the ranks that would be started."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)


@dataclass
class BenchCommCommand(RanksCommand):
    """Measure latency and bandwidth of the collectives between the ranks, through each backend."""

    bench: BenchCommConfig = field(default_factory=BenchCommConfig)


@dataclass
class BenchScaleCommand(RanksCommand):
    """Predict images/s, efficiency and time to train on a cluster, from measurements made here."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    bench: BenchScaleConfig = field(default_factory=BenchScaleConfig)


@dataclass
class BenchStepCommand(RanksCommand):
    """Measure training steps on this machine: PyTorch's and IPEX's documented ways and hcsdl's, in turn, beside the processor's own limit."""

    bench: BenchStepConfig = field(default_factory=BenchStepConfig)


@dataclass
class BenchProfileCommand(RanksCommand):
    """Show where a training step's time goes: operators, rates of every convolution, and the ceiling they set."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    bench: BenchProfileConfig = field(default_factory=BenchProfileConfig)


@dataclass
class BenchDataCommand(Command):
    """Measure the loader alone: fields a second and core, from TIFF files to normalised tensors."""

    machine: MachineConfig = field(default_factory=MachineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    bench: BenchDataConfig = field(default_factory=BenchDataConfig)


@dataclass
class SweepCommand(Checked):
    """Print the table of a sweep as it stands: finished runs by their metric, failed and missing ones."""

    folder: Optional[str] = option(None, "the sweep's folder: multirun/<job> of slurm/sweep.sbatch, multirun/<date>_<time> of `train -m`")


@dataclass
class EmbedCommand(Command):
    """Run a trained network over plates: a table of embeddings, class probabilities, intensities and cell counts."""

    checkpoint: Optional[str] = option(None, "run folder, of which the last checkpoint is taken, or a checkpoint file in one")
    machine: MachineConfig = field(default_factory=MachineConfig)
    plates: ScreenConfig = field(default_factory=ScreenConfig)
    data: LoadingConfig = field(default_factory=LoadingConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class ScoreCommand(Command):
    """Score profile tables: mechanisms of action by nearest neighbour, with intervals, baselines and comparisons."""

    profiles: Any = option(
        None, "profile table, CSV or parquet, or several as [a,b]: the first is compared with the others; random networks are baselines"
    )
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(path, str) and path for path in self.tables):
            raise ConfigError(f"profiles must be a file, or several as [a,b]. Got {self.profiles!r} instead.")

    @property
    def tables(self) -> list[str]:
        """Return the tables' paths, whether one or several were given; Hydra has no type for either."""
        return [] if self.profiles is None else list(self.profiles) if isinstance(self.profiles, list) else [self.profiles]


@dataclass
class ReportCommand(Checked):
    """Write one page to look at: what was trained, how well it tells mechanisms apart, where it fails, what to look at next."""

    run: Any = option(
        None, "run folder, or several as [a,b]: the first is shown, all are compared; null: the one the scores or profiles are of"
    )
    scores: Any = option(None, "folder that `hcsdl score` wrote, or several as [a,b]; the first decides the answers")
    profiles: Optional[str] = option(None, "profile table of `hcsdl embed`; null: the one that was scored, or lies in the run folder")
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("run", "scores"):
            given = getattr(self, name)
            if not all(isinstance(path, str) and path for path in _listed(given)):
                raise ConfigError(f"{name} must be a folder, or several as [a,b]. Got {given!r} instead.")

    @property
    def runs(self) -> list[str]:
        """Return the run folders, whether one or several were given."""
        return _listed(self.run)

    @property
    def score_folders(self) -> list[str]:
        """Return the score folders, whether one or several were given."""
        return _listed(self.scores)


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


COMMANDS = {
    "simulate": SimulateCommand,
    "check": CheckCommand,
    "check machine": CheckMachineCommand,
    "train": TrainCommand,
    "sweep": SweepCommand,
    "embed": EmbedCommand,
    "score": ScoreCommand,
    "report": ReportCommand,
    "bench comm": BenchCommCommand,
    "bench scale": BenchScaleCommand,
    "bench step": BenchStepCommand,
    "bench profile": BenchProfileCommand,
    "bench data": BenchDataCommand,
}  # the order of `hcsdl --help`; a command of two words lives in conf/<first>_<second>.yaml and commands/<first>_<second>.py


def file_name(command: str) -> str:
    """Return the name a command's YAML file and module have."""
    return command.replace(" ", "_")


def register() -> None:
    """Store one schema per command with Hydra, under the name `<command>_schema`."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=f"{file_name(name)}_schema", node=schema)
