"""The pictures of README.md and of the pages in docs/; matplotlib draws them.

python docs/figures.py                                # gin-steps, round and arms
python docs/figures.py --scans CT_CASE MRI_CASE       # gin, on cases of TotalSegmentator's layout
python docs/figures.py RUN_DIR                        # ratios, probability, predictions of a run
"""

import argparse
import csv
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import torch
from matplotlib import pyplot as plt

import method_figures
from evaluate import dice_by_label
from fedgin import ARMS
from method_figures import (
    ARM_COLOURS,
    MODALITY_COLOURS,
    ORGAN_COLOURS,
    best_slice,
    cut,
    mark_sides,
    organs_in,
    overlay,
    show,
)
from scans.files import DataError, read_json, reading
from study import tables
from study.config import Config, Training
from study.console import run_command, use_any_characters
from study.hospitals import load_hospitals
from study.inference import load_model, segment
from study.results import MADE_BY, RunFolder, TrainingFolder

RATIOS = ("1:1", "1:2", "1:5", "all")
REAL_SCANS = ROOT / "docs/real_scans.csv"


class Run(NamedTuple):
    config: Config
    folders: Sequence[TrainingFolder]  # of the trainings that have begun, in the order of tables
    scores: list[dict[str, Any]]  # of those that are finished


def read_run(folder: Path) -> Run:
    """A run's settings, trainings and scores so far; raises DataError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise DataError(f"{folder}: holds no run; give the --out of one")
    with reading(path):
        shared = {k: v for k, v in read_json(path).items() if k not in MADE_BY}
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in shared.items()}
        config = Config(**tuples, out=str(folder))
    folders = RunFolder(config, [], arms=list(ARMS)).begun()
    finished = [each for each in folders if each.is_finished()]
    return Run(config, folders, [score for each in finished for score in each.scores()])


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The rows of a scores.csv, as tables.summarize takes them."""
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row["seed"], row["p"] = int(row["seed"]), float(row["p"]) if row["p"] else None
        for metric in tables.METRICS:
            row[metric] = float(row[metric]) if row[metric] else float("nan")
    return rows


def of_arm(scores: Sequence[dict], arm: str, p: float | None, ratio: str) -> list[dict]:
    return [s for s in scores if (s["arm"], s["p"]) == (arm, p) and s["ratio"] in ("", ratio)]


def dice(scores: Sequence[dict], modality: str) -> tuple[float, float]:
    """Mean and deviation over seeds of the Dice of one training's scores."""
    organs = list(dict.fromkeys(score["organ"] for score in scores))
    [summary] = tables.summarize(scores, organs).values()
    mean, deviation = summary["dice", modality]
    return mean, 0.0 if np.isnan(deviation) else deviation


def spread(heights: Sequence[float], gap: float = 0.05) -> list[float]:
    """The same heights, moved up where two labels would overlap."""
    placed: dict[int, float] = {}
    lowest = -1.0
    for index in sorted(range(len(heights)), key=heights.__getitem__):
        placed[index] = max(heights[index], lowest)
        lowest = placed[index] + gap
    return [placed[index] for index in range(len(heights))]


def ratios(run: Run):
    """Test Dice by ratio, a row of panels per scanner and a column per modality."""
    held = {score["ratio"] for score in run.scores}
    names = [ratio for ratio in RATIOS if ratio in held]
    if len(names) < 2:
        return None
    looks = {
        ("mri-only", None): (ARM_COLOURS["mri-only"], ":"),
        ("fl", None): (ARM_COLOURS["fl"], "-"),
        ("fedgin", 1.0): (ARM_COLOURS["fedgin"], "--"),
        ("fedgin", 0.25): (ARM_COLOURS["fedgin"], "-"),
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), sharex=True, sharey=True)
    for row, scanner in zip(axes, tables.SCANNERS, strict=True):
        found = [score for score in run.scores if score["scanner"] == scanner]
        for axis, m in zip(row, ("mri", "ct"), strict=True):
            axis.set_title(f"{m.upper()}, {scanner} scanner")
            ends: dict[str, tuple[float, str]] = {}  # label: where its line ends, and its colour
            for n, ((arm, p), (colour, line)) in enumerate(looks.items()):
                parts = [of_arm(found, arm, p, ratio) for ratio in names]
                points = [(x, *dice(part, m)) for x, part in enumerate(parts) if part]
                if not points:
                    continue
                x, mean, deviation = np.array(points).T
                style = {"color": colour, "linestyle": line, "capsize": 2, "marker": "."}
                if "ct" not in ARMS[arm].modalities:  # one training, whatever the ratio
                    style["marker"], deviation[1:] = "", np.nan
                axis.errorbar(x + 0.05 * (n - 2), mean, deviation, **style)
                ends[arm if p is None else f"{arm} p={p:g}"] = mean[-1], colour
            heights = spread([end for end, _ in ends.values()])
            for (label, (_, colour)), y in zip(ends.items(), heights, strict=True):
                axis.text(len(names) - 0.75, y, label, color=colour, va="center", fontsize=8)
    n_seeds = len({score["seed"] for score in run.scores})
    ticks = [f"{name} (1:6)" if name == "all" else name for name in names]
    axes[0, 0].set_xticks(range(len(names)), ticks)
    axes[0, 0].set_xlim(-0.3, len(names) + 0.2)
    axes[0, 0].set_ylim(0, 1)
    figure.supylabel(f"test Dice, mean ± deviation over {n_seeds} seeds")
    figure.supxlabel("MRI:CT training cases")
    return figure


def probability(run: Run):
    """Test Dice against p at 1:5 (p = 0 is fl), on this run and on real scans, seen scanners."""
    panels = {"phantoms": run.scores, "real scans": read_scores(REAL_SCANS)}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharex=True, sharey=True)
    for axis, (title, scores) in zip(axes, panels.items(), strict=True):
        seen = [s for s in scores if s["scanner"] == "seen" and s["ratio"] == "1:5"]
        ps = sorted({s["p"] for s in seen if s["arm"] == "fedgin"})
        if not ps:
            return None
        parts = [(0.0, of_arm(seen, "fl", None, "1:5"))]
        parts += [(p, of_arm(seen, "fedgin", p, "1:5")) for p in ps]
        for m in ("mri", "ct"):
            x, mean, deviation = np.array([(p, *dice(part, m)) for p, part in parts if part]).T
            style = {"color": MODALITY_COLOURS[m], "capsize": 2, "marker": "o"}
            axis.errorbar(x, mean, deviation, label=m.upper(), **style)
        axis.set_title(title)
        axis.set_xlabel("p, the probability of GIN (0: FedAvg without GIN)")
    axes[0].set_ylabel("test Dice, mean ± deviation")
    axes[0].set_ylim(0, 1)
    axes[0].legend(frameon=False)
    return figure


def predictions(run: Run):
    """A test phantom of each modality, its reference, and what three arms predict, of one seed."""
    shown = [Training(0, "mri-only"), Training(0, "fl", "1:5"), Training(0, "fedgin", "1:5", 0.25)]
    trained = [folder for folder in run.folders if folder.is_trained()]
    seed = min((folder.training.seed for folder in trained), default=0)
    models = {
        folder.training.label: load_model(folder.path / "model.pt", torch.device("cpu"))
        for folder in trained
        if dataclasses.replace(folder.training, seed=0) in shown and folder.training.seed == seed
    }
    if not (models and run.config.on_phantoms):  # a run does not know where its scans lie
        return None
    hospitals = load_hospitals(dataclasses.replace(run.config, seeds=(seed,)))[0][seed]
    figure, axes = plt.subplots(2, 2 + len(models), figsize=(9, 4.2), squeeze=False)
    for row, modality in zip(axes, ("mri", "ct"), strict=True):
        tests = [case for h in hospitals if h.modality == modality for case in h.test]
        volumes = [case.read_volume() for case in tests]
        volume = max(volumes, key=lambda v: organs_in(v.labels[:, :, best_slice(v.labels)]))
        image, reference, z = volume.image, volume.labels, best_slice(volume.labels)
        maps = {modality.upper(): np.zeros_like(reference), "reference": reference}
        for label, (model, metadata) in models.items():
            predicted = segment(model, image, metadata["patch"], reference.shape)
            score = np.nanmean(dice_by_label(predicted, reference, len(metadata["organs"]) + 1))
            maps[f"{label}\nDice {score:.2f}"] = predicted
        for axis, (name, labels) in zip(row, maps.items(), strict=True):
            show(axis, image[:, :, z], cut(image), name)
            overlay(axis, labels[:, :, z])
        mark_sides(row[0])
    colours = ORGAN_COLOURS[1 : len(run.config.organs) + 1]
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    where = {"loc": "outside lower center", "ncol": len(boxes), "frameon": False}
    figure.legend(boxes, run.config.organs, **where)
    return figure


OF_THE_METHOD = {
    "gin-steps.png": method_figures.gin_steps,
    "round.svg": method_figures.one_round,
    "arms.svg": method_figures.arms,
}
OF_SCANS = {"gin.png": method_figures.gallery}
OF_A_RUN = {
    "ratios.svg": ratios,
    "probability.svg": probability,
    "predictions.png": predictions,
}


def draw(run: Path | None, scans: Sequence[Path], out: Path) -> None:
    """Draw what there is to draw; raises DataError for a run of which there is nothing."""
    pictures: dict[str, Any] = OF_THE_METHOD
    arguments: Sequence[Any] = ()
    if scans:
        pictures, arguments = OF_SCANS, scans
    elif run:
        pictures, arguments = OF_A_RUN, (read_run(run),)
    drawn = 0
    for name, picture in pictures.items():
        if figure := picture(*arguments):
            out.mkdir(parents=True, exist_ok=True)
            svg = name.endswith(".svg")
            figure.savefig(out / name, dpi=300, metadata={"Date": None} if svg else None)
            plt.close(figure)
            print(out / name)
            drawn += 1
    if not drawn:
        raise DataError(f"{run}: nothing to draw yet, because no training has come far enough")


def main(argv: list[str] | None = None) -> int:
    use_any_characters()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN_DIR", help="the --out of a run")
    add("--scans", nargs="+", type=Path, default=(), metavar="CASE", help="folders of cases")
    text = "folder for the pictures (default: docs)"
    add("--out", type=Path, default=ROOT / "docs", metavar="DIR", help=text)
    args = parser.parse_args(argv)
    return run_command("figures.py", functools.partial(draw, args.run, args.scans, args.out))


if __name__ == "__main__":
    sys.exit(main())
