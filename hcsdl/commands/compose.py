"""Words → a validated dataclass. Hydra and OmegaConf stay in here and in the sweep; every complaint of theirs becomes one line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from hcsdl.config import COMMANDS, ConfigError, file_name, register


def compose_command(name: str, overrides: Sequence[str]) -> object:
    """Return the config object of command `name` with `overrides` (`key=value`, `group=option`) applied. Raises ConfigError, one line."""
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("hcsdl.conf", version_base="1.3"):
            composed = compose(file_name(name), overrides=list(overrides))
        return resolve(composed, name)
    except ConfigError:
        raise
    except Exception as error:  # Hydra raises ValueError, AssertionError and others besides its own
        raise ConfigError(one_line(error, name)) from error
    finally:
        GlobalHydra.instance().clear()


def resolve(composed: DictConfig, name: str) -> object:
    """Return the dataclass of command `name` that a composed config describes; values are checked as it is made, `+new=1` is refused."""
    known = known_keys(COMMANDS[name])
    for key in _dotted(composed):
        if key not in known:
            raise ConfigError(_unknown(key, name))
    return OmegaConf.to_object(composed)


def _dotted(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in config:
        value = config._get_node(name)
        keys += _dotted(value, f"{prefix}{name}.") if isinstance(value, DictConfig) and not value._is_none() else [f"{prefix}{name}"]
    return keys


def _unknown(key: str, command: str) -> str:
    known = known_keys(COMMANDS[command])
    group, _, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if group and name.rpartition(".")[0] == group}
    found = difflib.get_close_matches(last, beside, n=1) if beside else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = [beside.get(name, name) for name in found]
    return f"{key} is not a setting of `hcsdl {command}`.{f' Did you mean {near[0]}?' if near else ''} `hcsdl {command} --help` lists all."


def to_yaml(config: object) -> str:
    """Return a config object as YAML text; `from_yaml` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(name: str, text: str) -> object:
    """Return the config object of command `name` that `to_yaml` wrote."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(COMMANDS[name]), OmegaConf.create(text)))


def to_overrides(config: object, default: object, *, leave_out: Sequence[str] = ()) -> list[str]:
    """Return the words, quoted for a shell, that make `default` equal to `config` (both of one command), but for the keys in `leave_out`."""
    given, usual = values(config), values(default)
    return [shlex.quote(f"{key}={_hydra(value)}") for key, value in given.items() if value != usual[key] and key not in leave_out]


def _hydra(value: object) -> str:
    """Return a value as Hydra's override grammar writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str) and not (
        re.fullmatch(r"[A-Za-z_/.][\w/.:-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf")
    ):
        # In quotes a backslash is one, but before a quote it must stand twice, and a quote is escaped by one.
        return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value) + '"'
    return str(value)


def config_hash(config: object) -> str:
    """Return 16 hex digits over every value of a config object."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]  # type: ignore[call-overload]


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a command's schema, groups and leaves."""
    keys = []
    for item in dataclasses.fields(schema):
        keys.append(prefix + item.name)
        default = item.default_factory if item.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            keys += known_keys(default, f"{prefix}{item.name}.")
    return keys


def settings(schema: type) -> list[str]:
    """Return every dotted key of a command's schema that holds a value, groups left out."""
    keys = known_keys(schema)
    return [key for key in keys if not any(other.startswith(key + ".") for other in keys)]


def values(config: object) -> dict[str, object]:
    """Return every setting of a command's config object by its dotted key."""
    return {key: value_of(config, key) for key in settings(type(config))}


def value_of(config: object, key: str) -> object:
    """Return the value of one dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


KINDS = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}  # OmegaConf's names, and ours


def one_line(error: Exception, command: str) -> str:
    """Return Hydra's or OmegaConf's complaint as one line that names the key, and the nearest known key where it is unknown."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", str(error))
    key = (
        getattr(cause, "full_key", None) or getattr(error, "full_key", None) or (unknown.group(1) or unknown.group(2) if unknown else None)
    )
    if unknown and "not in" in f"{error} {cause}" and key:
        return _unknown(key, command)
    if text.startswith("Ambiguous value"):
        return f"{text.split(chr(39))[1]} holds several values: add -m to run them all, or write a list as [a,b]."
    if "Could not find" in text and "Available options in" in text:
        group = re.search(r"Available options in '([^']+)': (.*?)(?: Config search path|$)", text)
        found = re.search(r"Could not find '([^']+)'", text)
        if group and found:
            return f"{group.group(1)} must be one of {', '.join(group.group(2).split())}. Got {found.group(1).split('/')[-1]!r} instead."
    if getattr(error, "override", None):
        return f"{error.override} cannot be read as key=value: {str(error).splitlines()[0]}; quote special characters."
    unlike = re.match(
        r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to (Float|Integer)|is not a valid (bool))", str(cause or error)
    )
    if unlike and key:
        return f"{key} must be {KINDS[unlike[2] or unlike[3]]}. Got {unlike[1]!r} instead."
    if key and (single := re.search(r"(\w+) is not a ListConfig", str(cause or error))):
        return f"{key} must be a list, written [a,b]. Got one {single[1]} instead."
    detail = " ".join(str(cause).split("\n")[0].split()) if cause is not None else str(error).split("\n")[0]
    return f"{key}: {detail}" if key and key not in detail else detail or text
