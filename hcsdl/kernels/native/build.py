"""C and C++ sources → shared libraries, compiled at their first use, for the instruction set at hand.

In: a C file of this package, or a C++ file that uses torch's own headers. Out: the loaded library. Promised: compiled in seconds, once for each source,
compiler and instruction set, and kept in the user's cache folder (`$XDG_CACHE_HOME/hcsdl` or `~/.cache/hcsdl`); ranks that compile at the same time do not
harm each other; a damaged or foreign file is made anew; where the folder cannot be written or run from, a temporary one serves. OpenMP is the runtime torch
has loaded, never a second one.
Where nothing can be built, `NoLibrary` says why: callers then run their plain PyTorch twin.

To compile and to link are two steps, so that the compiler adds no OpenMP runtime of its own: the functions it calls are found at loading in torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch  # whose OpenMP runtime is loaded with it

from hcsdl.machine import facts
from hcsdl.machine.cores import processor_flags

FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")
TORCH = Path(torch.__file__).parent
CPP_FLAGS = ("-std=c++17", "-O2", "-fPIC", f"-I{TORCH / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
CPP_LIBRARIES = (f"-L{TORCH / 'lib'}", "-lc10")
COMPILE_S = 120.0  # one file takes 1 to 3 s; a guess for a busy node
DIGEST_BYTES = 32


class NoLibrary(RuntimeError):
    """Why there is no library, as a sentence."""


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set: its name, the flags of /proc/cpuinfo it needs, and what the compiler is told."""

    name: str
    needs: tuple[str, ...]
    options: tuple[str, ...]


_AVX2 = InstructionSet("AVX2", ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c"))
_512 = tuple(f"avx512{part}" for part in ("f", "bw", "dq", "vl"))
_AVX512 = InstructionSet("AVX-512", (*_AVX2.needs, *_512), (*_AVX2.options, *(f"-m{flag}" for flag in _512), "-mprefer-vector-width=512"))
_BF16 = InstructionSet("AVX512_BF16", (*_AVX512.needs, "avx512_bf16"), (*_AVX512.options, "-mavx512bf16"))
INSTRUCTION_SETS = (_BF16, _AVX512, _AVX2)
"""Best first. In C: `__AVX512BF16__`, `__AVX512F__`, `__AVX2__`."""


def instruction_set() -> InstructionSet:
    """Return the best instruction set of this processor; raise `NoLibrary` below AVX2."""
    flags = processor_flags()
    for found in INSTRUCTION_SETS:
        if flags.issuperset(found.needs):
            return found
    raise NoLibrary("this processor has no AVX2")


@functools.cache
def library(source: Path, instructions: InstructionSet | None = None) -> ctypes.CDLL:
    """Return the library of the file `source`, compiled where the cache does not hold it: of C for `instructions` (the best of this processor), of
    C++ for torch's libraries.

    Functions take the number of threads as an argument: the caller passes `torch.get_num_threads()`. Raises `NoLibrary`.
    """
    language = "C++" if source.suffix == ".cpp" else "C"
    compiler = facts.compiler(language)
    if compiler is None:
        raise NoLibrary(f"there is no {language} compiler ({'g++, or what CXX' if language == 'C++' else 'gcc, or what CC'} names)")
    if language == "C":
        _share_openmp()
        options = (*FLAGS, *(instructions or instruction_set()).options)
    else:
        options = (*CPP_FLAGS, *CPP_LIBRARIES)
    version = _run(compiler, "--version") + torch.__version__ * (language == "C++")
    key = hashlib.sha256("\0".join((version, *options, source.read_text())).encode()).hexdigest()[:24]
    name = f"{source.stem}-{key}.so"
    try:
        folder = facts.cache_folder() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = folder / name
        if not _is_ours(kept):
            _compile(compiler, options, source, kept)
        return ctypes.CDLL(str(kept))
    except OSError:  # the folder cannot be made, written, or run from
        try:
            with tempfile.TemporaryDirectory(prefix="hcsdl-") as scratch:
                made = Path(scratch) / name
                _compile(compiler, options, source, made)
                return ctypes.CDLL(str(made))  # stays loaded when the file has gone
        except OSError as error:
            raise NoLibrary(f"what {compiler} makes of {source.name} does not load: {error}") from None


def _share_openmp() -> None:
    """Let libraries loaded from now on see the OpenMP runtime that torch uses: two would have their threads wait for each other's cores."""
    loaded, own = _openmp_runtimes(Path("/proc/self/maps").read_text()), str(TORCH)
    if not loaded:
        raise NoLibrary("torch has loaded no OpenMP runtime")
    ctypes.CDLL(min(loaded, key=lambda path: (not path.startswith(own), path)), mode=ctypes.RTLD_GLOBAL)


def _openmp_runtimes(maps: str) -> set[str]:
    """Return the paths of the OpenMP runtimes that `maps`, of a process's memory, names; their folders may have spaces in their names."""
    return set(re.findall(r"^(?:\S+ +){5}(/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*)$", maps, re.M))


def _is_ours(path: Path) -> bool:
    """Return whether a file is whole, belongs to this user and can be written by nobody else."""
    try:
        with open(path, "rb") as file:
            about, content = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    whole = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
    return whole and about.st_uid == os.getuid() and not about.st_mode & 0o022


def _compile(compiler: str, options: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile into `target`, which appears whole or not at all, with a digest of it behind its end."""
    with tempfile.TemporaryDirectory(prefix="hcsdl-") as scratch:
        compiled, linked = Path(scratch) / "compiled.o", Path(scratch) / "linked.so"
        _run(compiler, *options, "-c", str(source), "-o", str(compiled))
        _run(compiler, "-shared", str(compiled), "-o", str(linked), "-lm", *(option for option in options if option in CPP_LIBRARIES))
        content = linked.read_bytes()
    number, written = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with open(number, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.chmod(written, 0o700)
        os.replace(written, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(written)
        raise


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMPILE_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise NoLibrary(f"{command[0]} has not ended after {COMPILE_S:.0f} s") from None
    except OSError as error:
        raise NoLibrary(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NoLibrary(f"{command[0]} fails: {' '.join(said.split())}")
    return done.stdout
