"""One table, operations × dtypes × sizes × layouts × world sizes, through ccl, gloo and a numpy oracle; all three must agree.

Whole numbers, bools and moved data agree exactly; sums and products of floats to the rounding of one operation a rank in their own dtype. What gloo
does not support is compared with the oracle alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from tests.distributed.oneccl_ranks import on_ranks

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool")
SIZES = (0, 1, 7, 3000)
LARGE, LARGE_DTYPES = 100_000, ("float32", "bfloat16", "int64")  # more than goes at once; from 256 KiB on an all_reduce meets first
LAYOUTS = ("contiguous", "strided")
IN_PLACE = (
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
)  # what goes in lies in what comes out, or the reverse
REDUCTIONS: dict[str, tuple[ReduceOp, Callable[[np.ndarray], np.ndarray]]] = {
    "sum": (ReduceOp.SUM, lambda a: a.sum(0)),
    "product": (ReduceOp.PRODUCT, lambda a: a.prod(0)),
    "min": (ReduceOp.MIN, lambda a: a.min(0)),
    "max": (ReduceOp.MAX, lambda a: a.max(0)),
    "avg": (ReduceOp.AVG, lambda a: a.sum(0) / len(a)),
}
REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
MOVING = (
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_single",
    "uneven",
    "send_recv",
)
EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}


@dataclass(frozen=True)
class Case:
    """One row of the table; `size` is what one rank holds of it."""

    operation: str
    dtype: str
    size: int
    layout: str
    reduction: str = ""


def table(world_size: int) -> list[Case]:
    """Return every case; for three and four ranks about a tenth."""
    operations = [(name, reduction) for name in REDUCING for reduction in REDUCTIONS] + [(name, "") for name in MOVING]
    cases = [
        Case(name, dtype, size, layout, reduction)
        for name, reduction in operations
        for dtype in DTYPES
        for size in SIZES
        for layout in LAYOUTS
    ]
    cases += [Case(name, dtype, LARGE, "contiguous", reduction) for name, reduction in operations for dtype in LARGE_DTYPES]
    cases += [
        Case(name, dtype, size, "in place", reduction)
        for name, reduction in operations
        for dtype in DTYPES
        for size in (7, 3000)
        if name in IN_PLACE
    ]
    cases = [case for case in cases if not (case.dtype == "bool" and case.reduction == "avg")]
    return cases[world_size::11] if world_size > 2 else cases  # 11 shares no factor with the table's columns


def values(case: Case, rank: int, count: int) -> torch.Tensor:
    """Return what `rank` holds: small whole numbers, or floats of which products neither overflow nor vanish."""
    random = np.random.default_rng([rank, case.size, len(case.operation)])
    if case.dtype in EPSILON:
        return torch.from_numpy(random.uniform(0.5, 2.0, count) * random.choice([-1.0, 1.0], count)).to(getattr(torch, case.dtype))
    low, high = (0, 2) if case.dtype == "bool" else (0, 4) if case.dtype == "uint8" else (-3, 4)
    return torch.from_numpy(random.integers(low, high, count)).to(getattr(torch, case.dtype))


def laid_out(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the tensor, every second element of a longer one where the layout says strided."""
    if case.layout != "strided":
        return tensor.clone()
    longer = torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)
    longer[::2] = tensor
    return longer[::2]


def splits(world_size: int, rank: int, size: int) -> list[int]:
    """Return how many elements `rank` sends to each; none to some."""
    return [(rank + 2 * other) % 3 * (size // 2) for other in range(world_size)]


def run(case: Case, rank: int, world_size: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Do the case; return the tensors that must have changed, or must not have."""
    n, last = world_size, world_size - 1
    wide = case.operation in ("reduce_scatter", "reduce_scatter_tensor", "scatter", "all_to_all", "all_to_all_single")
    mine = laid_out(case, values(case, rank, case.size * n if wide else case.size))
    blank = laid_out(case, torch.zeros(case.size * n, dtype=mine.dtype))
    parts, blanks = (
        list(mine.split(case.size or 1)) if case.size else [mine] * n,
        list(blank.split(case.size)) if case.size else [blank] * n,
    )
    if case.layout == "in place" and case.reduction:
        blanks[0] = parts[rank]
    elif case.layout == "in place":
        mine = blanks[rank].copy_(mine)
    if case.operation == "uneven":
        sent, received = splits(n, rank, case.size), [splits(n, other, case.size)[rank] for other in range(n)]
        output = laid_out(case, torch.zeros(sum(received), dtype=mine.dtype))
        dist.all_to_all_single(output, laid_out(case, values(case, rank, sum(sent))), received, sent, group=group)
        return [output]
    if case.operation == "send_recv":
        sending = dist.isend(mine, (rank + 1) % n, group=group) if n > 1 else None
        if n > 1:
            dist.recv(blanks[0], (rank - 1) % n, group=group)
            sending.wait()
        return [blanks[0]]
    here, operation = rank == last, REDUCTIONS[case.reduction][0] if case.reduction else None
    arguments, changed = {
        "all_reduce": ((mine, operation), [mine]),
        "reduce": ((mine, last, operation), [mine] if here else []),  # elsewhere it is undefined
        "reduce_scatter": ((blanks[0], parts, operation), blanks[:1]),
        "reduce_scatter_tensor": ((blanks[0], mine, operation), blanks[:1]),
        "broadcast": ((mine, last), [mine]),
        "all_gather": ((blanks, mine), blanks),
        "all_gather_into_tensor": ((blank, mine), [blank]),
        "gather": ((mine, blanks if here else None, last), blanks),
        "scatter": ((blanks[0], parts if here else None, last), blanks[:1]),
        "all_to_all": ((blanks, parts), blanks),
        "all_to_all_single": ((blank, mine), [blank]),
    }[case.operation]
    getattr(dist, case.operation)(*arguments, group=group)
    return changed


def oracle(case: Case, rank: int, world_size: int) -> list[np.ndarray]:
    """Return what `run` must return, computed by numpy from every rank's values."""
    n, last = world_size, world_size - 1
    wide = case.operation in ("reduce_scatter", "reduce_scatter_tensor", "scatter", "all_to_all", "all_to_all_single")
    every = np.stack([values(case, r, case.size * n if wide else case.size).double().numpy() for r in range(n)])
    if case.reduction:
        reduced = REDUCTIONS[case.reduction][1](every)
        if case.dtype == "bool":
            reduced = reduced != 0
        elif case.dtype not in EPSILON:
            reduced = np.trunc(reduced)
        if case.operation == "reduce":
            return [reduced] if rank == last else []
        return [reduced if case.operation == "all_reduce" else reduced.reshape(n, -1)[rank]]
    nothing = [np.zeros(case.size)] * n
    match case.operation:
        case "broadcast":
            return [every[last]]
        case "all_gather":
            return list(every)
        case "all_gather_into_tensor":
            return [every.reshape(-1)]
        case "gather":
            return list(every) if rank == last else nothing
        case "scatter":
            return [every[last].reshape(n, -1)[rank]]
        case "all_to_all":
            return list(every.reshape(n, n, -1)[:, rank])
        case "all_to_all_single":
            return [every.reshape(n, n, -1)[:, rank].reshape(-1)]
        case "uneven":
            cut = [np.cumsum([0, *splits(n, r, case.size)]) for r in range(n)]
            sent = [values(case, r, cut[r][-1]).double().numpy() for r in range(n)]
            return [np.concatenate([sent[r][cut[r][rank] : cut[r][rank + 1]] for r in range(n)])]
        case _:
            return [every[(rank - 1) % n]] if n > 1 else nothing[:1]


def differing(case: Case, world_size: int, found: list[torch.Tensor], expected: list[np.ndarray]) -> bool:
    """Return whether what was found is not what was expected, up to one rounding a rank where floats were reduced."""
    if len(found) != len(expected):
        return True
    steps = world_size if case.reduction else 0
    for got, want in zip(found, expected, strict=True):
        allowed = (
            steps * EPSILON.get(case.dtype, 0.0) * np.maximum(np.abs(want), 2.0 * world_size if case.reduction in ("sum", "avg") else 0)
        )
        if got.shape != want.shape or not np.all(np.abs(got.double().numpy() - want) <= allowed):
            return True
    return False


def gloo_can(case: Case) -> bool:
    """Return whether gloo's answer is worth a look: torch 2.8's reads strided tensors as if they were not, and scatters nothing but sums."""
    return case.layout == "contiguous" and not (case.operation.startswith("reduce_scatter") and case.reduction != "sum")


def attempts(world_size: int, rank: int, gloo: dist.ProcessGroup) -> Iterator[tuple[Case, str]]:
    """Yield every case with who was wrong about it, nobody, `ccl` or `gloo`, or that gloo has no such operation."""
    for case in table(world_size):
        expected = oracle(case, rank, world_size)
        yield case, "ccl" if differing(case, world_size, run(case, rank, world_size, dist.group.WORLD), expected) else ""
        if gloo_can(case):
            try:
                found = run(case, rank, world_size, gloo)
            except (RuntimeError, ValueError, AttributeError):
                yield case, "not in gloo"
            else:
                yield case, "gloo" if differing(case, world_size, found, expected) else ""


def whole_table() -> dict:
    """Do the table on this rank; return how many rows came out how, and the first that went wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gloo = dist.new_group(backend="gloo")
    results = list(attempts(world_size, rank, gloo))
    wrong = [f"{outcome}: {case}" for case, outcome in results if outcome in ("ccl", "gloo")]
    return {"counts": Counter(outcome for _, outcome in results), "wrong": wrong[:20]}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ccl_gloo_and_numpy_agree(world_size: int) -> None:
    """Every operation, dtype, size and layout gives the same through ccl, gloo and numpy."""
    for said in on_ranks(whole_table, world_size):
        assert said["value"]["wrong"] == []
        assert said["value"]["counts"][""] > 1.25 * len(table(world_size))  # ccl did all of them, gloo a part
