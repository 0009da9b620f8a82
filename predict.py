"""Segment scans with a checkpoint of fedgin.py: one label map a scan, on the scan's own grid.

    python predict.py --checkpoint runs/limited/fedgin.pt --images DIR_OR_FILES --out DIR

Where there are labels it prints scores and writes them to scores.csv.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from torch import nn
from tqdm import tqdm

from cases import read_usable
from data import NORMALIZATION, labelled_organs, to_model_grid
from datasets import LAYOUTS, Case, DataError, find_cases
from evaluate import mixed_precision, score_case, sliding_window
from nifti import read_nifti, resample_labels, write_nifti
from results import METRICS, summarize, table
from unet3d import UNet3D


def segment(model: nn.Module, image: np.ndarray, patch: int, size: Sequence[int]) -> np.ndarray:
    """Label map of a normalized image (D, H, W), brought from the model's grid to `size` voxels.

    The model runs where it is, in mixed precision where that pays; the logits are put together
    there as well if its free memory holds them, and on the CPU otherwise.
    """
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    fits = cuda and torch.cuda.mem_get_info(device)[0] > 20 * image.nbytes
    volume = torch.tensor(image)[None].to(device if fits else "cpu")
    dtype = mixed_precision(device)
    model.eval()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits = sliding_window(lambda patches: model(patches.to(device)), volume, patch)
    return resample_labels(logits, size)


def load_model(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network of a checkpoint, and its organs, spacing, patch, normalization, width and depth.

    Raises DataError for a file that is no checkpoint of fedgin.py. Opening one runs no code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model_config = checkpoint["model"]
        size = model_config["width"], model_config["depth"]
        model = UNet3D(1, len(model_config["organs"]) + 1, *size)
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:  # PyTorch has many for a file that is not its own
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: no checkpoint of fedgin.py ({message})") from error
    normalization = {k: tuple(v) for k, v in model_config["normalization"].items()}
    if normalization != NORMALIZATION:
        raise DataError(f"{path}: was trained with another normalization: {normalization}")
    model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model, model_config


def find_scans(paths: Sequence[str], modality: str | None, layout: str | None) -> dict[str, Case]:
    """{name: Case} of files, folders of files and folders in a known layout."""
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


def predict(case: Case, model: nn.Module, model_config: dict, out: Path, tolerance: float) -> dict:
    """Write the label map of a scan to out/ID.nii.gz; return its scores, {} without labels."""
    organs = model_config["organs"]
    if case.masks:
        scan, target = read_usable(case, organs)
    else:
        try:
            scan, target = read_nifti(case.image), None
        except ImageFileError as error:
            raise DataError(f"{case.image}: {error}") from error
    image = to_model_grid(scan, case.modality, model_config["spacing"])
    labels = segment(model, image, model_config["patch"], scan.voxels.shape)
    write_nifti(out / f"{case.id}.nii.gz", labels, scan)
    if target is None:
        return {}
    labelled = labelled_organs(case, organs)
    return score_case(labels, target, organs, scan.spacing, tolerance, labelled)


def write_scores(path: Path, results: Sequence[dict]) -> None:
    """One line a case and organ: case, modality, organ, outcome, dice, hd95, nsd."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "modality", "organ", "outcome", *METRICS])
        for result in results:
            for organ, s in result["scores"].items():
                metrics = [s.get(metric, "") for metric in METRICS]
                writer.writerow([result["case"], result["modality"], organ, s["outcome"], *metrics])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="%(prog)s --checkpoint FILE --images PATH [PATH …] --out DIR [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
    """Run the command; exit code 0, 1 if a scan could not be segmented, 2 for bad input."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, model_config = load_model(args.checkpoint, device)
        scans = find_scans(args.images, args.modality, args.layout)
        if (args.out / "labels.json").exists():
            raise DataError(f"{args.out}: already holds predictions; choose another --out")
        args.out.mkdir(parents=True, exist_ok=True)
        organs = model_config["organs"]
        ids = {"background": 0} | {organ: n for n, organ in enumerate(organs, start=1)}
        (args.out / "labels.json").write_text(json.dumps(ids, indent=1), encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    results, failed = [], 0
    for case in tqdm(scans.values(), desc="segmenting", unit="scan"):
        try:
            scores = predict(case, model, model_config, args.out, args.nsd_tolerance)
        except (DataError, OSError) as error:
            tqdm.write(f"predict.py: {error}", file=sys.stderr)
            failed += 1
        else:
            about = {"arm": args.checkpoint.stem, "seed": 0, "case": case.id}
            results += [{**about, "modality": case.modality, "scores": scores}] if scores else []
    if results:
        print(table(summarize(results, organs), organs))
        write_scores(args.out / "scores.csv", results)
    print(f"{len(scans) - failed} of {len(scans)} scans segmented, in {args.out}{os.sep}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
