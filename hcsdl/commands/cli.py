"""The command line: `hcsdl <command> [<subcommand>] [key=value …] [-m] [--help] [--cfg job]`.

In: words. Out: an exit code. Composes and validates the whole configuration before anything heavy is imported; whatever is wrong with it is
one line and exit code 2.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from hcsdl.commands.compose import compose_command, to_yaml
from hcsdl.commands.help import command_help, overview
from hcsdl.config import COMMANDS, ConfigError, ExitCode, file_name
from hcsdl.machine.process import forgive_standard_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code, an `ExitCode`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    forgive_standard_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _run(words)
    except KeyboardInterrupt:
        print("hcsdl: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            if not isinstance(error, OSError | MemoryError):
                raise
            code = ExitCode.FAILED
        print(f"hcsdl: {error}", file=sys.stderr)
        return code


def _run(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    if "=" in command:
        raise ConfigError(f"a command must come first, one of {', '.join(COMMANDS)}. Got {command!r} instead.")
    if not command:
        if rest and rest not in (["--help"], ["-h"]):
            raise ConfigError(f"a command must come first, one of {', '.join(COMMANDS)}. Got {rest[0]!r} instead.")
        print(overview())
        return ExitCode.DONE
    if rest and f"{command} {rest[0]}" in COMMANDS:
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command == "bench":
        if rest in ([], ["--help"], ["-h"]):
            print(overview("bench "))
            return ExitCode.DONE
        command = f"bench {rest[0]}"
    if command not in COMMANDS:
        raise ConfigError(f"the command must be one of {', '.join(COMMANDS)}. Got {command!r} instead.")
    flags, overrides = _split(rest)
    if "help" in flags:
        print(command_help(command))
        return ExitCode.DONE
    if {"multirun", "cfg"} <= flags:
        raise ConfigError("--cfg job prints one configuration. Remove -m, or --cfg job.")
    if "multirun" in flags:
        from hcsdl.commands.sweep import run_sweep

        return run_sweep(command, overrides)
    config = compose_command(command, overrides)
    if "cfg" in flags:
        print(to_yaml(config), end="")
        return ExitCode.DONE
    return importlib.import_module(f"hcsdl.commands.{file_name(command)}").run(config)


def _split(words: list[str]) -> tuple[set[str], list[str]]:
    """Part flags from overrides. Raises ConfigError at any flag but -m, --multirun, --help, -h, --cfg job."""
    flags, overrides = set(), []
    rest = iter(words)
    for word in rest:
        if word in ("-m", "--multirun"):
            flags.add("multirun")
        elif word in ("-h", "--help"):
            flags.add("help")
        elif word in ("--cfg", "-c", "--cfg=job"):
            value = "job" if word == "--cfg=job" else next(rest, None)
            if value != "job":
                raise ConfigError(f"--cfg must be followed by `job`. Got {value!r} instead.")
            flags.add("cfg")
        elif word.startswith("-"):
            raise ConfigError(f"flags are -m, --help and --cfg job; settings are key=value. Got {word!r} instead.")
        elif "=" not in word and not word.startswith("~"):
            raise ConfigError(f"a setting must be key=value. Got {word!r} instead.")
        else:
            overrides.append(word)
    return flags, overrides
