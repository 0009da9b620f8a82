"""Axial slices, and the pictures of docs/method.md; docs/figures.py saves them.

Slices are shown as radiologists look at them, from the feet: the patient's right is on the left and
the front is up. GIN is shown at work on a phantom, the rest are diagrams.
"""

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patheffects import withStroke

import data
import gin
from fedgin import ARMS
from scans.phantom import make_phantom

plt.switch_backend("Agg")  # files, no windows
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
MODALITY_COLOURS = {"mri": ORANGE, "ct": SKY}
WINDOWS = {"ct": "{:g}…{:g} HU", "mri": "percentiles {:g}…{:g}"}
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.06}


# ------------------------------------------------------------------------------------------ slices


def window(image: np.ndarray, modality: str) -> tuple[float, float]:
    """What is black and what is white: HU for a CT, its percentiles for an MRI (data.normalize)."""
    low, high = data.NORMALIZATION[modality]
    return (low, high) if modality == "ct" else tuple(np.percentile(image, (low, high)))


def window_title(modality: str) -> str:
    return WINDOWS[modality].format(*data.NORMALIZATION[modality]).replace("-", "−")


def grey(image: np.ndarray) -> np.ndarray:
    """An axial slice, (R, A) as nifti.py and phantom.py have it, as a picture.

    Its indices run to the patient's right and front, a picture's rows down and its columns right.
    """
    return image.T[::-1, ::-1]


def show(axis, image: np.ndarray, limits: tuple[float, float], title: str = "") -> None:
    """Draw an axial slice (R, A), black and white at the limits, with its sides."""
    low, high = limits
    axis.imshow(grey(image), cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
    outline = [withStroke(linewidth=2, foreground="black")]
    for x, side in ((0.05, "R"), (0.95, "L")):
        style = {"color": "white", "fontsize": 9, "fontweight": "bold", "path_effects": outline}
        axis.text(x, 0.5, side, ha="center", va="center", transform=axis.transAxes, **style)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def overlay(axis, labels: np.ndarray) -> None:
    """Draw the organs of an axial slice (R, A) over it."""
    colours = ListedColormap(ORGAN_COLOURS)
    axis.imshow(grey(labels), cmap=colours, vmin=0, vmax=5, interpolation="nearest", alpha=0.8)


def best_slice(labels: np.ndarray) -> int:
    """The axial slice with most organs, and of those the one with the largest smallest organ."""

    def key(z: int):
        sizes = np.bincount(labels[:, :, z].ravel(), minlength=2)[1:]
        return (sizes > 0).sum(), sizes[sizes > 0].min(initial=0)

    return max(range(labels.shape[2]), key=key)


# ------------------------------------------------------------------------------ GIN and the method


def gallery():
    """A CT and an MRI phantom, and what the same eight random networks make of them."""
    figure = plt.figure(figsize=(9, 4.9))
    for block, modality in zip(figure.subfigures(1, 2), ("ct", "mri"), strict=True):
        image, z, batch = liver_slice(modality)
        axes = block.subplots(3, 3).ravel()
        title = f"{modality.upper()} phantom\n{window_title(modality)}"
        show(axes[0], image[:, :, z], window(image, modality), title)
        generator = torch.Generator().manual_seed(42)  # the same eight networks for both
        for n, axis in enumerate(axes[1:], start=1):
            drawn = gin.gin(batch, generator=generator)[0, 0].numpy()
            show(axis, drawn[:, :, z], window(drawn, "mri"), f"draw {n}")
    return figure


def liver_slice(modality: str) -> tuple[np.ndarray, int, torch.Tensor]:
    """A phantom, the slice that has most of its organs, and the phantom as a batch of one."""
    image, labels = make_phantom(42, modality, 1)
    batch = torch.from_numpy(data.normalize(image, modality))[None, None]
    return image, int((labels > 0).sum((0, 1)).argmax()), batch


def blend(x: torch.Tensor, alpha: float, kernel_sizes: tuple[int, ...], seed: int) -> torch.Tensor:
    """gin of (1, C, D, H, W), but for α, which is given instead of drawn."""
    draws, channels = torch.Generator().manual_seed(seed), [x.shape[1], 2, 2, 2, x.shape[1]]
    *weights, _ = gin._draw_all(x, channels, kernel_sizes, draws)
    m = alpha * gin._network(x, weights) + (1 - alpha) * x
    return m * x.norm() / (m.norm() + 1e-5)


def gin_steps():
    """What α does, and what kernels of one voxel and of 3 × 3 × 3 do."""
    _, z, x = liver_slice("ct")
    title = "one network, α from 0 to 1 (black and white: each panel's percentiles 0.5 and 99.5)"
    rows = {title: [(n / 4, (1, 3), 7) for n in range(5)]}
    rows |= {f"α = 1, all kernels {k}³": [(1, (k,), seed) for seed in range(5)] for k in (1, 3)}
    figure = plt.figure(figsize=(9, 6.6))
    for block, (title, panels) in zip(figure.subfigures(3, 1), rows.items(), strict=True):
        block.suptitle(title, fontsize=11)
        for axis, (alpha, sizes, seed) in zip(block.subplots(1, 5), panels, strict=True):
            drawn = blend(x, alpha, sizes, seed)[0, 0].numpy()
            name = f"α = {alpha:g}" if len(sizes) > 1 else f"draw {seed + 1}"
            show(axis, drawn[:, :, z], window(drawn, "mri"), name)
    return figure


def canvas(axis, title: str = "", colour: str = "black") -> None:
    """Make axes a sheet of 10 by 10 to draw on."""
    axis.set(xlim=(0, 10), ylim=(0, 10))
    axis.set_title(title, color=colour, fontsize=11, fontweight="bold")
    axis.set_axis_off()


def box(axis, x: float, y: float, text: str, colour="white", **style) -> None:
    """A text centred in a box of its size."""
    look = {"boxstyle": "round,pad=0.5", "facecolor": colour}
    axis.text(x, y, text, ha="center", va="center", bbox=look, zorder=3, **style)


def arrow(axis, start: tuple, end: tuple, text: str = "", style: str = "->") -> None:
    look = {"arrowstyle": style, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=look)
    x, y = np.mean([start, end], axis=0)
    axis.text(x, y, text, ha="center", va="center", fontsize=12, backgroundcolor="white")


def one_round():
    """A round of federated averaging at an MRI and a CT hospital."""
    figure, axis = plt.subplots(figsize=(9, 5.2))
    canvas(axis)
    average = "server:  w ← Σₖ (nₖ / Σⱼ nⱼ) · wₖ  =  (2 · w₁ + 10 · w₂) / 12"
    box(axis, 5, 9, f"{average}\nit gets weights and numbers of cases, no scan", fontsize=12)
    steps = ("its scans and labels stay here", "random patches")
    steps += ("GIN: other intensities, same labels", "U-Net, from w on: steps of AdamW", "w{}")
    for x, top, k, modality, n in ((2.2, 3.8, "₁", "mri", 2), (7.8, 6.2, "₂", "ct", 10)):
        head = f"{modality.upper()} hospital, {n} training cases\n\n"
        text = head + "\n↓\n".join(steps).format(k)
        box(axis, x, 2.7, text, (MODALITY_COLOURS[modality], 0.5), fontsize=11)
        arrow(axis, (top - 0.9, 8.2), (x - 0.9, 5.2), "w")
        arrow(axis, (x + 0.9, 5.2), (top + 0.9, 8.2), f"w{k}, n{k} = {n}")
    return figure


def arms():
    """Whose scans take part in each arm, where it trains, and whether GIN is in it."""
    names = {"mri-only": "one modality", "ct-only": "one modality", "fl": "weights averaged"}
    names |= {"fedgin": "weights averaged", "centralized+gin": "scans pooled"}
    figure, axes = plt.subplots(1, len(names), figsize=(9, 3.4))
    for axis, (name, text) in zip(axes, names.items(), strict=True):
        arm = ARMS[name]
        canvas(axis, name, ARM_COLOURS[name])
        axis.text(5, 9.6, text, ha="center")
        for x, modality in ((2.3, "mri"), (7.7, "ct")):
            colour = MODALITY_COLOURS[modality] if modality in arm.modalities else "0.95"
            box(axis, x, 0.8, modality.upper(), colour, alpha=0.4 + 0.6 * (colour != "0.95"))
            if modality in arm.modalities:
                to = 5 if arm.pooled else x
                arrow(axis, (x, 1.5), (to, 2.9), style="-")
                arrow(axis, (to, 2.9), (to, 5.2))
                box(axis, to, 5.8, "train", "white" if arm.pooled else colour)
                if arm.gin:
                    box(axis, to, 3.3, "GIN", fontweight="bold")
                if len(arm.modalities) > 1 and not arm.pooled:
                    arrow(axis, (x, 6.4), (5, 7.8), style="<->")
                    box(axis, 5, 8.3, "server")
    return figure
