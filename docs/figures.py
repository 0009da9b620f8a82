"""The pictures of README.md and of the pages in docs/; matplotlib draws them.

python docs/figures.py               # those that need no run: gin, gin-steps, round and arms
python docs/figures.py RUN_DIR       # validation, ratios, predictions of a run, whole or not
python docs/figures.py RUN_DIR …     # budget: Dice against the steps that each run trained
"""

import argparse
import csv
import dataclasses
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import torch
from matplotlib import pyplot as plt

import data
import method_figures
import nifti
import predict
import results
import tables
from config import Config, run_command
from datasets import DataError
from hospitals import load_hospitals
from method_figures import (
    ARM_COLOURS,
    ORGAN_COLOURS,
    best_slice,
    overlay,
    show,
    window,
    window_title,
)
from phantom import phantom

LINES = ("-", "--", ":", "-.")


class Run(NamedTuple):
    folder: Path
    config: Config
    history: list[dict[str, str]]  # the lines of history.csv
    scores: list[dict]  # the results of results.json


def read_run(folder: Path) -> Run:
    """What a run has left so far; raises DataError where there is none."""
    saved = results.read(folder / "config.json", missing={})
    if not saved:
        raise DataError(f"{folder}: nothing to draw, as no run is there; name the --out of one")
    names = {field.name for field in dataclasses.fields(Config)}
    try:
        config = Config(**{key: value for key, value in saved.items() if key in names})
    except ValueError as error:
        what = f"is another version's ({error}), which must draw it"
        raise DataError(f"{folder / 'config.json'}: {what}") from error
    lines: list[str] = []
    if (folder / "history.csv").exists():
        lines = (folder / "history.csv").read_text(encoding="utf-8").splitlines()
    scores = results.read(folder / "results.json", missing={}).get("results", [])
    return Run(folder, config, list(csv.DictReader(lines)), scores)


def split_label(label: str) -> tuple[str, str, str]:
    """A label's arm, ratio and share of GIN: "fedgin 1:5 p=1" → "fedgin", "1:5", "p=1"."""
    arm, *rest = label.split()
    p = [word for word in rest if word.startswith("p=")]
    return arm, " ".join(word for word in rest if word not in p), " ".join(p)


def ratio_names(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(ratio for label in labels if (ratio := split_label(label)[1])))


def styles(labels: Iterable[str]) -> dict[str, dict]:
    """How each label is drawn: in the colour of its arm, with the line of its p."""
    parts = {label: split_label(label) for label in labels}
    lines = dict(zip(dict.fromkeys(p for *_, p in parts.values() if p), cycle(LINES)))
    return {
        label: {
            "color": ARM_COLOURS.get(arm, "0.4"),
            "linestyle": lines.get(p, "-"),
            "label": f"{arm} {p}".strip(),
        }
        for label, (arm, _, p) in parts.items()
    }


def panels(rows: int, looks: dict[str, dict], y: str, x: str):
    """A figure with a column for MRI and one for CT, Dice from 0 to 1 in all, and its legend."""
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(rows, 2, figsize=(7, 2.4 * rows + 0.5), **shared)
    axes[0, 0].set_ylim(0, 1)
    figure.supylabel(y, fontsize=9)
    figure.supxlabel(x, fontsize=9)
    handles = {style["label"]: plt.Line2D([], [], **style) for style in looks.values()}
    where = {"loc": "outside upper center", "ncol": min(len(handles), 4), "frameon": False}
    figure.legend(handles=list(handles.values()), **where)
    return figure, axes


def validation(run: Run):
    """Validation Dice by round, a line a label and a row of panels a ratio; the mean over seeds."""
    dice = defaultdict(lambda: defaultdict(list))
    for row in run.history:
        for modality in ("mri", "ct"):
            if (score := row[f"val_dice_{modality}"]) not in ("", "nan"):
                dice[row["arm"], modality][int(row["round"])].append(float(score))
    if not dice:
        return None
    looks = styles(label for label, _ in dice)
    ratios = ratio_names(looks) or [""]
    figure, axes = panels(len(ratios), looks, "validation Dice", "round")
    for row, ratio in zip(axes, ratios, strict=True):
        for axis, modality in zip(row, ("mri", "ct"), strict=True):
            axis.set_title(f"{modality.upper()}{f', at MRI : CT {ratio}' if ratio else ''}")
            for (label, m), rounds in dice.items():
                if m == modality and split_label(label)[1] in ("", ratio):
                    x, y = zip(*[(r, np.mean(s)) for r, s in sorted(rounds.items())], strict=True)
                    axis.plot(x, y, marker=".", markersize=4, **looks[label])
    return figure


def ratios(run: Run):
    """Test Dice by arm and ratio, mean over seeds, with bars of one standard deviation."""
    own = [score for score in run.scores if score["scanner"] == "own"] or run.scores
    summary = tables.summarize(own, run.config.organs)
    names, looks = ratio_names(summary), styles(summary)
    if len(names) < 2:
        return None
    figure, axes = panels(1, looks, "test Dice", "MRI : CT training cases")
    lines = {look["label"]: look for look in looks.values()}
    for axis, modality in zip(axes[0], ("mri", "ct"), strict=True):
        for n, (name, look) in enumerate(lines.items()):
            shift = 0.06 * (n - (len(lines) - 1) / 2)
            points = [
                (x + shift, *row["dice", modality])
                for x, ratio in enumerate(names)
                for label, row in summary.items()
                if looks[label]["label"] == name and split_label(label)[1] in ("", ratio)
            ]
            x, mean, deviation = np.array(points).T
            axis.errorbar(x, mean, np.nan_to_num(deviation), capsize=2, marker=".", **look)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(modality.upper())
    return figure


def intensities(case: data.Volume, config: Config, seed: int) -> np.ndarray:
    """The image of a case on the model's grid as it was before it was normalized."""
    if case.case is None:
        return phantom(seed, case.modality, int(case.id.removeprefix("phantom")))[0]
    scan = nifti.read_nifti(case.case.image)
    return nifti.resample_image(scan.voxels, scan.spacing, config.spacing)


def predictions(run: Run):
    """A test case of each modality: scan, target, and what each arm predicts, of the first seed."""
    config, seed = run.config, run.config.seeds[0]
    paths = {}
    for label in dict.fromkeys(row["arm"] for row in (*run.history, *run.scores)):
        path = run.folder / results.model_path(config, label, seed).name
        paths |= {label: path} if path.exists() else {}
    shown = ("", *ratio_names(paths)[-1:])  # the last ratio, and what has none
    paths = {label: path for label, path in paths.items() if split_label(label)[1] in shown}
    if not paths:
        return None
    hospitals = load_hospitals(dataclasses.replace(config, seeds=(seed,)), alone=False)[0][seed]
    tests: dict[str, list] = {}
    tested = [hospital for hospital in hospitals if hospital.modality and hospital.test]
    for case in (case for hospital in tested or hospitals for case in hospital.test):
        tests.setdefault(case.modality, []).append(case)
    if not tests:
        return None
    size = (1.6 * (2 + len(paths)), 2.1 * len(tests) + 0.5)
    figure, axes = plt.subplots(len(tests), 2 + len(paths), figsize=size, squeeze=False)
    for row, (modality, cases) in zip(axes, tests.items(), strict=True):
        case = max(cases, key=lambda case: (case.counts[1:] > 0).sum())  # with most organs
        image, z = intensities(case, config, seed), best_slice(case.labels)
        title = f"{modality.upper()} {case.id}\n{window_title(modality)}"
        maps = {title: np.zeros_like(case.labels), "target": case.labels}
        for label, path in paths.items():
            model, about = predict.load_model(path, torch.device("cpu"))
            maps[label.replace(" ", "\n", 1)] = predict.segment(
                model, case.image, about["patch"], case.labels.shape
            )
        for axis, (name, labels) in zip(row, maps.items(), strict=True):
            show(axis, image[:, :, z], window(image, modality), name)
            overlay(axis, labels[:, :, z])
    colours = ORGAN_COLOURS[1 : len(config.organs) + 1]
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    columns = min(len(boxes), 2 + len(paths))
    where = {"loc": "outside lower center", "ncol": columns, "frameon": False}
    figure.legend(boxes, config.organs, **where)
    return figure


def budget(*runs: Run):
    """Test Dice against the steps that a hospital trains, mean over the seeds that all runs share.

    A row a scanner; an arm's line goes over the runs that have it, if they are several.
    """
    seeds = set.intersection(*({score["seed"] for score in run.scores} for run in runs))
    shared = [[score for score in run.scores if score["seed"] in seeds] for run in runs]
    had = Counter(label for scores in shared for label in dict.fromkeys(x["arm"] for x in scores))
    labels = [label for label, n in had.items() if n > 1]
    found = {score["scanner"] for run in runs for score in run.scores}
    scanners = [scanner for scanner in ("own", "other") if scanner in found]
    if not labels:
        return None
    looks = styles(labels)
    figure, axes = panels(len(scanners), looks, "test Dice", "steps a hospital")
    for row, scanner in zip(axes, scanners, strict=True):
        for axis, modality in zip(row, ("mri", "ct"), strict=True):
            axis.set_title(f"{modality.upper()}, {scanner} scanner")
            points = defaultdict(list)
            for run, scores in zip(runs, shared, strict=True):
                chosen = [
                    score
                    for score in scores
                    if score["scanner"] == scanner and score["arm"] in labels
                ]
                for label, columns in tables.summarize(chosen, run.config.organs).items():
                    steps = run.config.rounds * run.config.local_steps
                    points[label].append((steps, columns["dice", modality][0]))
            for label, found in points.items():
                axis.plot(*zip(*sorted(found), strict=True), marker=".", **looks[label])
    ticks = sorted({run.config.rounds * run.config.local_steps for run in runs})
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(ticks, map(str, ticks), minor=False)
    axes[0, 0].xaxis.set_minor_locator(plt.NullLocator())
    return figure


OF_THE_METHOD = {
    "gin": method_figures.gallery,
    "gin-steps": method_figures.gin_steps,
    "round": method_figures.one_round,
    "arms": method_figures.arms,
}
OF_A_RUN = {"validation": validation, "ratios": ratios, "predictions": predictions}
OF_RUNS = {"budget": budget}


def draw(folders: Sequence[Path], out: Path | None) -> None:
    """Draw what there is to draw; raises DataError for folders of which there is nothing."""
    runs, pictures = [read_run(folder) for folder in folders], OF_THE_METHOD
    if runs:
        pictures = OF_A_RUN if len(runs) == 1 else OF_RUNS
    out, drawn = out or (folders[0] if folders else ROOT / "docs"), 0
    for name, picture in pictures.items():
        if figure := picture(*runs):
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(out / f"{name}.png", dpi=150)
            plt.close(figure)
            print(out / f"{name}.png")
            drawn += 1
    if not drawn:
        what = "nothing to draw yet, as no round of the run is finished"
        raise DataError(f"{' '.join(map(str, folders))}: {what}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN_DIR", help="the --out of a run")
    text = "folder for the pictures (default: the first RUN_DIR)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    args = parser.parse_args(argv)
    return run_command("figures.py", functools.partial(draw, args.run, args.out))


if __name__ == "__main__":
    sys.exit(main())
