"""Segment scans with a checkpoint of fedgin.py: one label map per scan, on the scan's own grid.

    python -m scripts.predict --checkpoint runs/complete/fedgin-p0.25-seed42/model.pt \\
        --images PATHS --out DIR

Where there are labels it prints scores and writes them to scores.csv. A label map that is there
already is kept: the same command goes on with what is missing.
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

from data import NORMALIZATION, to_model_grid
from evaluate import score_case
from scans import files
from scans.cache import size_and_crc
from scans.cases import labelled_organs, read_usable
from scans.files import DataError
from scans.layouts import LAYOUTS, MODALITIES, Case, find_cases
from scans.nifti import read_nifti, to_nifti
from study.console import is_foreseen, run_command, use_any_characters
from study.inference import choose_device, load_model, segment
from study.tables import METRICS, score_rows, tables

ENDINGS = (".nii", ".nii.gz")


def find_scans(
    paths: Sequence[str],
    out: Path,
    modality: str | None,
    layout: str | None,
    organs: Sequence[str],
) -> dict[Path, Case]:
    """{its label map: Case} of files, folders of files and folders in a known layout.

    Ids are unique within a folder only: where several are named, each has a folder of its own below
    out. Raises DataError for a label map that would stand for two scans.
    """
    scans: dict[Path, Case] = {}
    for path in map(Path, paths):
        found = [file for name, file in files.names_in(path).items() if name.endswith(ENDINGS)]
        if path.is_dir() and not found:
            cases = find_cases(path, modality, layout, organs)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            cases = [case_of_file(file, modality) for file in found or [path]]
        folder = out / path.resolve().name if path.is_dir() and len(paths) > 1 else out
        for case in cases:
            target = folder / f"{case.id}.nii.gz"
            if target in scans:
                raise DataError(f"{case.image}: there is another scan named {case.id}")
            # A new patient in a folder where others are labelled has no labels to be scored on.
            labelled = any(file.exists() for file in case.label_files(tuple(case.masks)))
            scans[target] = case if labelled else case._replace(masks={})
    return scans


def case_of_file(file: Path, modality: str | None) -> Case:
    """The case of a single file, whose modality its name or the flag says."""
    if not file.name.endswith(ENDINGS):
        raise DataError(f"{file}: expected a NIfTI file, whose name ends in .nii or .nii.gz")
    name = file.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
    said = name if name in MODALITIES else modality
    if said is None:
        raise DataError(f"{file}: CT or MRI? Say so with --modality")
    if modality not in (None, said):
        raise DataError(f"{file}: is {said.upper()} by its name, and {modality} by --modality")
    id_ = file.absolute().parent.name if name in MODALITIES else name
    return Case(str(file.parent), id_, said, "", file, {})


class Predictions:
    """A folder of label maps, and predictions.json, which says by what and of what they are made.

    It is claimed for one checkpoint and one --modality. The scan of each map is noted before the
    map is written, and no map is ever written over.
    """

    def __init__(self, out: Path, claimed: Mapping[str, Any], organs: Sequence[str]) -> None:
        """Begin or continue a folder; raises DataError for a folder of something else."""
        self.out, self.path, self.claimed = out, out / "predictions.json", claimed
        self.scans: dict[str, str] = {}
        if self.path.exists():
            kept = files.read_json(self.path)
            self.scans = kept.pop("scans", {})
            files.check_same(self.path, kept, claimed)
            return
        foreign = [name for name in files.names_in(out) if name != "lock"]
        if foreign:
            what = f"holds {files.listed(foreign)}, which this command did not make"
            raise DataError(f"{out}: {what}; choose a new or empty --out")
        self._write()
        ids = {"background": 0, **{organ: n for n, organ in enumerate(organs, start=1)}}
        files.write(out / "labels.json", files.to_json(ids))

    def has_map(self, path: Path, scan: str) -> bool:
        """Whether the label map of a scan is there; raises DataError for a map of another scan."""
        if not path.exists():
            return False
        if self.scans.get(self.name(path)) != scan:
            what = "is there, and was not made from this scan by this command"
            raise DataError(f"{path}: {what}; move it away, or choose another --out")
        return True

    def keep_map(self, path: Path, content: bytes, scan: str) -> None:
        self.scans[self.name(path)] = scan
        self._write()
        files.write(path, content)

    def _write(self) -> None:
        files.write(self.path, files.to_json({**self.claimed, "scans": self.scans}))

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.out)).removesuffix(".nii.gz")


def predict(
    case: Case, model: nn.Module, metadata: Mapping[str, Any], path: Path, predictions: Predictions
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]] | None:
    """Write the label map of a scan to `path`, unless it is there.

    Returns prediction, labels and spacing (mm) of a scan that has labels. Raises DataError for a
    scan that cannot be used.
    """
    size, crc = size_and_crc(case.image)
    source = f"{case.modality}, {size} bytes, {crc:016x}"
    made = predictions.has_map(path, source)
    if made and not case.masks:
        return None
    scan, target = read_usable(case, metadata["organs"])
    for warning in scan.warnings:
        tqdm.write(f"WARNING: {case.image}: {warning}", file=sys.stderr)
    if not made:
        spacing, window = metadata["spacing"], metadata["normalization"]["ct"]
        image = to_model_grid(scan.voxels, scan.spacing, case.modality, spacing, window)
        labels = segment(model, image, metadata["patch"], scan.voxels.shape)
        predictions.keep_map(path, to_nifti(labels, scan), source)
    if not case.masks:
        return None
    return read_nifti(path).voxels.astype(np.uint8), target, scan.spacing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m scripts.predict --checkpoint FILE --images PATH … --out DIR [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="FILE", help="model.pt of a training")
    text = "NIfTI files or folders of them"
    add("--images", required=True, nargs="+", action="extend", metavar="PATH", help=text)
    add("--out", required=True, type=Path, metavar="DIR", help="for label maps")
    add("--modality", choices=NORMALIZATION, help="where names do not tell it")
    add("--layout", choices=LAYOUTS, help="where a folder looks like two")
    text = "mm within which a surface voxel counts as right (default: 2)"
    add("--nsd-tolerance", type=float, default=2.0, metavar="MM", help=text)
    args = parser.parse_args(argv)
    if not (math.isfinite(args.nsd_tolerance) and args.nsd_tolerance > 0):
        parser.error(f"--nsd-tolerance must be a positive number, not {args.nsd_tolerance}")
    return args


def run(args: argparse.Namespace) -> int:
    """Segment every scan that can be segmented; 1 if one could not be."""
    model, metadata = load_model(args.checkpoint, choose_device())
    organs = metadata["organs"]
    scans = find_scans(args.images, args.out, args.modality, args.layout, organs)
    print(f"{args.checkpoint} segments {', '.join(organs)}")
    if metadata.get("phantoms"):
        print("WARNING: it was trained on PHANTOMS; what it finds in scans means nothing")
    with files.lock(args.out / "lock") as held:
        if not held:
            raise DataError(f"{args.out}: another process is at work there; choose another --out")
        checkpoint = files.sha256(args.checkpoint.read_bytes())
        claimed = {"made by": "scripts.predict", "format": 3, "checkpoint": checkpoint}
        predictions = Predictions(args.out, {**claimed, "modality": args.modality}, organs)
        return segment_all(scans, model, metadata, predictions, args.nsd_tolerance)


def segment_all(
    scans: Mapping[Path, Case],
    model: nn.Module,
    metadata: Mapping[str, Any],
    predictions: Predictions,
    tolerance: float,
) -> int:
    """Segment scans, and score those with labels; 1 if one could not be segmented."""
    organs, failed, rows = metadata["organs"], 0, []
    for path, case in tqdm(scans.items(), desc="segmenting", unit="scan", disable=None):
        try:
            compared = predict(case, model, metadata, path, predictions)
        except Exception as error:
            if not is_foreseen(error):
                error.add_note(str(case.image))
                raise
            named = "" if isinstance(error, DataError) else f"{case.image}: "
            tqdm.write(f"predict: {named}{error}", file=sys.stderr)
            failed += 1
            continue
        if compared:
            labels, target, spacing = compared
            labelled = labelled_organs(case, organs)
            scores = score_case(labels, target, organs, spacing, tolerance, labelled)
            row = {"seed": metadata["seed"], "arm": metadata["arm"], "ratio": "", "p": None}
            row |= {"case": predictions.name(path), "modality": case.modality}
            rows += score_rows(row, scores)
    if rows:
        print(tables(rows, organs))
        columns = ("case", "modality", "organ", "outcome", *METRICS)
        files.write(predictions.out / "scores.csv", files.to_csv(rows, columns))
    n = len(scans)
    print(f"{n - failed} of {n} scans segmented, in {predictions.out}{os.sep}")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if a scan could not be segmented, 2 for bad input."""
    use_any_characters()
    args = parse(argv)
    hint = "; the same command goes on with what is missing"
    return run_command("predict", lambda: run(args), hint)


if __name__ == "__main__":
    sys.exit(main())
