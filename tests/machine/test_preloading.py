"""What CPU launchers set, and giving freed memory back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hcsdl.config import ConfigError
from hcsdl.machine.placement import Place
from hcsdl.machine.preloading import find_allocator, launcher_environment
from hcsdl.machine.topology import Core

pytestmark = pytest.mark.xeon_only

PLACE = Place(2, (Core((0, 8), 0), Core((1, 9), 0)))


def test_threads_are_pinned_one_a_core_and_the_allocator_is_preloaded() -> None:
    found = launcher_environment(PLACE, Path("/lib/libtcmalloc.so.4"))
    assert found["LD_PRELOAD"].split(":")[-1] == "/lib/libtcmalloc.so.4" and found["OMP_NUM_THREADS"] == "2"
    assert found.get("GOMP_CPU_AFFINITY") == "0 1" or found.get("KMP_AFFINITY") == "granularity=fine,compact,1,0"
    assert "MALLOC_CONF" not in found and "background_thread" in launcher_environment(PLACE, Path("/lib/libjemalloc.so.2"))["MALLOC_CONF"]


def test_a_named_library_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bench.preload must be a shared library"):
        find_allocator(str(tmp_path / "nothing.so"))


FREED = """
import re
from pathlib import Path
from hcsdl.machine.memory import keep_freed_memory, release_freed_memory
def resident(): return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
assert keep_freed_memory()
block = [b"x" * 2**20 for _ in range(300)]
del block
before = resident()
release_freed_memory()
print(before, resident())
"""


def test_kept_memory_is_given_back_on_demand() -> None:
    said = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout
    before, after = map(int, re.findall(r"\d+", said))
    assert before > 300 and after < before - 250
