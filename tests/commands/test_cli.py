"""The command line: help, composed configuration, and one line with exit code 2 for whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.commands.cli import main
from hcsdl.commands.compose import compose_command, config_hash, from_yaml, known_keys, to_yaml
from hcsdl.commands.train import MAY_CHANGE, differences
from hcsdl.config import COMMANDS, ConfigError

pytestmark = pytest.mark.xeon_only
EXPERIMENTS = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, schema in COMMANDS.items():
        assert f"{name:14s} {schema.__doc__.splitlines()[0]}" in out


@pytest.mark.parametrize("words", [["bench"], ["bench", "--help"]])
def test_help_of_bench_lists_its_commands(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "  bench step  " in out and "  bench data  " in out and "  train  " not in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_prints_every_field(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    leaves = [key for key in known_keys(COMMANDS[name]) if not any(other.startswith(key + ".") for other in known_keys(COMMANDS[name]))]
    for key in leaves:
        assert f"  {key}: " in out
    assert "training.epochs: float = 20 epochs" in out or name != "train"
    assert "bench.core_speed: list[float] = [0.5,1]\n" in out or name != "bench scale"  # as conf/ has it, not the dataclass


@pytest.mark.parametrize("schema", COMMANDS.values())
def test_every_field_is_documented(schema: type) -> None:
    def walk(owner: type) -> None:
        for item in dataclasses.fields(owner):
            if dataclasses.is_dataclass(item.default_factory):
                walk(item.default_factory)
            else:
                assert item.metadata["doc"], f"{owner.__name__}.{item.name}"

    walk(schema)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "the command must be one of simulate, check, check machine, train"),
        (["training.epochs=3"], "a command must come first"),
        (["train", "training.epochz=3"], "Did you mean training.epochs?"),
        (["train", "+new=3"], "new is not a setting of `hcsdl train`"),
        (["train", "++training.new=3"], "training.new is not a setting"),
        (["train", "training.epochs=abc"], "training.epochs must be a number. Got 'abc' instead."),
        (["train", "distributed.ranks=two"], "distributed.ranks must be a whole number. Got 'two' instead."),
        (["train", "training.baseline=maybe"], "training.baseline must be true or false. Got 'maybe' instead."),
        (["train", "data.workerz=1"], "Did you mean data.workers?"),
        (["train", "training.epochs=0"], "training.epochs must be above 0. Got 0.0 instead."),
        (["train", "training.epochs=nan"], "training.epochs must be a finite number"),
        (["train", "training.epochs=null"], "training.epochs"),
        (["train", "training.optimizer=adam"], "training.optimizer must be one of sgd, adamw, lars. Got 'adam' instead."),
        (["train", "data.crop_px=[4,64]"], "data.crop_px must be at least 8. Got 4 instead."),
        (["train", "data.crop_px=64"], "data.crop_px must be a list, written [a,b]. Got one int instead."),
        (["train", "model=resnet99"], "model must be one of mcnn, resnet18, resnet34, resnet50. Got 'resnet99' instead."),
        (["train", "experiment=none"], "experiment must be one of"),
        (["train", "training=null"], "must be a string"),
        (["train", "training.epochs=1,2"], "add -m to run them all"),
        (["train", "seed=[1"], "seed=[1"),
        (["train", "seed=-1"], "seed must be at least 0"),
        (["train", "epochs"], "a setting must be key=value. Got 'epochs' instead."),
        (["train", "--epochs=3"], "flags are -m, --help and --cfg job"),
        (["train", "--cfg", "hydra"], "--cfg must be followed by `job`"),
        (["train", "training.epochs=${nowhere}"], "training.epochs"),
        (["train"], "plates.root must be given"),
        (["check"], "plates.root must be given"),
        (["simulate"], "plates.root must be"),
        (["check", "-m", "check.level=files,pixels"], "-m sweeps `hcsdl train`"),
        (["train", "-m", "run_dir=here", "seed=1,2"], "a sweep gives each job its own run_dir"),
        (["train", "-m", "seed=1,2", "training.epochs=0,1"], "training.epochs must be above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_one_line_and_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1 and err.startswith("hcsdl: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_cfg_prints_what_the_command_would_use(experiment: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", f"experiment={experiment}", "training.epochs=3", "--cfg", "job"]) == 0
    config = from_yaml("train", capsys.readouterr().out)
    assert config == compose_command("train", [f"experiment={experiment}", "training.epochs=3"])
    assert config.training.epochs == 3


def test_the_published_recipe() -> None:
    config = compose_command("train", ["experiment=bbbc021_mcnn"])
    training = config.training
    assert training.global_batch_size == 32 * 8
    assert (training.warmup_learning_rate, training.learning_rate, training.final_learning_rate) == (0.001, 0.008, 0.0001)
    assert (training.warmup_epochs, training.momentum, training.weight_decay, training.schedule) == (5, 0.9, 5e-5, "linear")
    assert (config.objective.label_smoothing, config.model.name, config.model.head) == (0.1, "mcnn", "fc")
    assert config.plates.split == "random_field"


def test_configuration_survives_yaml_and_its_hash_sees_every_value() -> None:
    config = compose_command("train", ["data.crop_px=[64,80]", "plates.query='a > 1'"])
    again = from_yaml("train", to_yaml(config))
    assert again == config and config_hash(again) == config_hash(config)
    other = compose_command("train", ["data.crop_px=[64,88]", "plates.query='a > 1'"])
    assert config_hash(other) != config_hash(config)
    assert differences(config, other) == ["data.crop_px"]


def test_what_may_change_in_a_run_folder_are_settings() -> None:
    assert set(known_keys(COMMANDS["train"])) >= MAY_CHANGE
    assert "training.learning_rate" not in MAY_CHANGE


def test_nothing_heavy_is_imported_before_the_configuration_is_valid() -> None:
    script = "import sys; from hcsdl.commands.cli import main; print(main(['train', 'training.epochs=0']), *(m for m in ('torch', 'pandas', 'sklearn') if m in sys.modules))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["2"]


def test_config_errors_are_of_one_kind() -> None:
    with pytest.raises(ConfigError, match="plates.split must be one of"):
        compose_command("train", ["plates.split=by_eye"])
