"""The four answers a report begins with: which mechanism fails, is it batch or biology, how sure, which compound next.

In: one scored table with its treatments, else one run's summary. Out: four `Answer`s, sentences for somebody who knows only the report. Promised: every
answer names the figures it rests on; what cannot be told from what was given says which command would tell it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hcsdl.profiles.uncertainty import cluster_bootstrap
from hcsdl.report.classes import largest_confusion, outcomes, wilson
from hcsdl.report.scores import headline_rule

WORDS = (
    "A treatment is a compound at one concentration. It is right when the most similar treatment has its mechanism: the most similar of another compound "
    "(NSC), or of another compound and another batch of plates (NSCB), the stricter question. Similar means that the cosine of their profiles is large."
)
QUESTIONS = ("Which mechanism fails?", "Is it batch or biology?", "How sure is it?", "Which compound next?")
FAILS = 0.5  # a mechanism fails where fewer than half of its treatments are right. A guess


@dataclass(frozen=True)
class Answer:
    """`answer` in one or two sentences, `evidence` the figures behind it, `section` the id of the section that shows them ("" for none)."""

    question: str
    answer: str
    evidence: str
    section: str


@dataclass(frozen=True)
class Evidence:
    """What the answers rest on.

    Attributes
    ----------
    table : one of scores.json's tables.
    treatments : its rows of treatments.csv.
    replicates : its rows of precision.csv, of `telling_replicates`; empty where they tell nothing.
    comparisons, spreads : of scores.json.
    """

    table: dict
    treatments: pd.DataFrame
    replicates: pd.DataFrame
    comparisons: Sequence[dict]
    spreads: Sequence[dict]


def answer_scores(evidence: Evidence, unknown: pd.DataFrame | None = None) -> list[Answer]:
    """Return the four answers of a scored table. `headline_rule(evidence.table)` must not be None.

    `unknown` are the compounds of unknown mechanism, of `hcsdl.report.candidates`; None or empty: there are none.
    """
    following = _which_next(evidence)
    if unknown is not None and len(unknown):
        first = unknown.iloc[0]
        more = (
            f" Of {len(unknown)} compounds of unknown mechanism {first['compound']} is the clearest: it looks like {first['looks_like']}."
        )
        following = replace(following, answer=following.answer + more)
    return [_which_fails(evidence), _batch_or_biology(evidence), _how_sure(evidence), following]


def answer_run(summary: dict) -> list[Answer]:
    """Return the four answers as far as the summary of one training run has them."""
    counts, classes = np.array(summary["confusion_wells"]), summary["classes"]
    unit, split = "held-out wells", summary["split"]
    totals, hits = counts.sum(axis=1), np.diag(counts)
    worst = [number for number in np.argsort(np.where(totals > 0, hits / np.maximum(totals, 1), 2), kind="stable") if totals[number]]
    failing = [classes[n] for n in worst if hits[n] < totals[n]]
    first, confused = worst[0], largest_confusion(counts, classes)
    text = f"None: all {int(totals.sum())} {unit} are right."
    if failing:
        fails = [n for n in worst if hits[n] / totals[n] < FAILS]
        named = ", ".join(classes[n] for n in (fails or [first])[:3])
        text = f"{named}{' and others' if len(fails) > 3 else ''}" + (
            "." if fails else f" is weakest ({hits[first]} of {totals[first]} {unit}); none is below half."
        )
    evidence = f"{int(hits.sum())} of {int(totals.sum())} {unit} right, the split being {split}"
    if confused:
        evidence += f"; {confused[0]} are taken for {confused[1]} most often ({confused[2]} wells)"
    low, high = wilson(hits.sum(), totals.sum())
    baseline = summary["baseline_well_accuracy"]
    beside = f"; simple intensity features reach {baseline:.0%}" if baseline is not None else ""
    sure = f"Well accuracy {summary['well_accuracy']:.0%} (95 % {low:.0%} … {high:.0%}, wells taken as independent){beside}."
    warning = "Sister fields of one well stand on both sides of this split: the figure is leaky. " if summary["leaky"] else ""
    unseen = "compounds the network never saw" if split == "compound_folds" else "wells of compounds that it trained on"
    tell = "A training run alone cannot tell: score the profiles (`hcsdl embed`, then `hcsdl score`), and give the scores to this report."
    return [
        Answer(QUESTIONS[0], text, evidence + ".", "mechanisms"),
        Answer(QUESTIONS[1], tell, f"What {split} holds out: {summary['split_sentence']}", ""),
        Answer(QUESTIONS[2], warning + sure, f"This is recognition of {unseen}, in one run of seed {summary['seed']}.", "training"),
        Answer(QUESTIONS[3], tell, "It takes the nearest treatments of each compound.", ""),
    ]


def _which_fails(evidence: Evidence) -> Answer:
    rule = headline_rule(evidence.table)
    found = evidence.table["by_moa"][rule]
    rows = sorted((r for r in found["per_moa"] if r["treatments"]), key=lambda r: (r["recall"], r["MoA"]))
    unjudged = [r for r in evidence.table["by_moa"].get("NSC", {"per_moa": []})["per_moa"] if rule != "NSC" and r["treatments"]]
    unjudged = [r for r in unjudged if r["MoA"] not in {r["MoA"] for r in rows}]  # these have no partner in another batch
    every = sorted([*rows, *unjudged], key=lambda r: (r["recall"], r["MoA"]))
    failing = [r for r in every if r["recall"] < FAILS]
    good = sum(r["recall"] == 1 for r in every)
    if good == len(every):
        text = f"None: every treatment of all {len(every)} mechanisms is right."
    elif failing:
        text = "; ".join(f"{r['MoA']} ({r['hits']} of {r['treatments']} treatments right)" for r in failing[:3])
        text += f"; and {len(failing) - 3} more below half." if len(failing) > 3 else "."
    else:
        text = f"None falls below half; the weakest is {every[0]['MoA']} ({every[0]['hits']} of {every[0]['treatments']} treatments right)."
    parts = [f"{good} of {len(every)} mechanisms are always right by {rule}"]
    if wrong := _taken_for(found, rows[0]["MoA"]):
        parts.append(wrong)
    if unjudged:
        parts.append(f"{', '.join(r['MoA'] for r in unjudged)}: in no second batch, so judged by NSC, within their own")
    if few := [r["MoA"] for r in every if r["compounds"] < 2]:
        parts.append(f"{', '.join(few)}: a single compound was scored, so its recall says little")
    return Answer(QUESTIONS[0], text, "; ".join(parts) + ".", "mechanisms")


def _taken_for(by_moa: dict, moa: str) -> str:
    """Return what the treatments of `moa` lie nearest to where they are wrong; "" where they are not."""
    place = by_moa["moas"].index(moa)
    wrong = np.array(by_moa["confusion"][place])
    wrong[place] = 0
    return f"{moa} lie nearest to {by_moa['moas'][wrong.argmax()]} ({wrong.max()} times)" if wrong.any() else ""


def _batch_or_biology(evidence: Evidence) -> Answer:
    question = QUESTIONS[1]
    found = outcomes(evidence.treatments, evidence.replicates)
    if found.empty:
        return Answer(
            question,
            "It cannot be told: no treatment can be compared with its mechanism in another batch.",
            "It takes treatments of one mechanism that stand in different batches of plates.",
            "mechanisms",
        )
    counts = found["Outcome"].value_counts()
    batch, other, weak = (int(counts.get(kind, 0)) for kind in ("batch", "other", "no effect"))
    wrong = batch + other + weak
    drop = cluster_bootstrap((found["NSCB_Hit"] - found["NSC_Hit"]).to_numpy(dtype=float), found["Metadata_Compound"].to_numpy(dtype=str))
    if not wrong:
        text = "Neither: nothing is wrong, with or without the treatments' own batch."
    elif batch * 2 > wrong:
        text = f"Mostly batch: of {wrong} treatments that are not always right, {batch} are right or wrong depending on whether their own batch may be used."
    elif other * 2 > wrong:
        text = f"Mostly biology (or what the network cannot see): of {wrong} treatments that are not always right, {other} look like another mechanism in other batches too."
    elif weak * 2 > wrong:
        text = f"Neither: of {wrong} treatments that are not always right, {weak} show no effect that stands out from the controls."
    else:
        text = f"Both: of {wrong} treatments that are not always right, {batch} depend on their batch, {other} look like another mechanism in other batches too"
        text += f", {weak} show no effect." if weak else "."
    rungs = [r for r in evidence.table["ladder"] if not r.get("problem")]
    chosen = next((r for r in rungs if r["chosen"]), None)
    figures = f"Barring a treatment's own batch changes the share right by {drop.value:+.2f}"
    if np.isfinite(drop.low):
        figures += f" (95 % {drop.low:+.2f} … {drop.high:+.2f})"
    figures += f" on the same {len(found)} treatments."
    if chosen and chosen.get("batch_effect") is not None:
        figures += f" Batch effect {chosen['batch_effect']:.2f} (0: none, 1: neighbours always share the batch); {rungs[0]['batch_effect']:.2f} without normalisation."
    return Answer(question, text, figures, "mechanisms")


def _how_sure(evidence: Evidence) -> Answer:
    table = evidence.table
    rule = headline_rule(table)
    own = table["nearest"][rule]
    text = f"{own['accuracy']:.0%} of treatments are right by {rule}"
    if own["low"] is None:
        text += ", of a single compound: no interval."
    elif own["low"] == own["high"]:
        text += "; all alike, so that compounds drawn anew show no spread, which does not make it certain."
    else:
        text += f", 95 % interval {own['low']:.0%} … {own['high']:.0%}."
    against = [c for c in evidence.comparisons if c["rule"] == rule and c["second"].startswith("baseline")]
    figures = f"{own['treatments']} treatments of {own['compounds']} compounds."
    if against:
        hardest = min(against, key=lambda c: c["value"])
        clear = hardest["low"] is not None and hardest["low"] > 0
        text += " Better than simple features: yes." if clear else " Better than simple features: not sure."
        interval = f" (95 % {hardest['low']:+.2f} … {hardest['high']:+.2f})" if hardest["low"] is not None else ""
        figures += (
            f" Against {hardest['second'].removeprefix('baseline: ')}: {hardest['value']:+.2f}{interval}, p {hardest['p_value']:.2g}."
        )
    else:
        figures += " No baseline in this table."
    seeds = [s for s in evidence.spreads if s["rule"] == rule]
    figures += (
        f" Over {seeds[0]['runs']} seeds: sd {seeds[0]['sd']:.3f}."
        if seeds
        else " One training run: what another seed would give is unknown."
    )
    if table["leak"]["mark"]:
        text = f"{table['leak']['mark'].capitalize() if table['leak']['mark'] != 'LEAKY' else 'LEAKY'}. {text}"
    return Answer(QUESTIONS[2], text, f"{figures} {table['leak']['sentence']}", "scores")


def rank_compounds(evidence: Evidence) -> pd.DataFrame:
    """Return the scored compounds, the one most worth a look first.

    First come compounds with the largest share of their treatments wrong by the stricter rule, among them those whose wells agree (a phenotype that is real
    and misread teaches more than one that is not there), then those nearest to what they are taken for; of compounds never wrong those least like their neighbour.

    Returns
    -------
    DataFrame : compound, treatment (its wrong one nearest to another), MoA, treatments, wrong, agrees (share of its treatments whose wells stand out from
    the controls; nan where unknown), taken_for, nearest (the neighbouring treatment), cosine.
    """
    rule = headline_rule(evidence.table)
    table = evidence.treatments[evidence.treatments[f"{rule}_Hit"].notna()]
    agrees = pd.Series(dtype=float)
    if not evidence.replicates.empty:
        agrees = evidence.replicates.set_index("Metadata_Treatment")["corrected_p_value"].lt(0.05).astype(float)
    rows = []
    for compound, mine in table.groupby("Metadata_Compound"):
        wrong = mine[mine[f"{rule}_Hit"] == 0]
        # Of wrong treatments the one most like another; where none is wrong, the one least like what it is rightly nearest to.
        closest = (wrong if len(wrong) else mine).sort_values(f"{rule}_Cosine", ascending=not len(wrong), kind="stable").iloc[0]
        rows.append(
            {
                "compound": compound,
                "treatment": closest["Metadata_Treatment"],
                "MoA": closest["Metadata_MoA"],
                "treatments": len(mine),
                "wrong": len(wrong),
                "agrees": mine["Metadata_Treatment"].map(agrees).mean() if len(agrees) else np.nan,
                "taken_for": _taken(wrong[f"{rule}_Neighbour_MoA"]),
                "nearest": closest[f"{rule}_Neighbour"],
                "cosine": closest[f"{rule}_Cosine"],
            }
        )
    ranked = pd.DataFrame(rows)
    wrong = ranked["wrong"] > 0
    order = ranked.assign(
        share=ranked["wrong"] / ranked["treatments"],
        agrees=ranked["agrees"].fillna(0).where(wrong, 0.0),
        cosine=ranked["cosine"].where(wrong, -ranked["cosine"]),
    ).sort_values(["share", "agrees", "wrong", "cosine"], ascending=False, kind="stable")
    return ranked.loc[order.index].reset_index(drop=True)


def _taken(moas: pd.Series) -> str:
    """Return what wrong treatments are taken for: the mechanism most often named, or those named once each."""
    counts = moas.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    if len(counts) > 1 and counts.iloc[0] > 1:
        return f"{counts.index[0]} most often"
    return " or ".join(counts.index[:3])


def _which_next(evidence: Evidence) -> Answer:
    first = rank_compounds(evidence).iloc[0]
    rule = headline_rule(evidence.table)
    if not first["wrong"]:
        text = f"No compound is misread. {first['compound']} is least like what it is rightly nearest to ({first['nearest']}, cosine {first['cosine']:.2f})."
        return Answer(QUESTIONS[3], text, f"All scored compounds are right by {rule}.", "compounds")
    count, of = first["wrong"], first["treatments"]
    what = "its only treatment is" if of == 1 else f"{count} of its {of} treatments {'is' if count == 1 else 'are'}"
    text = f"{first['compound']} ({first['MoA']}): {what} taken for {first['taken_for']}"
    if np.isnan(first["agrees"]):
        text += "."
    elif first["agrees"] >= FAILS:
        text += ", and its wells agree with each other, so the phenotype is real."
    else:
        text += ". Its wells do not stand out from the controls: repeat it, or take another concentration."
    evidence_text = f"{first['treatment']} is nearest to {first['nearest']} (cosine {first['cosine']:.2f}) by {rule}. "
    evidence_text += "Compare their fields, and check its annotated mechanism and its plates."
    return Answer(QUESTIONS[3], text, evidence_text, "compounds")
