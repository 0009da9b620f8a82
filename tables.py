"""The tables a run ends in: scores by case and organ, boiled down over cases, organs and seeds.

A number is the mean over organs of each organ's mean over cases; ± is the sample standard deviation
over seeds.
"""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from config import Config

METRICS = ("dice", "hd95", "nsd")
OUTCOMES = ("scored", "missed", "absent")  # that are counted; the fourth is "unlabelled"


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan


def title(config: Config, shares: str = "") -> str:
    """What the tables of a run are of; shares: the training cases by ratio, if limited."""
    ratios = f", MRI : CT {shares}" if shares else ""
    source = "PHANTOMS (synthetic volumes, not patients)" if config.on_phantoms else "scans"
    seeds = " ".join(map(str, config.seeds))
    return f"## Test scores, {config.scenario} scenario{ratios}, seeds {seeds}: {source}"


def summarize(results: Sequence[dict], organs: Sequence[str]) -> dict[str, dict]:
    """Boil per-case results down to {arm: {column: (mean, standard deviation over seeds)}}.

    results: dicts with seed, arm, modality and scores, those of score_case. Columns: (metric,
    modality), the mean over organs of each organ's mean over cases; (organ, modality), its Dice;
    (outcome, modality), a count over organs and cases; "mean", the Dice of both modalities. The
    deviation is the sample's, NaN with one seed.
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
        for outcome in OUTCOMES:
            columns[outcome, m] = sum(s[o]["outcome"] == outcome for s in scores for o in organs)
    columns["mean"] = (columns["dice", "mri"] + columns["dice", "ct"]) / 2
    return columns


def table(summary: Mapping[str, dict], organs: Sequence[str]) -> str:
    """The summary as two Markdown tables, aligned to be read in a terminal: one row an arm."""

    def cell(value: tuple[float, float], digits: int = 3) -> str:
        number, spread = value
        if math.isnan(number):
            return "–"
        return f"{number:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")

    def pair(row: dict, column: str, digits: int) -> str:
        return " / ".join(cell((row[column, m][0], math.nan), digits) for m in ("mri", "ct"))

    overlap = [["arm", "MRI Dice", "CT Dice", "mean"] + [f"{o} MRI / CT" for o in organs]]
    surface = [["arm", "MRI HD95 mm", "CT HD95 mm", "MRI NSD", "CT NSD"]]
    surface[0] += [f"{outcome} MRI / CT" for outcome in OUTCOMES]
    for arm, row in summary.items():
        dices = [cell(row[column]) for column in (("dice", "mri"), ("dice", "ct"), "mean")]
        overlap.append([arm, *dices, *(pair(row, organ, 2) for organ in organs)])
        distances = [cell(row["hd95", m], 1) for m in ("mri", "ct")]
        distances += [cell(row["nsd", m]) for m in ("mri", "ct")]
        surface.append([arm, *distances, *(pair(row, outcome, 0) for outcome in OUTCOMES)])
    return _markdown(overlap) + "\n\n" + _markdown(surface)


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def comparisons(summary: Mapping[str, dict]) -> str:
    """FedGIN against FL, the best local arm and centralized+gin: the paper's three comparisons."""
    local = [arm for arm in summary if arm.startswith(("mri-only", "ct-only"))]
    lines = []
    for fedgin in (arm for arm in summary if arm.startswith("fedgin")):
        ratio = fedgin.removeprefix("fedgin")
        peers = {"FL": [f"fl{ratio}"], "the best local arm": local}
        peers["centralized+gin"] = [f"centralized+gin{ratio}"]
        for name, arms in peers.items():
            found = []
            for m in ("mri", "ct"):
                dice = {a: summary[a]["dice", m][0] for a in (*arms, fedgin) if a in summary}
                a = dice.pop(fedgin)
                if dice and not math.isnan(a):
                    peer, b = max(dice.items(), key=lambda item: item[1])
                    change = f" ({a / b - 1:+.0%})" if b > 0 else ""
                    found.append(f"{m.upper()} Dice {a:.3f} to {peer}'s {b:.3f}{change}")
            lines += [f"- {fedgin} against {name}: {', '.join(found)}"] if found else []
    return "\n".join(lines)


def write_scores(path: Path, results: Sequence[dict]) -> None:
    """One line a case and organ: case, modality, organ, outcome, dice, hd95, nsd."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "modality", "organ", "outcome", *METRICS])
        for result in results:
            for organ, s in result["scores"].items():
                metrics = [s.get(metric, "") for metric in METRICS]
                writer.writerow([result["case"], result["modality"], organ, s["outcome"], *metrics])
