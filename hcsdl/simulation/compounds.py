"""BBBC021's compounds: which mechanism of action (MoA) each has, and at which concentrations it is active.

In: how many MoAs, compounds and concentrations are wanted. Out: a list of `Treatment`, controls excluded.
Promised: names and concentrations are those of the public file BBBC021_v1_moa.csv; concentrations beyond its list go on downwards
in steps of about three, one significant digit each.
"""

from __future__ import annotations

from dataclasses import dataclass

TAXOL = ("taxol", 0.3)  # the positive control of BBBC021: on each of its plates

# MoA → compound → active concentrations (µM), the one to use first in front. The order of the MoAs is the order in which
# `simulate.moas` takes them: those told apart most easily by eye come first.
COMPOUNDS: dict[str, dict[str, tuple[float, ...]]] = {
    "Microtubule stabilizers": {"taxol": (0.3, 3, 1), "docetaxel": (0.3, 0.1, 0.03), "epothilone B": (1, 0.3, 0.1)},
    "Actin disruptors": {"cytochalasin B": (30, 10), "latrunculin B": (3, 1), "cytochalasin D": (0.3,)},
    "Eg5 inhibitors": {"AZ-C": (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), "AZ138": (3, 1, 0.3, 0.1, 0.03)},
    "Aurora kinase inhibitors": {"AZ-A": (30, 10, 3, 1, 0.3, 0.1), "AZ841": (1, 0.3, 0.1), "AZ258": (1, 0.3, 0.1)},
    "Protein degradation": {"MG-132": (3, 0.1), "ALLN": (100, 3), "proteasome inhibitor I": (3, 0.1), "lactacystin": (10,)},
    "Protein synthesis": {"emetine": (1, 0.3, 0.1), "cyclohexamide": (50, 15, 5), "anisomycin": (1, 0.3)},
    "Epithelial": {"AZ-J": (10, 3, 1), "PP-2": (10, 3), "AZ-U": (10, 3, 1)},
    "Microtubule destabilizers": {
        "vincristine": (3, 1, 0.3, 0.1, 0.03, 0.01, 0.003),
        "demecolcine": (10, 3, 1, 0.3),
        "nocodazole": (3, 1),
        "colchicine": (0.03,),
    },
    "DNA damage": {"etoposide": (10, 3, 1), "mitomycin C": (3, 1, 0.3, 0.1), "cisplatin": (10,), "chlorambucil": (10,)},
    "Cholesterol-lowering": {"mevinolin/lovastatin": (15, 5, 1.5), "simvastatin": (20, 6, 2)},
    "DNA replication": {"camptothecin": (0.03, 0.01, 0.003), "floxuridine": (30, 10), "mitoxantrone": (0.01, 0.003), "methotrexate": (10,)},
    "Kinase inhibitors": {"PD-169316": (10, 3), "alsterpaullone": (3, 1), "bryostatin": (0.3,)},
}


@dataclass(frozen=True)
class Treatment:
    """A compound at a concentration (µM), and its mechanism of action."""

    compound: str
    concentration: float
    moa: str


def treatments(moas: int, compounds_per_moa: int, concentrations: int) -> list[Treatment]:
    """Return the treatments of a simulation: the first `moas` mechanisms, of each at most `compounds_per_moa` compounds (as many as
    BBBC021 has: 2 to 4), of each `concentrations` active concentrations."""
    chosen = []
    for moa, compounds in list(COMPOUNDS.items())[:moas]:
        for compound in list(compounds)[:compounds_per_moa]:
            chosen += [Treatment(compound, value, moa) for value in _ladder(compounds[compound], concentrations)]
    return chosen


def active_fraction(compound: str, moa: str, concentration: float) -> float:
    """Return the fraction of cells that a compound at a concentration (µM) changes, before `simulate.effect`.

    A Hill curve with slope 1 whose midpoint is a twentieth of the compound's first concentration (guess): 0.95 there, 0.87 at a
    third of it.
    """
    midpoint = COMPOUNDS[moa][compound][0] / 20
    return concentration / (concentration + midpoint)


def _ladder(known: tuple[float, ...], count: int) -> list[float]:
    ladder = [float(value) for value in known[:count]]
    while len(ladder) < count:
        ladder.append(float(f"{min(ladder) / 3:.1g}"))
    return ladder
