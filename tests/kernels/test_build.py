"""Compiled once, whole or not at all, and where nothing can be compiled one visible line and PyTorch's operators."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hcsdl import kernels
from hcsdl.kernels import batch_norm, choose_kernels, columns, max_pool
from hcsdl.kernels.native import build
from hcsdl.kernels.native.build import NoLibrary, library
from hcsdl.machine import facts
from tests import runs

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no memory of what was loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "hcsdl" / "kernels"
    forget()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "answer.c").write_text(SOURCE)
    return tmp_path / "answer.c"


def forget() -> None:
    for remembered in (library, batch_norm.operators, columns.operators, max_pool.operators):
        remembered.cache_clear()


def answer(made: ctypes.CDLL) -> int:
    return made.answer()


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen, real = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *words: (seen.append(words[2].name), real(*words)))
    return seen


def test_compiled_once_and_then_loaded(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_compilations(monkeypatch)
    assert answer(library(source)) == 42
    forget()
    assert answer(library(source)) == 42 and seen == ["answer.c"]
    assert len(list(cache.iterdir())) == 1, "and nothing half-written beside it"
    source.write_text(SOURCE.replace("42", "43"))
    forget()
    assert answer(library(source)) == 43 and len(seen) == 2


def test_a_damaged_or_foreign_file_is_made_anew(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(source)
    (kept,) = cache.iterdir()
    whole, seen = kept.read_bytes(), count_compilations(monkeypatch)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for content in (b"", whole[: len(whole) // 2], bytes(changed)):
        kept.unlink()
        kept.write_bytes(content)
        forget()
        assert answer(library(source)) == 42
    kept.chmod(0o777)
    forget()
    assert answer(library(source)) == 42 and len(seen) == 4
    assert kept.stat().st_mode & 0o777 == 0o700


def test_without_a_folder_to_write_a_temporary_one_serves(tmp_path: Path, cache: Path, source: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert answer(library(source)) == 42


def test_without_any_temporary_folder_it_says_so(tmp_path: Path, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])  # as where every disk is full
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    with pytest.raises(NoLibrary, match="No usable temporary directory"):
        library(source)


def test_two_processes_compile_at_the_same_time_without_harm(tmp_path: Path, source: Path) -> None:
    code = "import sys, pathlib; from hcsdl.kernels.native.build import library; print(library(pathlib.Path(sys.argv[1])).answer())"
    environment = runs.environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=100)[0].strip() for process in both] == ["42", "42"]
    assert len(list((tmp_path / "cache" / "hcsdl" / "kernels").iterdir())) == 1


def test_why_there_is_no_library(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("this is no C\n")
    with pytest.raises(NoLibrary, match="fails: .*error"):
        library(source)
    source.write_text("int missing(void); int answer(void) { return missing(); }\n")
    with pytest.raises(NoLibrary, match="does not load"):
        library(source)
    with pytest.raises(NoLibrary, match="^sh fails: one two$"):  # one line, whatever a compiler says
        build._run("sh", "-c", "printf 'one\\n\\rtwo' >&2; exit 1")
    with monkeypatch.context() as hasty, pytest.raises(NoLibrary, match="^sleep has not ended after 0 s$"):
        hasty.setattr(build, "COMPILE_S", 0.1)
        build._run("sleep", "9")
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(NoLibrary, match="/bin/false fails"):
        library(source)
    monkeypatch.setattr(build, "processor_flags", lambda: {"sse2"})
    with pytest.raises(NoLibrary, match="no AVX2"):
        library(source)


def test_a_compiler_that_cannot_be_found_gives_way_to_the_next(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert answer(library(source)) == 42


@pytest.mark.parametrize("name", ["auto", "fused"])
def test_without_a_compiler_one_line_says_so_and_torch_computes(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "compiler", lambda *_: None)
    monkeypatch.setattr(kernels, "ipex_problem", lambda: "IPEX is not installed.")
    found = choose_kernels(name)
    assert found.name == "native"
    assert f"kernels={name}: our own operators cannot be had, since there is no C compiler" in found.warning and "\n" not in found.warning


def test_a_training_without_a_compiler_warns_once_and_trains(tiny_plates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["distributed.ranks=1", "training.max_steps=2", "kernels=fused", "model.width=0.25"]
    done = runs.train(tiny_plates, tmp_path / "run", *words)
    assert done.stderr.count("our own operators cannot be had") == 1 and "/bin/false fails" in done.stderr
    assert runs.summary(tmp_path / "run")["kernels"] == "native"


def test_openmp_is_torchs_own(cache: Path) -> None:
    def loaded() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {os.path.basename(line.split()[-1]) for line in lines if any(name in line for name in ("libgomp", "libiomp5", "libomp"))}

    before = loaded()
    batch_norm.operators()
    assert loaded() == before and before


def test_openmp_is_found_in_a_folder_with_spaces() -> None:
    """As where the environment is in such a folder."""
    path = "/home/me/my plates/.venv/lib/torch/lib/libgomp.so.1"
    maps = f"7f00-7f01 r-xp 00001000 fe:00 393 {' ' * 20}{path}\n7f02-7f03 rw-p 00000000 00:00 0 \n7f04-7f05 r--p 00000000 fe:00 7 /lib/libomp_x y/a.so\n"
    assert build._openmp_runtimes(maps) == {path}
