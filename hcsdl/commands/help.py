"""`--help`: every command, and every field of a command, from the dataclasses' own documentation, with the values it has when nothing is given."""

from __future__ import annotations

import dataclasses
import textwrap
import typing

from hcsdl.commands.compose import compose_command, value_of
from hcsdl.config import COMMANDS

USAGE = "hcsdl <command> [key=value …] [-m] [--help] [--cfg job]"


def overview(beginning: str = "") -> str:
    """Return the text of `hcsdl --help`: the commands that begin with `beginning`, a line each."""
    lines = [f"usage: {USAGE}", "", "commands:"]
    lines += [f"  {name:14s} {(schema.__doc__ or '').splitlines()[0]}" for name, schema in COMMANDS.items() if name.startswith(beginning)]
    lines += [
        "",
        "`hcsdl <command> --help` lists its settings; `--cfg job` prints the resolved configuration; `-m` sweeps comma-separated values.",
    ]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """Return the text of `hcsdl <name> --help`: every field with type, default, unit and its line."""
    schema, usual = COMMANDS[name], compose_command(name, [])
    usage = USAGE.replace("<command>", name)
    lines = [f"usage: {usage if name == 'train' else usage.replace(' [-m]', '')}", "", (schema.__doc__ or "").splitlines()[0], ""]
    lines += [_options(name)] if _options(name) else []
    for title, owner in [("", schema), *_groups(schema)]:
        if title:
            lines += ["", f"{title}: {(owner.__doc__ or '').splitlines()[0]}"]
        hints = typing.get_type_hints(owner)
        for item in dataclasses.fields(owner):
            if item.metadata.get("doc"):
                key = f"{title}.{item.name}" if title else item.name
                lines += _field(key, item, hints[item.name], value_of(usual, key))
    return "\n".join(lines)


def _options(name: str) -> str:
    """Return a line per group that has named options, read from conf/."""
    from importlib.resources import files

    folders = sorted(p for p in files("hcsdl.conf").iterdir() if p.is_dir() and not p.name.startswith("_"))
    whole = {
        title for title, group in _groups(COMMANDS[name]) if group.__name__ == f"{title.capitalize()}Config"
    }  # not a part of its settings
    known = whole | ({"experiment"} if name == "train" else set())
    lines = []
    for folder in folders:
        options = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
        if folder.name in known and options:
            lines.append(f"  {folder.name}={'|'.join(options)}")
    return "\n".join(["choices, each a file in conf/:", *lines]) if lines else ""


def _groups(schema: type) -> list[tuple[str, type]]:
    return [(f.name, f.default_factory) for f in dataclasses.fields(schema) if dataclasses.is_dataclass(f.default_factory)]  # type: ignore[misc]


def _field(key: str, item: dataclasses.Field, hint: object, value: object) -> list[str]:
    unit = f" {item.metadata['unit']}" if item.metadata["unit"] else ""
    choices = f" ({'|'.join(map(str, item.metadata['choices']))})" if item.metadata["choices"] else ""
    head = f"  {key}: {_type(hint)} = {_value(value)}{unit}"
    said = textwrap.wrap(item.metadata["doc"] + choices, 110, initial_indent="      ", subsequent_indent="      ", break_long_words=False)
    return [head, *said]


def _value(value: object) -> str:
    """Return a value as it is given on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(hint: object) -> str:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is list:
        return f"list[{_type(arguments[0])}]"
    if arguments:
        return " or ".join([*map(_type, arguments), "null"])
    return getattr(hint, "__name__", str(hint))
