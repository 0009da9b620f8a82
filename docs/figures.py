"""The pictures of the README and of docs/results.md; matplotlib draws them.

python docs/figures.py                 # docs/gin.png: what GIN does to a CT and an MRI phantom
python docs/figures.py RUN_DIR [OUT]   # validation.png, predictions.png, ratios.png of any run
"""

import argparse
import csv
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

import data
import fedgin
import predict
import results
import tables
from config import Config
from datasets import DataError
from gin import gin
from hospitals import load_hospitals
from phantom import phantom

# Okabe and Ito's colours, which colour-blind readers can tell apart; black is left to text.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK = "#56B4E9", "#CC79A7"
ARM_COLOURS = {
    "fedgin": RED,
    "fl": BLUE,
    "centralized+gin": GREEN,
    "centralized": SKY,
    "mri-only": ORANGE,
    "ct-only": PINK,
    "mri-only+gin": "#8a6100",
    "ct-only+gin": "#7a4763",
}
ORGAN_COLOURS = ("#00000000", ORANGE, GREEN, BLUE, RED, PINK)
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def grey(image: np.ndarray) -> np.ndarray:
    """An axial slice (left to right, back to front) with the front up."""
    return image.T[::-1]


def show(axis, image: np.ndarray, title: str = "") -> None:
    low, high = np.percentile(image, (1, 99))
    axis.imshow(grey(image), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def gallery(path: Path) -> None:
    figure, axes = plt.subplots(2, 9, figsize=(9.4, 2.5), layout="constrained")
    for row, modality in zip(axes, ("ct", "mri"), strict=True):
        image, labels = phantom(42, modality, 1)
        z = int((labels > 0).sum((0, 1)).argmax())
        batch = torch.from_numpy(data.normalize(image, modality))[None, None]
        generator = torch.Generator().manual_seed(42)  # the same eight networks for both
        show(row[0], batch[0, 0, :, :, z].numpy(), f"{modality.upper()} phantom")
        for n, axis in enumerate(row[1:], start=1):
            show(axis, gin(batch, generator=generator)[0, 0, :, :, z].numpy(), f"draw {n}")
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def split_label(label: str) -> tuple[str, str]:
    arm, _, ratio = label.partition(" ")
    return arm, ratio


def validation(run: Path, path: Path) -> None:
    """Validation Dice by round, a line an arm and a row of panels a ratio; the mean over seeds."""
    dice = defaultdict(lambda: defaultdict(list))
    with open(run / "history.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for modality in ("mri", "ct"):
                if row[f"val_dice_{modality}"]:
                    score = float(row[f"val_dice_{modality}"])
                    dice[modality, row["arm"]][int(row["round"])].append(score)
    ratios = sorted({split_label(arm)[1] for _, arm in dice} - {""}) or [""]
    size = (7, 2.3 * len(ratios) + 0.4)
    figure, axes = plt.subplots(
        len(ratios), 2, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, ratio in zip(axes, ratios, strict=True):
        for axis, modality in zip(row, ("mri", "ct"), strict=True):
            for (m, label), rounds in dice.items():
                arm, its_ratio = split_label(label)
                if m == modality and its_ratio in ("", ratio):
                    x, y = zip(*[(r, np.mean(s)) for r, s in sorted(rounds.items())], strict=True)
                    axis.plot(x, y, color=ARM_COLOURS[arm], label=arm, linewidth=1.8)
            axis.set_title(f"{modality.upper()}{f', at MRI : CT {ratio}' if ratio else ''}")
            axis.set_ylim(0, 1)
        row[0].set_ylabel("validation Dice")
    for axis in axes[-1]:
        axis.set_xlabel("round")
    legend(figure, axes)
    save(figure, path)


def legend(figure, axes) -> None:
    """One legend above all panels."""
    found = {}
    for axis in axes.ravel():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncol=len(found), frameon=False
    )


def read_config(run: Path) -> Config:
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(Config)}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in names}
    return Config(**settings)


def predictions(run: Path, path: Path) -> None:
    """A test case of each modality: scan, target, and what each arm of the first seed predicts."""
    config = read_config(run)
    seed, device = config.seeds[0], torch.device("cpu")
    hospitals = load_hospitals(config)[0][seed]
    last_ratio = list((config.ratios or ())[-1:])
    arms = [label for label in fedgin.run_labels(config) if " " not in label]
    arms += [label for label in fedgin.run_labels(config) if label.split()[1:] == last_ratio]
    cases = {}
    for hospital in hospitals:
        for case in hospital.test:
            cases.setdefault(case.modality, case)
    columns = 2 + len(dict.fromkeys(arms))
    size = (1.45 * columns, 1.6 * len(cases) + 0.4)
    figure, axes = plt.subplots(
        len(cases), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for row, (modality, case) in zip(axes, cases.items(), strict=True):
        z = best_slice(case.labels)
        show(row[0], case.image[:, :, z], f"{modality.upper()} {case.id}")
        overlay(row[1], case, case.labels, z, "target")
        for axis, label in zip(row[2:], dict.fromkeys(arms), strict=True):
            checkpoint = run / results.model_path(config, label, seed).name
            model, model_config = predict.load_model(checkpoint, device)
            labels = predict.segment(model, case.image, model_config["patch"], case.labels.shape)
            overlay(axis, case, labels, z, label)
    colours = ORGAN_COLOURS[1 : len(config.organs) + 1]
    boxes = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(
        boxes, config.organs, loc="outside lower center", ncol=len(config.organs), frameon=False
    )
    save(figure, path)


def best_slice(labels: np.ndarray) -> int:
    """The axial slice with most organs, and of those the one with the largest smallest organ."""

    def key(z: int):
        sizes = np.bincount(labels[:, :, z].ravel(), minlength=2)[1:]
        return (sizes > 0).sum(), sizes[sizes > 0].min(initial=0)

    return max(range(labels.shape[2]), key=key)


def overlay(axis, case, labels: np.ndarray, z: int, title: str) -> None:
    show(axis, case.image[:, :, z], title)
    colours = ListedColormap(ORGAN_COLOURS)
    axis.imshow(grey(labels[:, :, z]), cmap=colours, vmin=0, vmax=5, interpolation="nearest")


def ratios(run: Path, path: Path) -> None:
    """Test Dice by arm and ratio, mean over seeds, with bars of one standard deviation."""
    config = read_config(run)
    scores = json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]
    summary = tables.summarize(scores, config.organs)
    arms = list(dict.fromkeys(split_label(label)[0] for label in summary))
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True, layout="constrained")
    for axis, modality in zip(axes, ("mri", "ct"), strict=True):
        for n, arm in enumerate(arms):
            labels = [label for label in (f"{arm} {r}" for r in config.ratios) if label in summary]
            labels = labels or [arm] * len(
                config.ratios
            )  # no ratio of its own, or the run's only one
            dice = [summary[label]["dice", modality] for label in labels]
            mean, deviation = np.nan_to_num(np.array(dice), nan=0).T
            x = np.arange(len(config.ratios)) + 0.06 * (n - (len(arms) - 1) / 2)
            style = {"color": ARM_COLOURS[arm], "label": arm, "capsize": 2, "marker": "o"}
            axis.errorbar(x, mean, deviation, markersize=4, linewidth=1.5, **style)
        axis.set_xticks(range(len(config.ratios)), config.ratios)
        axis.set_xlabel("MRI : CT training cases")
        axis.set_title(modality.upper())
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("test Dice")
    legend(figure, axes)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="the --out of a run")
    parser.add_argument("out", nargs="?", type=Path, help="folder for pictures (default: RUN_DIR)")
    args = parser.parse_args(argv)
    if args.run is None:
        gallery(ROOT / "docs/gin.png")
        return 0
    try:
        config = results.read(args.run / "config.json", missing={})
        finished = results.read(args.run / "results.json", missing={}).get("finished")
    except DataError as error:
        parser.error(str(error))
    if not config or not finished:
        parser.error(f"{args.run}: nothing to draw, as no arm of a run is finished there")
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    validation(args.run, out / "validation.png")
    predictions(args.run, out / "predictions.png")
    if len(config["ratios"] or ()) > 1:
        ratios(args.run, out / "ratios.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
