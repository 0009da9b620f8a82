"""Segment scans with a checkpoint of fedgin.py: one label map a scan, on the scan's own grid.

    python -m scripts.predict --checkpoint runs/limited/fedgin-1-5-p1-seed42/model.pt \\
        --images PATHS --out DIR

Where there are labels it prints scores and writes them to scores.csv.
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
from scans.cache import fingerprint
from scans.cases import labelled_organs, read_usable
from scans.files import DataError
from scans.layouts import LAYOUTS, Case, find_cases
from scans.nifti import read_nifti, to_nifti
from scans.organs import ORGANS
from study.console import is_foreseen, run_command, use_any_characters
from study.inference import choose_device, load_model, segment
from study.tables import METRICS, score_rows, tables

ELSEWHERE = "choose another --out"


def find_scans(
    paths: Sequence[str],
    out: Path,
    modality: str | None,
    layout: str | None,
    organs: Sequence[str] = ORGANS,
) -> dict[Path, Case]:
    """{its label map: Case} of files, folders of files and folders in a known layout.

    Ids are unique within a folder only: where several are named, each has a folder of its own below
    out. Raises DataError for a label map that would stand for two scans or lie among scans.
    """
    scans: dict[Path, Case] = {}
    for path in map(Path, paths):
        found = sorted(f for f in path.glob("[!.]*") if f.name.endswith((".nii", ".nii.gz")))
        if path.is_dir() and not found:
            cases = find_cases(path, modality, layout, organs)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            cases = [_case_of_file(file, path, modality) for file in found or [path]]
        folder = out / path.resolve().name if path.is_dir() and len(paths) > 1 else out
        for case in cases:
            target = folder / f"{case.id}.nii.gz"
            if target in scans:
                raise DataError(f"{case.image}: there is another scan named {case.id}")
            # A new patient in a folder where others are labelled has no labels to be scored on.
            labelled = any(file.exists() for file in case.label_files(tuple(case.masks)))
            scans[target] = case if labelled else case._replace(masks={})
    # Linked scans lie in two folders, neither of which label maps may come into.
    lying = [file.absolute() for case in scans.values() for file in case.files(organs)]
    taken = {place.parent for file in lying for place in (file, Path(os.path.realpath(file)))}
    for folder in (out.absolute(), out.resolve(), *out.absolute().parents, *out.resolve().parents):
        if folder in taken:
            raise DataError(f"--out {out}: lies in {folder}, which holds scans or labels")
    return scans


def _case_of_file(file: Path, path: Path, modality: str | None) -> Case:
    if not file.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{file}: expected a NIfTI file, whose name ends in .nii or .nii.gz")
    name = file.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
    kind = modality or {"ct": "ct", "mri": "mri"}.get(name)
    name = file.absolute().parent.name if name in ("ct", "mri") else name
    if kind is None:
        raise DataError(f"{file}: CT or MRI? Say so with --modality")
    return Case("file", str(path), name, kind, "", file, {})


class Predictions:
    """A folder of label maps: of which scan each was made, and by which checkpoint.

    predictions.json records it: for each map the scan's size and checksum, its modality, the map's
    own checksum, and scores where there are labels.
    """

    def __init__(
        self, out: Path, checkpoint: Path, organs: Sequence[str], tolerance: float
    ) -> None:
        """Make or continue a folder; raises DataError where that would lose a file."""
        self.out, self.path = out, out / "predictions.json"
        ours = {
            "made by": "scripts.predict",
            "checkpoint": files.checksum(checkpoint),
            "nsd_tolerance": tolerance,
        }
        if not self.path.exists():
            for name in ("labels.json", "scores.csv", "config.json"):
                if (out / name).exists():
                    raise DataError(f"{out / name}: is there, and no predictions; {ELSEWHERE}")
            ids = {"background": 0, **{organ: n for n, organ in enumerate(organs, start=1)}}
            files.write(self.path, files.to_json({**ours, "scans": {}}))
            files.write(out / "labels.json", files.to_json(ids))
        self.about = files.read_json(self.path)
        for key, value in ours.items():
            if self.about.get(key) != value:
                was = f"{key} {self.about.get(key)}, now {value}"
                raise DataError(f"{out}: holds predictions of others ({was}); {ELSEWHERE}")
        self.scans: dict[str, dict] = self.about["scans"]

    def has_map(self, path: Path, source: Mapping[str, Any]) -> bool:
        """Whether the label map of a scan is there.

        Raises DataError for one that is not as it was made: it may be somebody's work.
        """
        if not path.exists():
            return False
        record = self.scans.get(self.name(path), {})
        if record.get("map") != files.checksum(path):
            what = "is not as this command made it, and is left; move it away to have it made anew"
            raise DataError(f"{path}: {what}")
        if record["source"] == source:
            return True
        what = "was made of another scan or modality, and is made anew"
        tqdm.write(f"{path}: {what}", file=sys.stderr)
        return False

    def keep_map(self, path: Path, content: bytes, source: Mapping[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        # Noted first: a map that nobody knows would be taken for somebody's work.
        self._keep(path, {"source": source, "map": files.sha256(content)})
        files.write(path, content, root=self.out)

    def keep_scores(self, path: Path, scores: list[dict]) -> None:
        self._keep(path, {**self.scans[self.name(path)], "scores": scores})

    def scores(self) -> list[dict]:
        """Of all scans that have labels, whichever call has segmented them."""
        return [row for record in self.scans.values() for row in record.get("scores", ())]

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.out)).removesuffix(".nii.gz")

    def _keep(self, path: Path, record: dict) -> None:
        self.scans[self.name(path)] = record
        files.write(self.path, files.to_json(self.about))


def predict(
    case: Case, model: nn.Module, about: Mapping[str, Any], path: Path, predictions: Predictions
) -> None:
    """Write the label map of a scan to `path`, unless it is there, and score it if it has labels.

    Raises DataError for a scan that cannot be used.
    """
    organs = about["organs"]
    source = {"files": [list(stamp) for stamp in fingerprint(case, ())], "modality": case.modality}
    made = predictions.has_map(path, source)
    if made and not case.masks:
        return
    scan, target = read_usable(case, organs)
    for problem in scan.problems:
        tqdm.write(f"WARNING: {problem}", file=sys.stderr)
    if not made:
        window = about["normalization"]["ct"]
        image = to_model_grid(scan.voxels, scan.spacing, case.modality, about["spacing"], window)
        labels = segment(model, image, about["patch"], scan.voxels.shape)
        predictions.keep_map(path, to_nifti(labels, scan), source)
    if case.masks:
        labels = read_nifti(path).voxels.astype(np.uint8)
        labelled, tolerance = labelled_organs(case, organs), predictions.about["nsd_tolerance"]
        scores = score_case(labels, target, organs, scan.spacing, tolerance, labelled)
        row = {"seed": about["seed"], "arm": about["arm"], "ratio": "", "p": None}
        row |= {"case": predictions.name(path), "modality": case.modality}
        predictions.keep_scores(path, score_rows(row, scores))


def _millimetres(text: str) -> float:
    if not (math.isfinite(float(text)) and float(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m scripts.predict --checkpoint FILE --images PATH … --out DIR [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = "a trained arm, runs/limited/fedgin-1-5-p1-seed42/model.pt for instance"
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
    model, about = load_model(args.checkpoint, device)
    organs, failed = about["organs"], 0
    scans = find_scans(args.images, args.out, args.modality, args.layout, organs)
    print(f"{args.checkpoint} segments {', '.join(organs)}")
    if about.get("phantoms"):
        print("WARNING: it was trained on PHANTOMS; what it finds in scans means nothing")
    args.out.mkdir(parents=True, exist_ok=True)
    with files.lock(args.out / "lock") as held:
        if not held:
            holder = files.holder(args.out / "lock")
            raise DataError(f"{args.out}: {holder} is at work there; {ELSEWHERE}")
        predictions = Predictions(args.out, args.checkpoint, organs, args.nsd_tolerance)
        for path, case in tqdm(scans.items(), desc="segmenting", unit="scan", disable=None):
            try:
                predict(case, model, about, path, predictions)
            except Exception as error:
                if not is_foreseen(error):
                    error.add_note(str(case.image))
                    raise
                named = "" if isinstance(error, DataError) else f"{case.image}: "
                tqdm.write(f"predict: {named}{error}", file=sys.stderr)
                failed += 1
        scores = predictions.scores()
        if scores:
            print(tables(scores, organs))
            columns = ("case", "modality", "organ", "outcome", *METRICS)
            rows = [{column: score[column] for column in columns} for score in scores]
            files.write_rows(args.out / "scores.csv", rows, columns)
    print(f"{len(scans) - failed} of {len(scans)} scans segmented, in {args.out}{os.sep}")
    return int(failed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 if a scan could not be segmented, 2 for bad input."""
    use_any_characters()
    args = parse(argv)
    hint = "; the same command goes on with what is missing"
    return run_command("predict", lambda: run(args), hint)


if __name__ == "__main__":
    sys.exit(main())
