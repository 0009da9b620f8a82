"""Segment whole volumes with a model that sees patches, and score the result.

Sliding window with Gaussian blending; Dice, HD95 and NSD in millimetres; the tables of a run; and a
command that writes predictions: python evaluate.py --help.

    import torch
    from evaluate import dice, sliding_window
    model = lambda patches: torch.cat([-patches, patches], dim=1)  # (B, 1, P, P, P) → (B, 2, …)
    logits = sliding_window(model, torch.randn(1, 40, 50, 30), patch_size=32)  # (2, 40, 50, 30)
    print(dice(logits.argmax(0) == 1, logits[1] > 0))  # 1.0
"""

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

if TYPE_CHECKING:
    from data import Case

Mask = np.ndarray | Tensor  # of booleans
METRICS = ("dice", "hd95", "nsd")
COUNTED = ("scored", "missed", "absent")  # outcomes; the fourth is "unlabelled"


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
    float32, on the volume's device; the model may answer from another. Neighbouring patches share
    at least `overlap` of their width and are weighted by a Gaussian, σ = patch / 8, as in nnU-Net
    (Isensee et al., Nature Methods 2021), since predictions are worst at a patch's rim. A volume
    smaller than the patch is padded with its minimum. Raises ValueError for an overlap outside
    [0, 1) or a patch size that does not fit the volume's axes.
    """
    space = volume.shape[1:]
    patch = (patch_size,) * len(space) if isinstance(patch_size, int) else tuple(patch_size)
    if not 0 <= overlap < 1 or len(patch) != len(space) or min(patch) < 1:
        raise ValueError(f"overlap {overlap} must lie in [0, 1), patch {patch} fit {tuple(space)}")
    missing = [max(p - n, 0) for p, n in zip(patch, space, strict=True)]
    margins = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]  # last axis first
    padded = F.pad(volume, margins, value=float(volume.min()))
    windows = _windows(padded.shape[1:], patch, overlap)
    weight = _gaussian(patch).to(volume.device)
    total, weights = torch.empty(0), torch.zeros_like(padded[:1], dtype=torch.float32)
    for first in range(0, len(windows), batch_size):
        group = windows[first : first + batch_size]
        # Filled up to batch_size: PyTorch's CPU convolutions take a slow path for a batch of one.
        filled = group + group[-1:] * (batch_size - len(group))
        outputs = model(torch.stack([padded[window] for window in filled])).float()
        outputs = outputs.to(volume.device)
        if first == 0:
            total = outputs.new_zeros(outputs.shape[1], *padded.shape[1:])
        for window, output in zip(group, outputs, strict=False):
            total[window] += weight * output
            weights[window] += weight
    inside = [slice(m // 2, m // 2 + n) for m, n in zip(missing, space, strict=True)]
    return total.div_(weights)[(slice(None), *inside)]


def _windows(space: Sequence[int], patch: Sequence[int], overlap: float) -> list[tuple]:
    """The index, all channels, of each patch that a volume is cut into."""
    starts = [_starts(n, p, overlap) for n, p in zip(space, patch, strict=True)]
    return [
        (slice(None), *(slice(start, start + p) for start, p in zip(corner, patch, strict=True)))
        for corner in itertools.product(*starts)
    ]


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


def dice(pred: Mask, label: Mask) -> float:
    """Dice overlap 2 |P ∩ L| / (|P| + |L|) of two boolean arrays (NumPy or torch) of one shape.

    Both empty: NaN, as there is nothing to score. One empty: 0. Raises ValueError for other input.
    """
    pred, label = _masks(pred, label)
    size = int(pred.sum()) + int(label.sum())
    return 2 * int((pred & label).sum()) / size if size else math.nan


def hd95(pred: Mask, label: Mask, spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm of two boolean arrays of one shape.

    A surface is the mask's voxels of which a face neighbour lies outside mask or array; distances
    run between voxel centres. Of the two directions, each with its own 95th percentile (linear
    interpolation), the larger counts: MONAI's compute_hausdorff_distance. Others pool both
    directions before the percentile (medpy) or weight surface elements by area (DeepMind's
    surface-distance). spacing: mm along each axis. Both empty: NaN. One empty: the array's
    diagonal. Raises ValueError for other input.
    """
    return hd95_and_nsd(pred, label, spacing, math.inf)[0]


def nsd(pred: Mask, label: Mask, spacing: Sequence[float], tolerance: float) -> float:
    """Normalized surface Dice: the share of both surfaces within `tolerance` mm of the other one.

    Nikolov et al. 2018 (arXiv 1809.04430), with the surface of hd95 and each of its voxels counted
    once, as MONAI's SurfaceDiceMetric does. Both empty: NaN. One empty: 0. Raises ValueError for
    other input.
    """
    return hd95_and_nsd(pred, label, spacing, tolerance)[1]


def hd95_and_nsd(
    pred: Mask, label: Mask, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """hd95 and nsd in half the time, as both need the same distances."""
    pred, label = _masks(pred, label)
    if not (pred.any() and label.any()):
        diagonal = math.dist([0] * pred.ndim, np.multiply(pred.shape, spacing))
        return (diagonal, 0.0) if pred.any() or label.any() else (math.nan, math.nan)
    distances = _surface_distances(pred, label, spacing)
    farthest = max(float(np.percentile(d, 95)) for d in distances)
    return farthest, float((np.concatenate(distances) <= tolerance).mean())


def _masks(pred: Mask, label: Mask) -> tuple[np.ndarray, np.ndarray]:
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape or pred.dtype != bool or label.dtype != bool:
        raise ValueError(
            f"expected two boolean arrays of one shape, not {pred.dtype} {pred.shape} and "
            f"{label.dtype} {label.shape}"
        )
    return pred, label


def _surface_distances(
    pred: np.ndarray, label: np.ndarray, spacing: Sequence[float]
) -> list[np.ndarray]:
    """Distance (mm) of each surface voxel of pred to label's surface, and the other way round."""
    if len(spacing) != pred.ndim or min(spacing) <= 0:
        raise ValueError(f"spacing {tuple(spacing)} must be {pred.ndim} positive numbers in mm")
    [box] = ndimage.find_objects((pred | label).astype(np.uint8))  # work grows with the organ only
    surfaces = []
    for mask in (pred[box], label[box]):
        surface = mask & ~ndimage.binary_erosion(mask)  # outside the box counts as outside
        surfaces.append(np.argwhere(surface) * np.asarray(spacing, dtype=float))
    ours, theirs = surfaces
    return [cKDTree(b).query(a, workers=-1)[0] for a, b in ((ours, theirs), (theirs, ours))]


def score_case(
    pred: np.ndarray,
    truth: np.ndarray,
    organs: Sequence[str],
    spacing: Sequence[float],
    tolerance: float = 2.0,
    labelled: Sequence[bool] | np.ndarray | None = None,
) -> dict[str, dict]:
    """Score the label maps of one case (0 background, organs from 1 on): {organ: its scores}.

    Scores are the outcome and, where that is "scored" or "missed", dice, hd95 (mm) and nsd (at
    `tolerance` mm). An organ that only the prediction lacks is "missed", one that both lack
    "absent"; one whose label is False in `labelled` (None: all are True) is "unlabelled", as it may
    be there.
    """
    scores: dict[str, dict] = {}
    for label, organ in enumerate(organs, start=1):
        ours, theirs = pred == label, truth == label
        if labelled is not None and not labelled[label]:
            scores[organ] = {"outcome": "unlabelled"}
        elif not (ours.any() or theirs.any()):
            scores[organ] = {"outcome": "absent"}
        else:
            outcome = "scored" if ours.any() else "missed"
            distance, share = hd95_and_nsd(ours, theirs, spacing, tolerance)
            found = {"dice": dice(ours, theirs), "hd95": distance, "nsd": share}
            scores[organ] = {"outcome": outcome, **found}
    return scores


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan


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
        for outcome in COUNTED:
            columns[outcome, m] = sum(s[o]["outcome"] == outcome for s in scores for o in organs)
    columns["mean"] = (columns["dice", "mri"] + columns["dice", "ct"]) / 2
    return columns


def table(summary: dict[str, dict], organs: Sequence[str]) -> str:
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
    surface[0] += [f"{outcome} MRI / CT" for outcome in COUNTED]
    for arm, row in summary.items():
        dices = [cell(row[column]) for column in (("dice", "mri"), ("dice", "ct"), "mean")]
        overlap.append([arm, *dices, *(pair(row, organ, 2) for organ in organs)])
        distances = [cell(row["hd95", m], 1) for m in ("mri", "ct")]
        distances += [cell(row["nsd", m]) for m in ("mri", "ct")]
        surface.append([arm, *distances, *(pair(row, outcome, 0) for outcome in COUNTED)])
    return _markdown(overlap) + "\n\n" + _markdown(surface)


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


# ---------------------------------------------------------------------------- python evaluate.py
# What follows reads scans and checkpoints, for which it imports data.py and unet3d.py; all above
# stands alone.


def segment(model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int]) -> np.ndarray:
    """Label map of a normalized image (D, H, W), brought from the model's grid to `size` voxels.

    The model runs where it is, in mixed precision where that pays; the logits are put together
    there as well if its free memory holds them, and on the CPU otherwise.
    """
    from data import resample_labels

    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    fits = cuda and torch.cuda.mem_get_info(device)[0] > 20 * image.nbytes
    volume = torch.tensor(image)[None].to(device if fits else "cpu")
    dtype = mixed_precision(device)
    model.eval()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits = sliding_window(lambda patches: model(patches.to(device)), volume, patch)
    return resample_labels(logits, tuple(size))


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the GPU computes in it; None, that is float32, elsewhere."""
    capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if capable else None


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a checkpoint and what it needs: organs, spacing, patch, normalization.

    Raises DataError for a file that is no checkpoint of fedgin.py. Opening one runs no code.
    """
    from data import NORMALIZATION, DataError
    from unet3d import UNet3D

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needs = checkpoint["model"]
        model = UNet3D(1, len(needs["organs"]) + 1, needs["width"], needs["depth"])
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:  # PyTorch has many for a file that is not its own
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: no checkpoint of fedgin.py ({message})") from error
    if {k: tuple(v) for k, v in needs["normalization"].items()} != NORMALIZATION:
        raise DataError(f"{path}: was trained with another normalization: {needs['normalization']}")
    model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model, needs


def find_scans(paths: Sequence[str], modality: str | None, layout: str | None) -> dict[str, "Case"]:
    """{name: Case} of files, folders of files and folders in a known layout."""
    from data import Case, DataError, find_cases

    scans: dict[str, Case] = {}
    for path in map(Path, paths):
        files = sorted(f for f in path.glob("[!.]*") if f.name.endswith((".nii", ".nii.gz")))
        if path.is_dir() and not files:
            cases = find_cases(path, modality, layout)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            cases = []
            for file in files or [path]:
                name = file.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
                kind = modality or {"ct": "ct", "mri": "mri"}.get(name)
                name = file.resolve().parent.name if name in ("ct", "mri") else name
                if kind is None:
                    raise DataError(f"{file}: CT or MRI? Say so with --modality")
                cases.append(Case("file", str(path), name, kind, "", file, {}))
        for case in cases:
            if case.id in scans:
                raise DataError(f"{case.image}: there is another scan named {case.id}")
            scans[case.id] = case
    return scans


def predict(
    case: "Case", model: nn.Module, needs: dict, out: Path, tolerance: float
) -> dict[str, dict]:
    """Write the label map of a scan to out/ID.nii.gz on the scan's own grid; return its scores."""
    from data import read_nifti, read_usable, to_model_grid, to_scan_grid, write_nifti

    if case.masks:
        scan, truth = read_usable(case, needs["organs"])
    else:
        scan, truth = read_nifti(case.image), None
    image = to_model_grid(scan, case.modality, needs["spacing"])
    labels = segment(model, image, needs["patch"], scan.voxels.shape)
    write_nifti(out / f"{case.id}.nii.gz", to_scan_grid(labels, scan), scan)
    if truth is None:
        return {}
    labelled = [True] + [organ in case.masks for organ in needs["organs"]]
    return score_case(labels, truth, needs["organs"], scan.spacing, tolerance, labelled)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from data import LAYOUTS, NORMALIZATION

    parser = argparse.ArgumentParser(description="Segment scans with a checkpoint of fedgin.py.")
    text = "a trained arm, runs/limited/fedgin.pt for instance"
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="PATH", help="NIfTI files or folders of them"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for label maps")
    parser.add_argument("--modality", choices=NORMALIZATION, help="where names do not tell it")
    parser.add_argument("--layout", choices=LAYOUTS, help="where a folder looks like two")
    text = "mm within which a surface voxel counts as right (default: 2)"
    parser.add_argument("--nsd-tolerance", type=float, default=2.0, metavar="MM", help=text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from data import DataError

    words = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, needs = load_model(words.checkpoint, device)
        scans = find_scans(words.images, words.modality, words.layout)
        if (words.out / "labels.json").exists():
            raise DataError(f"{words.out}: already holds predictions; choose another --out")
        words.out.mkdir(parents=True, exist_ok=True)
        ids = {"background": 0} | {organ: n for n, organ in enumerate(needs["organs"], start=1)}
        (words.out / "labels.json").write_text(json.dumps(ids, indent=1), encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    results, failed = [], 0
    for case in tqdm(scans.values(), desc="segmenting", unit="scan"):
        try:
            scores = predict(case, model, needs, words.out, words.nsd_tolerance)
        except (DataError, OSError) as error:
            tqdm.write(f"evaluate.py: {error}", file=sys.stderr)
            failed += 1
        else:
            where = {"arm": words.checkpoint.stem, "seed": 0, "case": case.id}
            results += [{**where, "modality": case.modality, "scores": scores}] if scores else []
    if results:
        print(table(summarize(results, needs["organs"]), needs["organs"]))
        write_scores(words.out / "scores.csv", results)
    print(f"{len(scans) - failed} of {len(scans)} scans segmented, in {words.out}{os.sep}")
    return int(failed > 0)


def write_scores(path: Path, results: Sequence[dict]) -> None:
    """One line a case and organ: case, modality, organ, outcome, dice, hd95, nsd."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "modality", "organ", "outcome", "dice", "hd95", "nsd"])
        for result in results:
            for organ, s in result["scores"].items():
                metrics = [s.get(metric, "") for metric in METRICS]
                writer.writerow([result["case"], result["modality"], organ, s["outcome"], *metrics])


if __name__ == "__main__":
    sys.exit(main())
