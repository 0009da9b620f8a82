"""The tables a run ends in: scores by case and organ, boiled down over cases, organs and seeds.

A number is the mean over organs of each organ's mean over cases; ± is the sample standard deviation
over seeds.
"""

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from config import Config

METRICS = ("dice", "hd95", "nsd")


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan


def title(config: Config, results: Sequence[dict]) -> str:
    """What the tables of a run are of."""
    source = "PHANTOMS (synthetic volumes, not patients)" if config.on_phantoms else "scans"
    seeds = " ".join(dict.fromkeys(str(result["seed"]) for result in results))
    return f"## Test scores, {config.scenario} scenario, seeds {seeds}: {source}"


def summarize(results: Sequence[dict], organs: Sequence[str]) -> dict[str, dict]:
    """Boil per-case results down to {arm: {column: (mean, standard deviation over seeds)}}.

    results: dicts with seed, arm, modality and scores, those of score_case. Columns: (metric,
    modality), the mean over organs of each organ's mean over cases; (organ, modality), its Dice;
    ("scored", modality), organs of cases that are scored, missed ones included, and ("missed",
    modality), ("absent", modality): counts. The deviation is the sample's, NaN with one seed.
    """
    runs: dict[str, dict[int, list[dict]]] = {}
    for result in results:
        runs.setdefault(result["arm"], {}).setdefault(result["seed"], []).append(result)
    summary: dict[str, dict] = {}
    for arm, by_seed in runs.items():
        rows = [_columns(group, organs) for group in by_seed.values()]
        summary[arm] = {}
        for column in rows[0]:
            values = [row[column] for row in rows if not math.isnan(row[column])]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            summary[arm][column] = mean(values), spread
    return summary


def _columns(results: Sequence[dict], organs: Sequence[str]) -> dict:
    """The columns of summarize for one arm and seed."""
    columns: dict = {}
    for m in ("mri", "ct"):
        scores = [result["scores"] for result in results if result["modality"] == m]
        for metric in METRICS:
            by_organ = {(o, m): mean(s[o].get(metric, math.nan) for s in scores) for o in organs}
            columns[metric, m] = mean(by_organ.values())
            columns |= by_organ if metric == "dice" else {}
        counts = Counter(s[o]["outcome"] for s in scores for o in organs)
        columns |= {(outcome, m): counts[outcome] for outcome in ("missed", "absent")}
        columns["scored", m] = counts["scored"] + counts["missed"]
    return columns


def report(results: Sequence[dict], organs: Sequence[str]) -> str:
    """The tables of a run: of test cases of the hospitals that train, then of others."""
    parts = []
    for scanner, what in (("own", "of the hospitals that train"), ("other", "of others")):
        found = [result for result in results if result["scanner"] == scanner]
        if found:
            names = ", ".join(dict.fromkeys(result["hospital"] for result in found))
            parts += [f"### Scanners {what}: {names}", tables(found, organs), comparisons(found)]
    return "\n\n".join(filter(None, parts))


def tables(results: Sequence[dict], organs: Sequence[str]) -> str:
    """The results as Markdown tables, aligned to be read in a terminal: one row an arm."""

    def cell(value: tuple[float, float], digits: int = 3) -> str:
        number, spread = value
        if math.isnan(number):
            return "–"
        return f"{number:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")

    def pair(row: dict, column: str, digits: int) -> str:
        return " / ".join(cell((row[column, m][0], math.nan), digits) for m in ("mri", "ct"))

    dices = [["arm", "MRI Dice", "CT Dice", "scored MRI / CT", "missed", "absent"]]
    surfaces = [["arm", "MRI HD95 mm", "CT HD95 mm", "MRI NSD", "CT NSD"]]
    by_organ = [["MRI / CT Dice", *organs]]
    for arm, row in summarize(results, organs).items():
        counts = [pair(row, outcome, 0) for outcome in ("scored", "missed", "absent")]
        dices.append([arm, *(cell(row["dice", m]) for m in ("mri", "ct")), *counts])
        distances = [cell(row["hd95", m], 1) for m in ("mri", "ct")]
        surfaces.append([arm, *distances, *(cell(row["nsd", m]) for m in ("mri", "ct"))])
        by_organ.append([arm, *(pair(row, organ, 2) for organ in organs)])
    return "\n\n".join(map(_markdown, (dices, surfaces, by_organ)))


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def comparisons(results: Sequence[dict]) -> str:
    """A table of FedGIN against FL, local training and centralized+gin, the paper's comparisons.

    The difference in Dice on the same test cases at the same ratio and p, with its 95 % interval.
    Empty without such arms.
    """
    labels = list(dict.fromkeys(result["arm"] for result in results))
    rows = [["difference in Dice [95 %]", "MRI", "CT"]]
    for fedgin in (label for label in labels if label.startswith("fedgin")):
        with_p = fedgin.removeprefix("fedgin")
        ratio = with_p.partition(" p=")[0]
        peers = {"mri-only", f"ct-only{ratio}", f"fl{ratio}", f"centralized+gin{with_p}"}
        for peer in (label for label in labels if label in peers):
            row = [f"{fedgin} − {peer.split()[0]}"]
            for modality in ("mri", "ct"):
                low, middle, high = paired_difference(results, fedgin, peer, modality)
                mark = "*" if low <= 0 <= high else ""
                shown = f"{middle:+.3f} [{low:.3f}, {high:.3f}]{mark}"
                row.append("–" if math.isnan(low) else shown)
            rows.append(row)
    note = "\\* not distinguishable: the interval spans 0" if "*" in str(rows) else ""
    return "\n\n".join(filter(None, [_markdown(rows), note])) if rows[1:] else ""


def paired_difference(
    results: Sequence[dict], a: str, b: str, modality: str
) -> tuple[float, float, float]:
    """(low, difference, high) of arm a's Dice over arm b's on the test cases of both.

    The difference of a case and organ is averaged over seeds, then over cases, then over organs.
    The interval is the 95 % percentile bootstrap over cases (Efron & Tibshirani 1993), 2,000 draws
    of a generator with a fixed seed. NaN with fewer than two cases.
    """
    dice: dict[str, dict[tuple, float]] = {a: {}, b: {}}
    for result in results:
        if result["arm"] in dice and result["modality"] == modality:
            for organ, score in result["scores"].items():
                key = (result["hospital"], result["case"]), organ, result["seed"]
                dice[result["arm"]][key] = score.get("dice", math.nan)
    by_case: dict[tuple, dict[str, list[float]]] = {}
    for (case, organ, seed), score in dice[a].items():
        difference = score - dice[b].get((case, organ, seed), math.nan)
        if not math.isnan(difference):
            by_case.setdefault(case, {}).setdefault(organ, []).append(difference)
    organs = sorted({organ for found in by_case.values() for organ in found})
    if len(by_case) < 2:
        return math.nan, math.nan, math.nan
    differences = np.array([[mean(c.get(o, ())) for o in organs] for c in by_case.values()])
    cases = np.random.default_rng(0).integers(len(differences), size=(2000, len(differences)))
    drawn = np.concatenate([differences[None], differences[cases]])  # (draws, cases, organs)
    n = np.isfinite(drawn).sum(axis=1)
    by_organ = np.divide(np.nansum(drawn, axis=1), n, out=np.full(n.shape, np.nan), where=n > 0)
    means = np.nanmean(by_organ, axis=1)
    low, high = np.percentile(means[1:], (2.5, 97.5))
    return float(low), float(means[0]), float(high)


def list_scores(results: Sequence[dict]) -> str:
    """The results as CSV, one line a case and organ."""
    text = io.StringIO()
    writer = csv.writer(text)
    about = ("seed", "arm", "hospital") if any("hospital" in result for result in results) else ()
    writer.writerow([*about, "case", "modality", "organ", "outcome", *METRICS])
    for result in results:
        own = [result[key] for key in (*about, "case", "modality")]
        for organ, s in result["scores"].items():
            writer.writerow([*own, organ, s["outcome"], *(s.get(m, "") for m in METRICS)])
    return text.getvalue()
