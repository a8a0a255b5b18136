"""Instruction sets that tests run native operators with: all that this processor has, and none but to say that there is none."""

from __future__ import annotations

from types import ModuleType

import pytest

from hcsdl.kernels.native.build import INSTRUCTION_SETS, InstructionSet, library
from hcsdl.machine.cores import processor_flags

EACH = [
    pytest.param(each, id=each.name, marks=pytest.mark.skipif(not processor_flags().issuperset(each.needs), reason=f"no {each.name} here"))
    for each in INSTRUCTION_SETS
]


def use(instructions: InstructionSet, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `module`, which has `SOURCE`, `declared` and `operators`, run its operators as compiled for `instructions`."""
    made = module.declared(library(module.SOURCE, instructions))
    monkeypatch.setattr(module, "operators", lambda: made)
