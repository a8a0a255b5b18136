"""What the machine says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hcsdl.machine import cores
from hcsdl.machine.facts import stale_segments
from hcsdl.machine.memory import peak_rss_gib
from tests.runs import alive

pytestmark = pytest.mark.xeon_only


def test_usable_cores_follow_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert 1 <= cores.usable_cores() <= len(allowed)


def test_processor_names_its_bf16_instructions() -> None:
    named = cores.processor()
    assert all(flag.upper() in named for flag in cores.bf16_flags())


def test_freed_memory_is_kept_and_by_default_is_not() -> None:
    script = """
import sys
from hcsdl.machine.memory import keep_freed_memory
import numpy as np
if sys.argv[1] == "keep": assert keep_freed_memory()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
for _ in range(3): block = np.ones(200 * 2**20, np.uint8); del block
print(resident() > 200 * 2**20)
"""
    said = [
        subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout.strip()
        for how in ("keep", "system")
    ]
    assert said == ["True", "False"]


def test_peak_rss_is_of_this_process() -> None:
    assert 0.01 < peak_rss_gib() < 100


def test_shared_memory_of_killed_processes_is_found(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f"{gone.pid}:0:1", f"{os.getpid()}:0:1", "torch_1_2", f"{gone.pid}"):
        (tmp_path / name).write_bytes(b"12345")
    assert stale_segments(tmp_path) == {tmp_path / f"{gone.pid}:0:1": 5}
    assert stale_segments(tmp_path / "missing") == {}


def test_a_child_dies_with_its_parent() -> None:
    child = "import os, sys, time; from hcsdl.machine.process import die_with_parent; die_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(100)"
    parent = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())]); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert alive(pid)
    process.kill()
    process.wait()
    for _ in range(500):
        if not alive(pid):
            break
        time.sleep(0.02)
    assert not alive(pid)


def test_held_back_output_is_shown_only_where_something_fails() -> None:
    script = """
import os, sys
from hcsdl.machine.process import held_back_output
with held_back_output():
    os.write(1, b'noise')
    print('more')
    if sys.argv[1] == 'fail':
        raise ValueError
print('done')
"""
    calm = subprocess.run([sys.executable, "-c", script, "calm"], capture_output=True, text=True, check=True)
    assert (calm.stdout, calm.stderr) == ("done\n", "")
    failed = subprocess.run([sys.executable, "-c", script, "fail"], capture_output=True, text=True, check=False)
    assert "noise" in failed.stderr and "more" in failed.stderr and failed.returncode == 1


@pytest.mark.parametrize("inner", ["with held_back_output():", "if True:"], ids=["nested", "plain"])
def test_last_words_of_a_thread_are_heard_while_output_is_held_back(inner: str) -> None:
    script = f"""
import os, sys, threading, time
from hcsdl.machine.process import held_back_output, show_held_output
def end():
    show_held_output()
    print('last words', file=sys.stderr, flush=True)
    os._exit(5)
with held_back_output():
    {inner}
        os.write(1, b'noise, ')
    threading.Thread(target=end).start()
    time.sleep(100)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "noise, last words\n", 5)
