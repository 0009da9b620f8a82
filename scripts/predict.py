"""Segment scans with a model of fedgin.py: one label map per scan, on the scan's own grid.

    python -m scripts.predict --checkpoint runs/complete/fedgin-p0.25-seed42/model.pt \\
        --images PATHS --out DIR

Scans that have labels are scored, on the screen and in scores.csv. Label maps that exist are kept,
so the same command continues where it was stopped.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from data import to_model_grid
from evaluate import score_case
from scans import files
from scans.cache import size_and_crc
from scans.cases import labelled_organs, read_usable
from scans.files import DataError
from scans.layouts import LAYOUTS, MODALITIES, Case, find_cases
from scans.nifti import read_nifti, to_nifti
from study.config import new_parser
from study.console import attempt, run_command, use_any_characters
from study.inference import choose_device, load_model, segment
from study.tables import METRICS, score_rows, tables

ENDINGS = (".nii", ".nii.gz")


def find_scans(
    paths: Sequence[str], modality: str | None, layout: str | None, organs: Sequence[str]
) -> dict[str, Case]:
    """{name of its label map: Case} of files, folders of files and folders in a known layout.

    If there are several paths, the name of a folder stands before those of its scans.
    """
    scans: dict[str, Case] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        names = files.names_in(path)
        found = [file for name, file in names.items() if name.endswith(ENDINGS)]
        if path.is_dir() and not found:
            cases = find_cases(path, modality, layout, organs, split=False)
            unread = [file for name, file in names.items() if name == "imagesTs"]
        else:
            cases = [case_of_file(file, modality) for file in found or [path]]
            others = [f for f in names.values() if f not in found and f.name != "segmentations"]
            unread = [file for file in others if file.is_dir() or ".nii" in file.name.lower()]
        if unread:
            what = f"{files.listed(unread)}: not read; name such a folder with --images too"
            cases = [case._replace(warnings=(*case.warnings, what)) for case in cases]
        folder = f"{path.resolve().name or 'root'}/" if path.is_dir() and len(paths) > 1 else ""
        for case in cases:
            name = f"{folder}{case.id}"
            if name in scans:
                advice = "give --modality, or segment them into two --out folders"
                raise DataError(f"{case.image}: there is another scan named {name}; {advice}")
            # A new patient in a folder where others are labelled has no labels to be scored on.
            labelled = any(file.exists() for file in case.label_files(tuple(case.masks)))
            scans[name] = case if labelled else case._replace(masks={})
    return scans


def case_of_file(file: Path, modality: str | None) -> Case:
    """The case of a single file, whose modality is in its name or given."""
    if not file.name.endswith(ENDINGS):
        raise DataError(f"{file}: expected a NIfTI file, whose name ends in .nii or .nii.gz")
    name = file.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
    kind = name if name in MODALITIES else modality
    if kind is None:
        raise DataError(f"{file}: CT or MRI? Say so with --modality")
    if modality not in (None, kind):
        raise DataError(f"{file}: is {kind.upper()} by its name, but {modality} by --modality")
    id_ = file.absolute().parent.name if name in MODALITIES else name
    return Case(str(file.parent), id_, kind, "", file, {})


def claim(args: argparse.Namespace, organs: Sequence[str]) -> dict[str, Any]:
    """Claim the folder of the label maps; return what its predictions.json holds.

    Raises DataError for a folder that is claimed for another checkpoint or --modality.
    """
    path, checkpoint = args.out / "predictions.json", files.sha256(args.checkpoint.read_bytes())
    claimed = {"made by": "scripts.predict", "format": 3, "checkpoint": checkpoint}
    record = {**claimed, "modality": args.modality, "scans": {}}
    if path.exists():
        kept = files.read_json(path)
        record["scans"] = kept.get("scans", {})
        files.check_same(path, kept, record)
    ids = {"background": 0, **{organ: n for n, organ in enumerate(organs, start=1)}}
    files.write(path, files.to_json(record))
    files.write(args.out / "labels.json", files.to_json(ids))
    return record


def predict(
    name: str,
    case: Case,
    model: nn.Module,
    metadata: Mapping[str, Any],
    record: dict[str, Any],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Write the label map of a scan, unless it exists; return its scores if it has labels.

    The scan of a map is recorded before the map is written, and no map is ever overwritten. Raises
    DataError for a scan that cannot be used.
    """
    path, organs = args.out / f"{name}.nii.gz", metadata["organs"]
    source, made = [case.modality, *size_and_crc(case.image)], path.exists()
    if made and record["scans"].get(name) != source:
        what = "exists, but was not made from this scan by this command"
        raise DataError(f"{path}: {what}; move it away, or choose another --out")
    if made and not case.masks:
        return []
    spacing, window = metadata["spacing"], metadata["normalization"]["ct"]
    scan, target = read_usable(case, organs, window)
    for warning in scan.warnings:
        tqdm.write(f"WARNING: {case.image}: {warning}", file=sys.stderr)
    if not made:
        image = to_model_grid(scan.voxels, scan.spacing, case.modality, spacing, window)
        labels = segment(model, image, metadata["patch"], scan.voxels.shape)
        record["scans"][name] = source
        files.write(args.out / "predictions.json", files.to_json(record))
        files.write(path, to_nifti(labels, scan))
    if not case.masks:
        return []
    labels, labelled = read_nifti(path).voxels.astype(np.uint8), labelled_organs(case, organs)
    scores = score_case(labels, target, organs, scan.spacing, args.nsd_tolerance, labelled)
    row = {"seed": metadata["seed"], "arm": metadata["arm"], "ratio": "", "p": None}
    return score_rows({**row, "case": name, "modality": case.modality}, scores)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    usage = "python -m scripts.predict --checkpoint FILE --images PATH … --out DIR [options]"
    parser = new_parser(__doc__, usage)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="FILE", help="model.pt of a training")
    text = "NIfTI files, or folders of scans"
    add("--images", required=True, nargs="+", action="extend", metavar="PATH", help=text)
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the label maps")
    text = "needed if file names do not show it; of a folder, only such scans are segmented"
    add("--modality", choices=MODALITIES, help=text)
    add("--layout", choices=LAYOUTS, help="layout, needed if a folder matches two")
    text = "mm within which a surface counts as correct (default: 2)"
    add("--nsd-tolerance", type=float, default=2.0, metavar="X", help=text)
    args = parser.parse_args(argv)
    if not (math.isfinite(args.nsd_tolerance) and args.nsd_tolerance > 0):
        parser.error(f"--nsd-tolerance must be a positive number, not {args.nsd_tolerance}")
    return args


def run(args: argparse.Namespace) -> int:
    """Segment every scan that can be segmented; 1 if one could not be."""
    model, metadata = load_model(args.checkpoint, choose_device())
    organs, failed, rows = metadata["organs"], list[str](), list[dict]()
    scans = find_scans(args.images, args.modality, args.layout, organs)
    print(f"{args.checkpoint} segments {', '.join(organs)}")
    if metadata.get("phantoms"):
        print("WARNING: it was trained on PHANTOMS; what it finds in scans means nothing")
    for warning in dict.fromkeys(warning for case in scans.values() for warning in case.warnings):
        print(f"WARNING: {warning}")
    if args.out.exists() and not args.out.is_dir():
        raise DataError(f"{args.out}: is a file; choose another --out")
    names = files.names_in(args.out)
    if names.keys() - {"lock"} and "predictions.json" not in names:
        what = f"holds {files.listed(names)}, which this command did not make"
        raise DataError(f"{args.out}: {what}; choose a new or empty --out")
    with files.lock(args.out / "lock") as held:
        if not held:
            raise DataError(f"{args.out}: another process is at work there; choose another --out")
        record = claim(args, organs)
        for name, case in tqdm(scans.items(), desc="segmenting", unit="scan", disable=None):
            with attempt(name, failed):
                rows += predict(name, case, model, metadata, record, args)
        if rows:
            print(tables(rows, organs))
            columns = ("case", "modality", "organ", "outcome", *METRICS)
            files.write(args.out / "scores.csv", files.to_csv(rows, columns))
    print(f"{len(scans) - len(failed)} of {len(scans)} scans segmented, in {args.out}{os.sep}")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if a scan could not be segmented, 2 for bad input."""
    use_any_characters()
    args = parse(argv)
    return run_command("predict", lambda: run(args), "; repeat the command to continue")


if __name__ == "__main__":
    sys.exit(main())
