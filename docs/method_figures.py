"""Axial slices, and the pictures of the method; docs/figures.py saves them.

Slices are shown as radiologists look at them, from the feet: the patient's right is on the left and
the front is up.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patheffects import withStroke

import data
import gin
from fedgin import ARMS
from scans.cases import read_usable
from scans.layouts import find_cases
from scans.organs import ORGANS
from scans.phantom import make_phantom

plt.switch_backend("Agg")  # files, no windows
# Okabe and Ito's colours, which colour-blind readers can tell apart. A colour means one thing:
# modalities, organs and arms have colours of their own.
MODALITY_COLOURS = {"mri": "#E69F00", "ct": "#56B4E9"}
ORGAN_COLOURS = ("#00000000", "#F0E442", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
ARM_COLOURS = {"fedgin": "#b2182b", "fl": "#2c3e70", "mri-only": "#666666", "ct-only": "#999999"}
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.06}
plt.rcParams |= {"svg.hashsalt": "fedgin"}  # the same picture, the same bytes


# ------------------------------------------------------------------------------------------ slices


def grey(image: np.ndarray) -> np.ndarray:
    """An axial slice, (R, A) as nifti.py and phantom.py have it, as a picture.

    Its indices run to the patient's right and front, a picture's rows down and its columns right.
    """
    return image.T[::-1, ::-1]


def show(axis, image: np.ndarray, limits: tuple[float, float], title: str = "") -> None:
    """Draw an axial slice (R, A), black and white at the limits."""
    low, high = limits
    axis.imshow(grey(image), cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([], [])
    axis.set_yticks([], [])
    axis.spines[:].set_visible(False)


def mark_sides(axis) -> None:
    """Write R and L, the patient's, at the sides of a slice; once per row of slices."""
    outline = [withStroke(linewidth=2, foreground="black")]
    for x, side in ((0.05, "R"), (0.95, "L")):
        style = {"color": "white", "fontsize": 9, "fontweight": "bold", "path_effects": outline}
        axis.text(x, 0.5, side, ha="center", va="center", transform=axis.transAxes, **style)


def overlay(axis, labels: np.ndarray) -> None:
    """Draw the organs of an axial slice (R, A) over it."""
    colours = ListedColormap(ORGAN_COLOURS)
    axis.imshow(grey(labels), cmap=colours, vmin=0, vmax=5, interpolation="nearest", alpha=0.8)


def best_slice(labels: np.ndarray) -> int:
    """The axial slice with most organs, and of those the one with the largest smallest organ."""
    return max(range(labels.shape[2]), key=lambda z: organs_in(labels[:, :, z]))


def organs_in(labels: np.ndarray) -> tuple[int, int]:
    """How many organs there are, and the size of the smallest."""
    sizes = np.bincount(labels.ravel(), minlength=2)[1:]
    return int((sizes > 0).sum()), int(sizes[sizes > 0].min(initial=0))


def cut(image: np.ndarray) -> tuple[float, float]:
    """The percentiles of an image at which a panel is black and white."""
    low, high = np.percentile(image, data.NORMALIZATION["mri"])
    return float(low), float(high)


# --------------------------------------------------------------------------------------------- GIN


def read_scan(folder: Path) -> tuple[str, np.ndarray, int]:
    """A case folder of TotalSegmentator's layout: modality, normalized scan, and its best slice."""
    [case] = [case for case in find_cases(folder.resolve().parent) if case.id == folder.name]
    scan, labels = read_usable(case, ORGANS)
    return case.modality, data.normalize(scan.voxels, case.modality), best_slice(labels)


def gallery(*folders: Path):
    """A row for each scan: the scan, and the outputs of six random networks, the same for all.

    Of the first hundred seeds, those whose α is nearest to six values are shown.
    """
    rows = [read_scan(folder) for folder in folders]
    alphas = {n: float(draw_network(torch.zeros(1, 1, 1, 1, 1), n)[-1]) for n in range(100)}
    wanted = (0.1, 0.26, 0.42, 0.58, 0.74, 0.9)
    seeds = [min(alphas, key=lambda n, value=value: abs(alphas[n] - value)) for value in wanted]
    heights = [image.shape[1] / image.shape[0] for _, image, _ in rows]
    figure, axes = plt.subplots(
        len(rows),
        1 + len(seeds),
        figsize=(9, 1.25 * sum(heights) + 0.5),
        squeeze=False,
        height_ratios=heights,
    )
    for first, row, (modality, image, z) in zip((True, False), axes, rows, strict=False):
        x = torch.from_numpy(image)[None, None]
        show(row[0], image[:, :, z], cut(image), "input" if first else "")
        row[0].set_ylabel(modality.upper(), rotation=0, ha="right", va="center", fontsize=11)
        mark_sides(row[0])
        for n, (axis, seed) in enumerate(zip(row[1:], seeds, strict=True), start=1):
            drawn = gin.gin(x, generator=torch.Generator().manual_seed(seed))[0, 0].numpy()
            show(axis, drawn[:, :, z], cut(drawn), f"network {n}" if first else "")
            axis.set_xlabel("" if first else f"α = {alphas[seed]:.2f}", fontsize=9)
    return figure


def draw_network(
    x: torch.Tensor, seed: int, kernel_sizes: tuple[int, ...] = (1, 3)
) -> list[torch.Tensor]:
    """The kernels, biases and α that gin draws with a generator of this seed."""
    draws, channels = torch.Generator().manual_seed(seed), [x.shape[1], 2, 2, 2, x.shape[1]]
    return gin._draw_all(x, channels, kernel_sizes, draws)


def blend(x: torch.Tensor, alpha: float, kernel_sizes: tuple[int, ...], seed: int) -> torch.Tensor:
    """gin of (1, C, D, H, W), except that α is given instead of drawn."""
    *weights, _ = draw_network(x, seed, kernel_sizes)
    m = alpha * gin._network(x, weights) + (1 - alpha) * x
    return m * x.norm() / (m.norm() + 1e-5)


def gin_steps():
    """What α does, and what kernels of one voxel and of 3 × 3 × 3 do, on a CT phantom."""
    image, labels = make_phantom(42, "ct", 1)
    z = int((labels > 0).sum((0, 1)).argmax())
    x = torch.from_numpy(data.normalize(image, "ct"))[None, None]
    rows = {"one network,\nα from 0 to 1": [(n / 4, (1, 3), 7) for n in range(5)]}
    rows |= {f"network only,\nkernels {k}³": [(1, (k,), seed) for seed in range(5)] for k in (1, 3)}
    figure, axes = plt.subplots(3, 5, figsize=(9, 5.4))
    ends = {0: "α = 0 (input)", 4: "α = 1 (network only)"}
    for row, (label, panels) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
        for n, (axis, (alpha, sizes, seed)) in enumerate(zip(row, panels, strict=True)):
            drawn = blend(x, alpha, sizes, seed)[0, 0].numpy()
            name = ends.get(n, f"α = {alpha:g}") if len(sizes) > 1 else f"draw {seed + 1}"
            show(axis, drawn[:, :, z], cut(drawn), name)
    return figure


# ---------------------------------------------------------------------------------------- diagrams


def canvas(axis, title: str = "") -> None:
    """Make axes a sheet of 10 by 10 to draw on."""
    axis.set(xlim=(0, 10), ylim=(0, 10))
    axis.set_title(title, fontsize=11, fontweight="bold")
    axis.set_axis_off()


def box(axis, x: float, y: float, text: str, colour="white", **style) -> None:
    """A text centred in a box of its size."""
    look = {"boxstyle": "round,pad=0.5", "facecolor": colour}
    axis.text(x, y, text, ha="center", va="center", bbox=look, zorder=3, **style)


def arrow(axis, start: tuple, end: tuple, text: str = "", style: str = "->", shift=0.0) -> None:
    """An arrow, with a text beside its middle."""
    look = {"arrowstyle": style, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=look)
    x, y = np.mean([start, end], axis=0)
    axis.text(x + shift, y, text, ha="left" if shift > 0 else "right", va="center", fontsize=12)


def one_round():
    """A round of federated averaging at an MRI and a CT hospital."""
    figure, axis = plt.subplots(figsize=(9, 5.4))
    canvas(axis)
    average = "server:  (4)  w ← Σₖ (nₖ / Σⱼ nⱼ) · wₖ  =  (2 · w₁ + 10 · w₂) / 12"
    axis.add_patch(plt.Rectangle((0.1, 8.5), 9.8, 1.4, fill=False, linewidth=1.4))
    text = f"{average}\nreceives weights and case counts, never scans"
    axis.text(5, 9.2, text, ha="center", va="center", fontsize=12)
    for x, k, modality, n in ((2.4, "₁", "mri", 2), (7.6, "₂", "ct", 10)):
        colour = MODALITY_COLOURS[modality]
        wall = {"fill": False, "linestyle": "--", "edgecolor": colour, "linewidth": 2}
        axis.add_patch(plt.Rectangle((x - 2.3, 0.2), 4.6, 5.9, **wall))
        head = f"{modality.upper()} hospital, {n} training cases"
        axis.text(x, 5.65, head, ha="center", va="center", fontsize=11, fontweight="bold")
        image, labels = make_phantom(42, modality, 1)
        z, x_in = best_slice(labels), torch.from_numpy(data.normalize(image, modality))[None, None]
        drawn = gin.gin(x_in, generator=torch.Generator().manual_seed(15))[0, 0].numpy()
        pictures = (("scan", x_in[0, 0].numpy()), ("after GIN", drawn))
        for middle, (name, picture) in zip((x - 1.25, x + 1.25), pictures, strict=True):
            inset = axis.inset_axes((middle - 0.9, 3.0, 1.8, 2.1), transform=axis.transData)
            show(inset, picture[:, :, z], cut(picture))
            axis.text(middle, 2.75, name, ha="center", va="center", fontsize=10)
        arrow(axis, (x - 0.3, 4.05), (x + 0.3, 4.05))
        axis.text(x, 4.3, "GIN", ha="center", fontsize=10)
        arrow(axis, (x + 1.25, 2.5), (x + 1.25, 2.05))
        train = f"(2)  train the U-Net from w (AdamW):\nnew intensities, same labels  →  w{k}"
        box(axis, x, 1.3, train, (colour, 0.35), fontsize=11)
        arrow(axis, (x - 0.5, 8.5), (x - 0.5, 6.1), "(1)  w", shift=-0.15)
        arrow(axis, (x + 0.5, 6.1), (x + 0.5, 8.5), f"(3)  w{k}, n{k} = {n}", shift=0.15)
    return figure


def arms():
    """Whose scans take part in each arm, where it trains, and whether GIN is in it."""
    names = {"mri-only": "one modality", "ct-only": "one modality", "fl": "weights averaged"}
    names |= {"fedgin": "weights averaged", "centralized+gin": "scans in one place"}
    figure, axes = plt.subplots(1, len(names), figsize=(9, 2.9))
    for axis, (name, text) in zip(axes, names.items(), strict=True):
        arm = ARMS[name]
        canvas(axis, name)
        axis.text(5, 9.7, text, ha="center")
        for x, modality in ((2.3, "mri"), (7.7, "ct")):
            takes_part = modality in arm.modalities
            colour = MODALITY_COLOURS[modality] if takes_part else "0.95"
            box(axis, x, 0.8, modality.upper(), colour, alpha=1 if takes_part else 0.4)
            if takes_part:
                to = 5 if arm.centralized else x
                arrow(axis, (x, 1.35), (to, 2.9), style="-")
                arrow(axis, (to, 2.9), (to, 5.35))
                box(axis, to, 5.9, "train", "white" if arm.centralized else colour)
                if arm.gin:
                    box(axis, to, 3.4, "GIN (p)", fontweight="bold")
                if len(arm.modalities) > 1 and not arm.centralized:
                    arrow(axis, (x, 6.7), (5, 7.9), style="<->")
                    box(axis, 5, 8.5, "server")
    figure.supxlabel("also: centralized, mri-only+gin, ct-only+gin", fontsize=9)
    return figure
