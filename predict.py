"""Segment scans with a checkpoint of fedgin.py: one label map a scan, on the scan's own grid.

    python predict.py --checkpoint runs/limited/fedgin-1-5-p1-seed42.pt --images PATHS --out DIR

Where there are labels it prints scores and writes them to scores.csv.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import nn
from tqdm import tqdm

from cases import read_usable
from config import is_out_of_memory, run_command
from data import NORMALIZATION, labelled_organs, to_model_grid
from datasets import LAYOUTS, Case, DataError, find_cases
from evaluate import choose_device, mixed_precision, score_case, sliding_window
from nifti import read_nifti, resample_labels, write_nifti
from results import read, write
from tables import list_scores, tables
from unet3d import UNet3D, memory_format


def segment(model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int]) -> np.ndarray:
    """Label map of a normalized image (D, H, W), brought from the model's grid to `size` voxels.

    The model runs where it is, in mixed precision where that pays; the logits are put together
    there as well if its memory holds them, and on the CPU otherwise.
    """
    device = next(model.parameters()).device
    model.eval()
    if has_room(device, image, size):
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return _segment(model, image, patch, size, device)
    return _segment(model, image, patch, size, torch.device("cpu"))


def has_room(device: torch.device, image: np.ndarray, size: Sequence[int]) -> bool:
    """Whether a device is a GPU whose memory holds an image's logits, also on a grid of `size`.

    On the model's grid these are up to 16 classes and 4 more arrays of float32; on the scan's, one
    class at a time, three such arrays and two of bytes (nifti.resample_labels). What PyTorch keeps
    for itself and does not use is free as well.
    """
    if device.type != "cuda":
        return False
    wanted = 20 * image.nbytes + 14 * math.prod(size)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused > wanted


def _segment(
    model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int], blend_on: torch.device
) -> np.ndarray:
    device = next(model.parameters()).device
    dtype = mixed_precision(device)
    volume = torch.tensor(image)[None].to(blend_on)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits = sliding_window(lambda patches: model(patches.to(device)), volume, patch)
    return resample_labels(logits, size)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a checkpoint, and its organs, spacing, patch, normalization, width and depth.

    Raises DataError for a file that is no checkpoint of fedgin.py. Opening one runs no code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model_config, weights = checkpoint["model"], checkpoint["weights"]
        width, depth = int(model_config["width"]), int(model_config["depth"])
        if not (1 <= depth <= 12 and all(torch.isfinite(w).all() for w in weights.values())):
            raise ValueError("its depth or its weights cannot be")
        with torch.device("meta"):  # no memory before the weights are known to fit
            model = UNet3D(1, len(model_config["organs"]) + 1, width, depth)
        model.load_state_dict(weights, assign=True)
        normalization = {k: tuple(v) for k, v in model_config["normalization"].items()}
    except Exception as error:  # PyTorch has many for a file that is not its own
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: no checkpoint of fedgin.py ({message})") from error
    if normalization != NORMALIZATION:
        raise DataError(f"{path}: was trained with another normalization: {normalization}")
    model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]
    return model, model_config


def find_scans(
    paths: Sequence[str], out: Path, modality: str | None, layout: str | None
) -> dict[Path, Case]:
    """{its label map: Case} of files, folders of files and folders in a known layout.

    Ids are unique within a folder only: where several are named, each has a folder of its own below
    out. Raises DataError for a label map that would stand for two scans or lie among scans.
    """
    scans: dict[Path, Case] = {}
    for path in map(Path, paths):
        files = sorted(f for f in path.glob("[!.]*") if f.name.endswith((".nii", ".nii.gz")))
        if path.is_dir() and not files:
            cases = find_cases(path, modality, layout)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            cases = [_case_of_file(file, path, modality) for file in files or [path]]
        folder = out / path.resolve().name if path.is_dir() and len(paths) > 1 else out
        for case in cases:
            target = folder / f"{case.id}.nii.gz"
            if target in scans:
                raise DataError(f"{case.image}: there is another scan named {case.id}")
            scans[target] = case
    taken = {file.resolve().parent for case in scans.values() for file in case.files()}
    for folder in (out.resolve(), *out.resolve().parents):
        if folder in taken:
            raise DataError(f"--out {out}: lies in {folder}, which holds scans or labels")
    return scans


def _case_of_file(file: Path, path: Path, modality: str | None) -> Case:
    name = file.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
    kind = modality or {"ct": "ct", "mri": "mri"}.get(name)
    name = file.resolve().parent.name if name in ("ct", "mri") else name
    if kind is None:
        raise DataError(f"{file}: CT or MRI? Say so with --modality")
    return Case("file", str(path), name, kind, "", file, {})


def open_out(out: Path, checkpoint: Path, organs: Sequence[str], targets: Iterable[Path]) -> None:
    """Make or continue a folder of predictions; raises DataError where that would lose a file.

    A folder is continued by the checkpoint that it was begun with.
    """
    about = {"checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    about_file, labels_file = out / "predictions.json", out / "labels.json"
    if about_file.exists():
        if read(about_file, missing={}) != about:
            raise DataError(f"{out}: holds predictions of another checkpoint; choose another --out")
        for leftover in out.rglob("tmp-*.nii.gz"):
            leftover.unlink()
        return
    for path in (labels_file, out / "scores.csv", *targets):
        if path.exists():
            raise DataError(f"{path}: is there, and not of this command; choose another --out")
    ids = {"background": 0} | {organ: n for n, organ in enumerate(organs, start=1)}
    out.mkdir(parents=True, exist_ok=True)
    write(labels_file, json.dumps(ids, indent=1).encode())
    write(about_file, json.dumps(about, indent=1).encode())


def predict(case: Case, model: nn.Module, model_config: dict, path: Path, tolerance: float) -> dict:
    """Write the label map of a scan to `path`, unless it is there; return its scores.

    Without labels there are none: {}. Raises DataError for a scan that cannot be used.
    """
    organs = model_config["organs"]
    if path.exists() and not case.masks:
        return {}
    try:
        if case.masks:
            scan, target = read_usable(case, organs)
        else:
            scan, target = read_nifti(case.image), None
        if path.exists():
            labels = read_nifti(path).voxels.astype(np.uint8)
        else:
            image = to_model_grid(scan, case.modality, model_config["spacing"])
            labels = segment(model, image, model_config["patch"], scan.voxels.shape)
            path.parent.mkdir(exist_ok=True)
            write_nifti(path, labels, scan)
    except ImageFileError as error:
        raise DataError(f"{case.image}: {error}") from error
    if target is None:
        return {}
    labelled = labelled_organs(case, organs)
    return score_case(labels, target, organs, scan.spacing, tolerance, labelled)


def _millimetres(text: str) -> float:
    if not (math.isfinite(float(text)) and float(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s --checkpoint FILE --images PATH [PATH …] --out DIR [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "a trained arm, runs/limited/fedgin-1-5-p1-seed42.pt for instance"
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="PATH", help="NIfTI files or folders of them"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for label maps")
    parser.add_argument("--modality", choices=NORMALIZATION, help="where names do not tell it")
    parser.add_argument("--layout", choices=LAYOUTS, help="where a folder looks like two")
    text = "mm within which a surface voxel counts as right (default: 2)"
    parser.add_argument("--nsd-tolerance", type=_millimetres, default=2.0, metavar="MM", help=text)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Segment every scan that can be; 1 if one could not."""
    device = choose_device()
    model, model_config = load_model(args.checkpoint, device)
    scans = find_scans(args.images, args.out, args.modality, args.layout)
    organs = model_config["organs"]
    print(f"{args.checkpoint} segments {', '.join(organs)}")
    if model_config.get("phantoms"):
        print("WARNING: it was trained on PHANTOMS; what it finds in scans means nothing")
    open_out(args.out, args.checkpoint, organs, scans)
    results, failed = [], 0
    for path, case in tqdm(scans.items(), desc="segmenting", unit="scan", disable=None):
        try:
            scores = predict(case, model, model_config, path, args.nsd_tolerance)
        except (DataError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            named = "" if isinstance(error, DataError) else f"{case.image}: "
            tqdm.write(f"predict.py: {named}{error}", file=sys.stderr)
            failed += 1
        else:
            name = str(path.relative_to(args.out)).removesuffix(".nii.gz")
            about = {"arm": args.checkpoint.stem, "seed": 0, "case": name}
            results += [{**about, "modality": case.modality, "scores": scores}] if scores else []
    if results:
        print(tables(results, organs))
        write(args.out / "scores.csv", list_scores(results).encode())
    print(f"{len(scans) - failed} of {len(scans)} scans segmented, in {args.out}{os.sep}")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if a scan could not be segmented, 2 for bad input."""
    args = parse(argv)
    hint = "; the same command goes on with what is missing"
    return run_command("predict.py", lambda: run(args), lambda: hint)


if __name__ == "__main__":
    sys.exit(main())
