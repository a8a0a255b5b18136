"""Large tensors in huge pages: in processes of their own, since it is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hcsdl.kernels.memory import SOURCE
from hcsdl.kernels.native.build import NoLibrary, library

BEGIN = """
import random, re, threading, torch
from hcsdl.kernels.memory import keep_tensors_in_huge_pages, release_freed_tensors
MIB = 2**20
def resident():
    return int(re.search(r"^VmRSS:\\s+(\\d+)", open("/proc/self/status").read(), re.M).group(1)) // 1024
def tensor(mib, value=1):
    return torch.full((int(mib * MIB),), value, dtype=torch.uint8)
"""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    try:
        library(SOURCE)
    except NoLibrary as error:
        pytest.skip(f"{error}")


def run(body: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + body], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_is_kept_moved_to_other_sizes_and_given_back() -> None:
    run("""
assert keep_tensors_in_huge_pages() == "" and keep_tensors_in_huge_pages() == ""
start = resident()
large, small = tensor(40), tensor(1)
assert large.data_ptr() % (2 * MIB) == 0 and small.data_ptr() % (2 * MIB)
at = large.data_ptr()
del large
again = tensor(40, 7)
assert again.data_ptr() == at, "the same size gets the same memory"
others = [tensor(40, 2) for _ in range(4)]
full = resident() - start
del others
assert resident() - start >= full - 2
odd = [tensor(size, 3) for size in (50, 70, 38)]
assert resident() - start <= full + 4, (resident() - start, full, "no page beyond those that were kept")
assert all(bool((one == 3).all()) for one in odd) and bool((again == 7).all())
del odd, again
release_freed_tensors()
assert resident() - start < 20
assert bool((tensor(200, 9) == 9).all())
""")


def test_any_order_of_any_sizes_in_several_threads_keeps_every_byte() -> None:
    out = run("""
torch.set_num_threads(1)
assert keep_tensors_in_huge_pages() == ""
start, most, live, lock, broken = resident(), 0, 0, threading.Lock(), []
def work(seed):
    global most, live
    chance, held = random.Random(seed), []
    for number in range(300):
        if held and (len(held) > 6 or chance.random() < 0.45):
            one, value = held.pop(chance.randrange(len(held)))
            if not bool((one == value).all()): broken.append(number)
            with lock: live -= one.numel()
            del one
        else:
            size, value = chance.choice((4, 5.5, 8, 13, 21.3)), chance.randrange(256)
            with lock:
                live += int(size * MIB); most = max(most, live)
            held.append((tensor(size, value), value))
    if not all(bool((one == value).all()) for one, value in held): broken.append("end")
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not broken
print(resident() - start, most / MIB)
""")
    held, most = map(float, out.split())
    assert held < 1.4 * most + 100, "units of 2 MiB, and three tensors of comparisons"


def test_ranges_of_addresses_do_not_become_more_and_more() -> None:
    """The kernel allows a process 65,530 of them, and memory that moves on and on must not make new ones."""
    run("""
torch.set_num_threads(1)
assert keep_tensors_in_huge_pages() == ""
chance, held, seen = random.Random(0), [], []
for number in range(4000):
    if len(held) > 10 or held and chance.random() < 0.5:
        held.pop(chance.randrange(len(held)))
    else:
        held.append(torch.empty(chance.choice((4, 6, 10, 14, 22)) * MIB, dtype=torch.uint8))
        held[-1][:: 2 * MIB] = 1
    if number % 1000 == 999:
        seen.append(len(open("/proc/self/maps").readlines()))
assert seen[-1] < seen[0] + 150, seen
""")


def test_where_addresses_are_limited_everything_stays_as_it_was() -> None:
    out = run("""
import resource
resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, resource.RLIM_INFINITY))
print(keep_tensors_in_huge_pages())
assert bool((tensor(40, 5) == 5).all())
""")
    assert out == "the addresses could not be reserved\n"
