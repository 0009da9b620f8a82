"""Report every problem in folders of scans, and what they hold.

    python -m scripts.check DIR [DIR …]

Exit code 1 if a case cannot be used, or if a folder holds no case or labels none of the organs.
"""

import argparse
import sys
import zlib
from collections.abc import Sequence

import numpy as np

from scans.cases import read_case
from scans.files import DataError
from scans.layouts import LAYOUTS, MODALITIES, Case, find_cases
from scans.machine import in_parallel
from scans.organs import ORGANS, common_name
from study.config import new_parser
from study.console import run_command, use_any_characters
from study.hospitals import warn_of_copies


def inspect(case: Case, organs: Sequence[str]) -> dict:
    """A report on a case: what is wrong, its spacing and size, voxels by organ."""
    labelled = [organ for organ in organs if organ in case.masks]
    scan, labels, errors, warnings = read_case(case, labelled)
    if labelled and not (errors or labels.any()):
        warnings.append(f"its labels hold none of {', '.join(labelled)}")
    lines = [f"{error}; the case cannot be used" for error in errors]
    counts = np.bincount(labels.ravel(), minlength=len(labelled) + 1)[1:].tolist()
    return {
        "image": case.image,
        "crc": zlib.crc32(scan.voxels.data) if scan else 0,
        "modality": case.modality,
        "usable": not errors,
        "lines": lines + [f"{case.image}: {warning}" for warning in warnings],
        "spacing": scan.spacing if scan else (),
        "size": scan.voxels.shape if scan else (),
        "voxels": dict(zip(labelled, counts, strict=True)),
    }


def check_folder(folder: str, args: argparse.Namespace) -> list[dict]:
    """Read every case of a folder, print and return the reports; empty if none is read."""
    organs, lines = list(map(common_name, args.organs or ORGANS)), {}
    try:
        cases = find_cases(folder, args.modality, args.layout, organs)
        lines = dict.fromkeys(f"  {warning}" for case in cases for warning in case.warnings)
        if not cases[0].masks:
            held = ", ".join(cases[0].structures) or "nothing"
            raise DataError(f"{folder}: labels none of {', '.join(organs)}; it labels {held}")
    except (DataError, OSError) as error:
        print(folder, *lines, f"  {error}", sep="\n")
        return []
    reports = list(in_parallel(lambda case: inspect(case, organs), cases, folder))
    lines |= dict.fromkeys(f"  {line}" for report in reports for line in report["lines"])
    print(folder, *lines, *summarize(reports, organs), sep="\n", flush=True)
    return reports


def summarize(reports: Sequence[dict], organs: Sequence[str]) -> list[str]:
    """Lines that sum up the usable cases of a folder, by modality."""

    def span(values: Sequence[float]) -> str:
        return "…".join(dict.fromkeys(f"{value:.6g}" for value in (min(values), max(values))))

    lines = []
    for modality in sorted({report["modality"] for report in reports}):
        every = [r for r in reports if r["modality"] == modality]
        cases = [r for r in every if r["usable"]]
        lines.append(f"  {modality.upper()}: {len(cases)} of {len(every)} cases usable")
        for key, unit in (("spacing", "mm"), ("size", "voxels")) if cases else ():
            axes = zip(*(r[key] for r in cases), strict=True)
            lines.append(f"    {key:12} {' × '.join(map(span, axes))} {unit}")
        for organ in organs if cases else ():
            voxels = [r["voxels"][organ] for r in cases if organ in r["voxels"]]
            found = [n for n in voxels if n]
            text = f"{len(found)} of {len(voxels)} cases" if voxels else "not labelled"
            lines.append(f"    {organ:12} {text}{f', {span(found)} voxels' if found else ''}")
    return lines


def run(args: argparse.Namespace) -> int:
    """Read all folders; 1 if a case or a folder cannot be used."""
    by_folder = [check_folder(folder, args) for folder in args.folders]
    reports = [report for reports in by_folder for report in reports]
    images = [(report["image"], report["crc"], True) for report in reports if report["usable"]]
    for warning in warn_of_copies(images):
        print(f"  {warning}")
    return int(not (all(by_folder) and all(report["usable"] for report in reports)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 1 if a case or a folder cannot be used."""
    use_any_characters()
    parser = new_parser(__doc__, "python -m scripts.check DIR [DIR …] [options]")
    add, text = parser.add_argument, f"organs to check (default: {' '.join(ORGANS)})"
    add("folders", nargs="+", metavar="DIR", help="a hospital's folder")
    add("--organs", nargs="+", action="extend", metavar="ORGAN", help=text)
    add("--layout", choices=LAYOUTS, help="layout, needed if a folder matches two")
    add("--modality", choices=MODALITIES, help="needed if names do not show it; leaves others out")
    args = parser.parse_args(argv)
    return run_command("check", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
