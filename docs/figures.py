"""The pictures of README.md and of the pages in docs/; matplotlib draws them.

python docs/figures.py               # those that need no run: gin, gin-steps, round and arms
python docs/figures.py RUN_DIR       # validation, ratios, predictions of a run, whole or not
python docs/figures.py RUN_DIR …     # budget: Dice against the steps that each run trained
"""

import argparse
import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import numpy as np
import torch
from matplotlib import pyplot as plt

import method_figures
from fedgin import ARMS
from method_figures import ARM_COLOURS, ORGAN_COLOURS, best_slice, overlay, show, window_title
from scans.files import DataError, blaming, read_json
from study import tables
from study.config import Config, Training
from study.console import run_command, use_any_characters
from study.hospitals import load_hospitals
from study.inference import load_model, segment
from study.results import MADE_BY, RunFolder
from study.trainings import TrainingFolder

LINES = ("-", "--", ":", "-.")


class Run(NamedTuple):
    config: Config
    folders: Sequence[TrainingFolder]  # of the trainings that have begun, in the order of tables
    scores: list[dict]  # of those that are finished


def read_run(folder: Path) -> Run:
    """What a run has left so far; raises DataError where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise DataError(f"{folder}: nothing to draw, as no run is there; name the --out of one")
    with blaming(path, "the version that made it must draw it"):
        shared = {key: value for key, value in read_json(path).items() if key not in MADE_BY}
        config = Config(**shared, out=str(folder))
    folders = RunFolder(config, order=list(ARMS)).begun()
    finished = [each for each in folders if each.is_finished()]
    return Run(config, folders, [score for each in finished for score in each.scores()])


def ratio_names(trainings: Iterable[Training]) -> list[str]:
    return list(dict.fromkeys(training.ratio for training in trainings if training.ratio))


def without_ratio(training: Training) -> str:
    return dataclasses.replace(training, ratio="").label


def styles(trainings: Iterable[Training]) -> dict[str, dict]:
    """How what has a label is drawn: in the colour of its arm, with the line of its p."""
    trainings = list(trainings)
    shares = dict.fromkeys(training.p for training in trainings if training.p is not None)
    lines = {None: "-", **dict(zip(shares, cycle(LINES)))}
    return {
        training.label: {
            "color": ARM_COLOURS[training.arm],
            "linestyle": lines[training.p],
            "label": without_ratio(training),
        }
        for training in trainings
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
    dice: dict = defaultdict(lambda: defaultdict(list))
    for folder in run.folders:
        training = dataclasses.replace(folder.training, seed=0)  # of all seeds
        for row in folder.history():
            for modality in ("mri", "ct"):
                if score := row[f"val_dice_{modality}"]:
                    dice[training, modality][int(row["round"])].append(float(score))
    if not dice:
        return None
    trained = [training for training, _ in dice]
    looks, ratios = styles(trained), ratio_names(trained) or [""]
    figure, axes = panels(len(ratios), looks, "validation Dice", "round")
    for row, ratio in zip(axes, ratios, strict=True):
        for axis, modality in zip(row, ("mri", "ct"), strict=True):
            axis.set_title(f"{modality.upper()}{f', at MRI : CT {ratio}' if ratio else ''}")
            for (training, m), rounds in dice.items():
                if m == modality and training.ratio in ("", ratio):
                    x, y = zip(*[(r, np.mean(s)) for r, s in sorted(rounds.items())], strict=True)
                    axis.plot(x, y, marker=".", markersize=4, **looks[training.label])
    return figure


def ratios(run: Run):
    """Test Dice by arm and ratio, mean over seeds, with bars of one standard deviation."""
    own = [score for score in run.scores if score["scanner"] == "own"] or run.scores
    trained = {t.label: t for t in map(tables.training_of, own)}
    summary = tables.summarize(own, run.config.organs)
    names, looks = ratio_names(trained.values()), styles(trained.values())
    if len(names) < 2:
        return None
    figure, axes = panels(1, looks, "test Dice", "MRI : CT training cases")
    lines = {look["label"]: look for look in looks.values()}
    for axis, modality in zip(axes[0], ("mri", "ct"), strict=True):
        for n, (name, look) in enumerate(lines.items()):
            shift = 0.06 * (n - (len(lines) - 1) / 2)
            points = [
                (x + shift, *summary[label]["dice", modality])
                for x, ratio in enumerate(names)
                for label, training in trained.items()
                if looks[label]["label"] == name and training.ratio in ("", ratio)
            ]
            x, mean, deviation = np.array(points).T
            axis.errorbar(x, mean, np.nan_to_num(deviation), capsize=2, marker=".", **look)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(modality.upper())
    return figure


def predictions(run: Run):
    """A test case of each modality: scan, target, and what each arm predicts, of the first seed.

    Scans are shown as the model sees them, black and white where normalization has cut values off.
    """
    config, trained = run.config, [folder for folder in run.folders if folder.is_trained()]
    seed = min((folder.training.seed for folder in trained), default=0)
    shown = ("", *ratio_names(folder.training for folder in trained)[-1:])  # the last, and without
    trained = [f for f in trained if f.training.seed == seed and f.training.ratio in shown]
    if not trained:
        return None
    hospitals = load_hospitals(dataclasses.replace(config, seeds=(seed,)), alone=False)[0][seed]
    tested = [hospital for hospital in hospitals if hospital.modality and hospital.test]
    tests: dict[str, list] = {}
    for volume in (case.volume for hospital in tested or hospitals for case in hospital.test):
        tests.setdefault(volume.modality, []).append(volume)
    if not tests:
        return None
    size = (1.6 * (2 + len(trained)), 2.1 * len(tests) + 0.5)
    figure, axes = plt.subplots(len(tests), 2 + len(trained), figsize=size, squeeze=False)
    for row, (modality, volumes) in zip(axes, tests.items(), strict=True):
        volume = max(volumes, key=lambda volume: (volume.counts[1:] > 0).sum())  # with most organs
        image, target, z = volume.image, volume.labels, best_slice(volume.labels)
        title = f"{modality.upper()} {volume.id}\n{window_title(modality)}"
        maps = {title: np.zeros_like(target), "target": target}
        for folder in trained:
            model, about = load_model(folder.path / "model.pt", torch.device("cpu"))
            name = folder.training.label.replace(" ", "\n", 1)
            maps[name] = segment(model, image, about["patch"], target.shape)
        for axis, (name, labels) in zip(row, maps.items(), strict=True):
            show(axis, image[:, :, z], (image.min(), image.max()), name)
            overlay(axis, labels[:, :, z])
    colours = ORGAN_COLOURS[1 : len(config.organs) + 1]
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    columns = min(len(boxes), 2 + len(trained))
    where = {"loc": "outside lower center", "ncol": columns, "frameon": False}
    figure.legend(boxes, config.organs, **where)
    return figure


def budget(*runs: Run):
    """Test Dice against the steps that a hospital trains, mean over the seeds that all runs share.

    A row a scanner; an arm's line goes over the runs that have it, if they are several.
    """
    seeds = set.intersection(*({score["seed"] for score in run.scores} for run in runs))
    steps = [run.config.rounds * run.config.local_steps for run in runs]
    trained = {t.label: t for run in runs for t in map(tables.training_of, run.scores)}
    points: dict = defaultdict(list)
    for run, x in zip(runs, steps, strict=True):
        for scanner in tables.SCANNERS:
            found = [s for s in run.scores if s["scanner"] == scanner and s["seed"] in seeds]
            for label, columns in tables.summarize(found, run.config.organs).items():
                for m in ("mri", "ct"):
                    points[scanner, m, label].append((x, columns["dice", m][0]))
    points = {key: found for key, found in points.items() if len(found) > 1}
    if not points:
        return None
    looks = styles(trained[label] for label in dict.fromkeys(label for *_, label in points))
    scanners = list(dict.fromkeys(scanner for scanner, *_ in points))
    figure, axes = panels(len(scanners), looks, "test Dice", "steps a hospital")
    for row, scanner in zip(axes, scanners, strict=True):
        for axis, modality in zip(row, ("mri", "ct"), strict=True):
            axis.set_title(f"{modality.upper()}, {scanner} scanner")
            for label, look in looks.items():
                if found := sorted(points.get((scanner, modality, label), ())):
                    axis.plot(*zip(*found, strict=True), marker=".", **look)
    ticks = sorted(set(steps))
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
    use_any_characters()
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
