"""The tables that a run ends with: scores averaged over cases, organs and seeds.

A metric is the mean over organs of each organ's mean over cases; ± is the sample standard deviation
over seeds. A score is a dict with the keys of SCORE; what is not scored has NaN for its metrics.
"""

import math
import operator
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from study.config import Training

METRICS = ("dice", "hd95", "nsd")
TRAINING = ("seed", "arm", "ratio", "p")
SCORE = (*TRAINING, "hospital", "scanner", "case", "modality", "organ", "outcome", *METRICS)
COUNTS = ("scored", "missed", "absent")  # added up over seeds, never averaged
SCANNERS = ("seen", "unseen")  # scanners of the hospitals that train, and others
Score = Mapping[str, Any]
Cell = tuple[float, float]  # a mean, or a count, and its deviation over seeds


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan


def score_rows(about: Score, scores: Mapping[str, Mapping]) -> list[dict[str, Any]]:
    """What score_case gives for a case, as dicts with the keys of SCORE, one per organ."""
    nothing = dict.fromkeys(METRICS, math.nan)
    return [{**about, "organ": organ, **nothing, **found} for organ, found in scores.items()]


def training_of(score: Score) -> Training:
    return Training(score["seed"], score["arm"], score["ratio"], score["p"])


def summarize(scores: Iterable[Score], organs: Sequence[str]) -> dict[str, dict[tuple, Cell]]:
    """Average scores to {label of a training: {column: (mean, standard deviation over seeds)}}.

    Columns: (metric, modality), the mean over organs of each organ's mean over cases; (organ,
    modality), its Dice; ("scored", modality), organs of cases that are scored, missed ones
    included, and ("missed", modality), ("absent", modality): counts, added up over seeds. The
    deviation is the sample's, NaN with one seed.
    """
    by_label: dict[str, dict[int, list[Score]]] = {}
    for score in scores:
        label = training_of(score).label
        by_label.setdefault(label, {}).setdefault(score["seed"], []).append(score)
    summary: dict[str, dict[tuple, Cell]] = {}
    for label, by_seed in by_label.items():
        rows = [_columns(group, organs) for group in by_seed.values()]
        for column in rows[0]:
            values = [row[column] for row in rows if not math.isnan(row[column])]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            number = sum(values) if column[0] in COUNTS else mean(values)
            summary.setdefault(label, {})[column] = number, spread
    return summary


def _columns(scores: Sequence[Score], organs: Sequence[str]) -> dict[tuple, float]:
    """The columns of summarize for one training."""
    columns: dict[tuple, float] = {}
    for m in ("mri", "ct"):
        found = [score for score in scores if score["modality"] == m]
        for metric in METRICS:
            by_organ = [mean(s[metric] for s in found if s["organ"] == organ) for organ in organs]
            columns[metric, m] = mean(by_organ)
            if metric == "dice":
                columns.update({(o, m): d for o, d in zip(organs, by_organ, strict=True)})
        counts = Counter(score["outcome"] for score in found)
        columns["scored", m] = counts["scored"] + counts["missed"]
        columns["missed", m], columns["absent", m] = counts["missed"], counts["absent"]
    return columns


def screen(scores: Sequence[Score], organs: Sequence[str]) -> str:
    """What a run ends with: a row per arm, and the differences of fedgin to the others."""
    parts = by_scanner(scores)
    tested = {(score["scanner"], score["modality"]) for score in scores}
    columns = [(s, m) for s in parts for m in ("mri", "ct") if (s, m) in tested]
    rows = [["Dice", *(f"{m.upper()} {scanner}" for scanner, m in columns), "missed"]]
    summaries = {scanner: summarize(part, organs) for scanner, part in parts.items()}
    for label in dict.fromkeys(training_of(score).label for score in scores):
        dices = [_cell(summaries[scanner][label]["dice", m]) for scanner, m in columns]
        missed = sum(summaries[scanner][label]["missed", m][0] for scanner, m in columns)
        rows.append([label, *dices, str(missed)])
    first = next(iter(parts), "")
    compared = comparisons(parts.get(first, []), f", {first}")
    return "\n\n".join(filter(None, [_markdown(rows), compared]))


def by_scanner(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scores of seen and unseen scanners, without empty parts."""
    parts = {s: [score for score in scores if score["scanner"] == s] for s in SCANNERS}
    return {scanner: part for scanner, part in parts.items() if part}


def details(scores: Sequence[Score], organs: Sequence[str]) -> str:
    """All tables of a run: of test cases from seen scanners, then from unseen ones."""
    texts = []
    for scanner, part in by_scanner(scores).items():
        names = ", ".join(dict.fromkeys(score["hospital"] for score in part))
        texts.append(f"### {scanner.capitalize()} scanners: {names}")
        texts += [tables(part, organs), comparisons(part)]
    return "\n\n".join(filter(None, texts))


def tables(scores: Sequence[Score], organs: Sequence[str]) -> str:
    """Dice and counts, surface metrics, and Dice by organ: Markdown tables, a row per arm."""
    dices = [["arm", "MRI Dice", "CT Dice", "scored MRI / CT", "missed", "absent"]]
    surfaces = [["arm", "MRI HD95 mm", "CT HD95 mm", "MRI NSD", "CT NSD"]]
    by_organ = [["MRI / CT Dice", *organs]]
    for label, row in summarize(scores, organs).items():
        counts = [_pair(row, outcome, 0) for outcome in COUNTS]
        dices.append([label, _cell(row["dice", "mri"]), _cell(row["dice", "ct"]), *counts])
        distances = [_cell(row["hd95", m], 1) for m in ("mri", "ct")]
        surfaces.append([label, *distances, *(_cell(row["nsd", m]) for m in ("mri", "ct"))])
        by_organ.append([label, *(_pair(row, organ, 2) for organ in organs)])
    return "\n\n".join(_markdown(table) for table in (dices, surfaces, by_organ))


def _cell(value: Cell, digits: int = 3) -> str:
    number, spread = value
    if math.isnan(number):
        return "–"
    deviation = "" if math.isnan(spread) else f" ± {spread:.{digits}f}"
    return f"{number:.{digits}f}{deviation}"


def _pair(row: Mapping[tuple, Cell], column: str, digits: int) -> str:
    return " / ".join(_cell((row[column, m][0], math.nan), digits) for m in ("mri", "ct"))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table that is aligned to be read in a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def comparisons(scores: Sequence[Score], of: str = "") -> str:
    """A table of fedgin against fl, single modalities and centralized+gin, as in the paper.

    The difference in Dice on the same test cases at the same ratio and p, with its 95 % interval.
    Empty without such arms.
    """
    groups: dict[Training, list[Score]] = {}
    for score in scores:
        key = Training(0, score["arm"], score["ratio"], score["p"])  # of all seeds
        groups.setdefault(key, []).append(score)
    rows = [[f"difference in Dice{of} [95 %]", "MRI", "CT"]]
    for fedgin in (key for key in groups if key.arm == "fedgin"):
        others = [
            Training(0, "mri-only"),
            Training(0, "ct-only", fedgin.ratio),
            Training(0, "fl", fedgin.ratio),
            Training(0, "centralized+gin", fedgin.ratio, fedgin.p),
        ]
        for other in (key for key in groups if key in others):
            row = [f"{fedgin.label} − {other.arm}"]
            for modality in ("mri", "ct"):
                low, middle, high = paired_difference(groups[fedgin], groups[other], modality)
                mark = "*" if low <= 0 <= high else ""
                shown = f"{middle:+.3f} [{low:.3f}, {high:.3f}]{mark}"
                row.append("–" if math.isnan(low) else shown)
            rows.append(row)
    note = "\n\n\\* not distinguishable: the interval spans 0" if "*" in str(rows) else ""
    return _markdown(rows) + note if len(rows) > 1 else ""


def paired_difference(a: Iterable[Score], b: Iterable[Score], modality: str) -> tuple[float, ...]:
    """(low, difference, high) of an arm's Dice over another arm's on the test cases of both.

    The difference of a case and organ is averaged over seeds, then over cases, then over organs.
    The interval is the 95 % percentile bootstrap over cases (Efron & Tibshirani 1993), 2,000 draws
    of a generator with a fixed seed. NaN with fewer than two cases.
    """
    key = operator.itemgetter("hospital", "case", "modality", "organ", "seed")
    dice_b = {key(score): score["dice"] for score in b}
    by_case: dict[tuple, dict[str, list[float]]] = {}
    for score in a:
        difference = score["dice"] - dice_b.get(key(score), math.nan)
        if score["modality"] == modality and not math.isnan(difference):
            case = score["hospital"], score["case"]
            by_case.setdefault(case, {}).setdefault(score["organ"], []).append(difference)
    if len(by_case) < 2:
        return math.nan, math.nan, math.nan
    organs = sorted({organ for found in by_case.values() for organ in found})
    differences = np.array([[mean(c.get(o, ())) for o in organs] for c in by_case.values()])
    cases = np.random.default_rng(0).integers(len(differences), size=(2000, len(differences)))
    drawn = np.concatenate([differences[None], differences[cases]])  # (draws, cases, organs)
    n = np.isfinite(drawn).sum(axis=1)
    by_organ = np.divide(np.nansum(drawn, axis=1), n, out=np.full(n.shape, np.nan), where=n > 0)
    means = np.nanmean(by_organ, axis=1)
    low, high = np.percentile(means[1:], (2.5, 97.5))
    return float(low), float(means[0]), float(high)
