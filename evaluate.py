"""Segment whole volumes with a model that sees patches, and score the result.

import torch
from evaluate import dice, sliding_window
model = lambda patches: torch.cat([-patches, patches], dim=1)  # (B, 1, P, P, P) → (B, 2, …)
logits = sliding_window(model, torch.randn(1, 40, 50, 30), patch_size=32)  # (2, 40, 50, 30)
print(dice(logits.argmax(0) == 1, logits[1] > 0))  # 1.0
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def sliding_window(
    model: Callable[[Tensor], Tensor],
    volume: Tensor,
    patch_size: int | Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 2,
) -> Tensor:
    """Run a patch model over a volume of any size and blend the overlapping outputs.

    volume: (C, *space); model: (B, C, *patch) → (B, C_out, *patch). Returns (C_out, *space),
    float32. Neighbouring patches share at least `overlap` of their width and are weighted by a
    Gaussian, σ = patch / 8, as in nnU-Net (Isensee et al., Nature Methods 2021), since predictions
    are worst at a patch's rim. A volume smaller than the patch is padded with its minimum. Raises
    ValueError for an overlap outside [0, 1) or a patch size that does not fit the volume's axes.
    """
    space = volume.shape[1:]
    patch = (patch_size,) * len(space) if isinstance(patch_size, int) else tuple(patch_size)
    if not 0 <= overlap < 1 or len(patch) != len(space) or min(patch) < 1:
        raise ValueError(f"overlap {overlap} must lie in [0, 1), patch {patch} fit {tuple(space)}")
    missing = [max(p - n, 0) for p, n in zip(patch, space, strict=True)]
    margins = [(m // 2, m - m // 2) for m in missing]
    flat = [side for margin in reversed(margins) for side in margin]
    padded = F.pad(volume, flat, value=float(volume.min()))
    starts = [_starts(n, p, overlap) for n, p in zip(padded.shape[1:], patch, strict=True)]
    windows = [
        (slice(None), *(slice(start, start + p) for start, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(*starts)
    ]
    weight = _gaussian(patch).to(volume.device)
    total, weights = None, torch.zeros_like(padded[:1], dtype=torch.float32)
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        # Filled up to batch_size: PyTorch's CPU convolutions take a slow path for a batch of one.
        filled = group + group[-1:] * (batch_size - len(group))
        outputs = model(torch.stack([padded[window] for window in filled])).float()
        if total is None:
            total = outputs.new_zeros(outputs.shape[1], *padded.shape[1:])
        for window, output in zip(group, outputs, strict=False):
            total[window] += weight * output
            weights[window] += weight
    inside = [slice(before, before + n) for (before, _), n in zip(margins, space, strict=True)]
    return (total / weights)[(slice(None), *inside)]


def _starts(size: int, patch: int, overlap: float) -> list[int]:
    """The fewest evenly spread starts that cover an axis: size 10, patch 4, half → 0, 2, 4, 6."""
    step = max(1, int(patch * (1 - overlap)))
    n = math.ceil((size - patch) / step) + 1
    return [round(i * (size - patch) / max(n - 1, 1)) for i in range(n)]


def _gaussian(patch: Sequence[int]) -> Tensor:
    """Weights of shape `patch`, largest in the middle, none too small to be divided by."""
    weight = torch.ones(())
    for p in patch:
        distance = (torch.arange(p) - (p - 1) / 2) / (p / 8)
        weight = weight[..., None] * torch.exp(-(distance**2) / 2)
    return weight.clamp(min=1e-3)


def dice(pred, label) -> float:
    """Dice overlap 2 |P ∩ L| / (|P| + |L|) of two boolean arrays (NumPy or torch) of one shape.

    Both empty: NaN, as there is nothing to score. One empty: 0. Raises ValueError for other input.
    """
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape or pred.dtype != bool or label.dtype != bool:
        raise ValueError(
            f"dice needs two boolean arrays of one shape, not {pred.dtype} {pred.shape} and "
            f"{label.dtype} {label.shape}"
        )
    size = int(pred.sum()) + int(label.sum())
    return 2 * int((pred & label).sum()) / size if size else math.nan


def score_case(pred: np.ndarray, truth: np.ndarray, organs: Sequence[str]) -> dict[str, float]:
    """Dice by organ of one case's label maps (0 background, organs from 1 on)."""
    return {o: dice(pred == label, truth == label) for label, o in enumerate(organs, start=1)}


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan


def mean_dice(scores: Sequence[dict[str, float]]) -> float:
    """Mean over organs of each organ's mean over cases; what was not scored is left out."""
    organs = scores[0] if scores else ()
    return mean(mean(case[organ] for case in scores) for organ in organs)


def summarize(results: Sequence[dict], organs: Sequence[str]) -> dict:
    """Boil per-case results down to {arm: {column: (mean, standard deviation over seeds)}}.

    results: dicts with seed, arm, modality and dice, a dict by organ. Columns: "mri", "ct", "mean"
    and (organ, modality). The deviation is the sample's, NaN with one seed.
    """
    summary: dict[str, dict] = {}
    for arm in dict.fromkeys(r["arm"] for r in results):
        by_seed = []
        for seed in dict.fromkeys(r["seed"] for r in results):
            row = {}
            for modality in ("mri", "ct"):
                scores = [
                    r["dice"]
                    for r in results
                    if (r["arm"], r["seed"], r["modality"]) == (arm, seed, modality)
                ]
                row[modality] = mean_dice(scores)
                row |= {(organ, modality): mean(s[organ] for s in scores) for organ in organs}
            row["mean"] = (row["mri"] + row["ct"]) / 2
            by_seed.append(row)
        summary[arm] = {}
        for column in by_seed[0]:
            values = [row[column] for row in by_seed if not math.isnan(row[column])]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            summary[arm][column] = mean(values), spread
    return summary


def table(summary: dict, organs: Sequence[str]) -> str:
    """The summary as a Markdown table, aligned to be read in a terminal: one row an arm."""

    def cell(value: tuple[float, float], digits: int = 3) -> str:
        number, spread = value
        if math.isnan(number):
            return "–"
        return f"{number:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")

    rows = [["arm", "MRI Dice", "CT Dice", "mean"] + [f"{o} MRI / CT" for o in organs]]
    for arm, row in summary.items():
        pairs = [[cell((row[o, m][0], math.nan), 2) for m in ("mri", "ct")] for o in organs]
        rows.append([arm, *(cell(row[c]) for c in ("mri", "ct", "mean")), *map(" / ".join, pairs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
