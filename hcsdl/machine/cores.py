"""How many cores this process may use, and what they can do. Read from the kernel (/proc, /sys), never from torch."""

from __future__ import annotations

import re
from pathlib import Path

from hcsdl.machine.topology import read_machine

BF16_FLAGS = ("amx_bf16", "avx512_bf16")


def usable_cores() -> int:
    """Return how many physical cores this process may use: its affinity, SMT siblings counted once, and the cgroup's CPU quota."""
    return read_machine().usable_cores


def processor() -> str:
    """Return the processor's name and the bf16 instruction sets it has, e.g. `AMD EPYC (AVX512_BF16)`."""
    info = _cpuinfo()
    name = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    return f"{name.group(1).strip() if name else 'unknown processor'} ({', '.join(f.upper() for f in bf16_flags()) or 'no bf16'})"


def bf16_flags() -> list[str]:
    """Return which of AMX_BF16 and AVX512_BF16 this processor has, as the kernel spells them."""
    flags = processor_flags()
    return [f for f in BF16_FLAGS if f in flags]


def processor_flags() -> set[str]:
    """Return what this processor can do, as the kernel spells it."""
    flags = re.search(r"^flags\s*:\s*(.*)$", _cpuinfo(), re.M)
    return set(flags.group(1).split()) if flags else set()


def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
