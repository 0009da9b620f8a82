"""Every problem of some folders of scans in one pass, and what they hold.

    python -m scripts.check DIR [DIR …]

Exit code 1 if a case cannot be used.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from scans.cases import read_case
from scans.files import DataError
from scans.layouts import LAYOUTS, MODALITIES, Case, find_cases
from scans.machine import in_parallel
from scans.organs import ORGANS, match
from study.console import run_command, use_any_characters


def inspect(case: Case, organs: Sequence[str]) -> dict:
    """What there is to say of a case: what is wrong, its spacing and size, voxels by organ."""
    labelled = [organ for organ in organs if organ in case.masks]
    scan, labels, errors, warnings = read_case(case, labelled)
    if not (errors or labels.any()):
        warnings.append(f"has none of {', '.join(labelled)}; it is all background")
    counts = np.bincount(labels.ravel(), minlength=len(labelled) + 1)
    return {
        "modality": case.modality,
        "errors": errors,
        "warnings": [f"{case.image}: {warning}" for warning in warnings],
        "spacing": scan.spacing if scan else (),
        "size": scan.voxels.shape if scan else (),
        "voxels": dict(zip(labelled, counts[1:].tolist(), strict=True)),
    }


def check_folder(
    folder: str, layout: str | None, modality: str | None, organs: Sequence[str]
) -> tuple[bool, list[str]]:
    """Read every case of a folder; whether all can be used, and the lines to print."""
    try:
        cases = find_cases(folder, modality, layout, organs)
        structures = cases[0].structures
        if not match(organs, structures):
            what = f"labels none of {', '.join(organs)}; it labels {', '.join(structures)}"
            raise DataError(f"{folder}: {what}")
    except DataError as error:
        return False, [f"  {error}"]
    reports = list(in_parallel(lambda case: inspect(case, organs), cases, folder))
    errors = [error for report in reports for error in report["errors"]]
    warnings = [warning for report in reports for warning in report["warnings"]]
    warnings += dict.fromkeys(warning for case in cases for warning in case.warnings)
    lines = [f"  {error}; the case cannot be used" for error in errors]
    lines += [f"  {warning}" for warning in warnings]
    return not errors, lines + summarize(reports, organs)


def summarize(reports: Sequence[dict], organs: Sequence[str]) -> list[str]:
    """Lines that sum up the usable cases of a folder, by modality."""

    def span(values: Sequence[float]) -> str:
        low, high = f"{min(values):.6g}", f"{max(values):.6g}"
        return low if low == high else f"{low}…{high}"

    lines = []
    for modality in sorted({report["modality"] for report in reports}):
        every = [r for r in reports if r["modality"] == modality]
        cases = [r for r in every if not r["errors"]]
        lines.append(f"  {modality.upper()}: {len(cases)} of {len(every)} cases usable")
        if not cases:
            continue
        for key, unit in (("spacing", "mm"), ("size", "voxels")):
            axes = zip(*(r[key] for r in cases), strict=True)
            lines.append(f"    {key:12} {' × '.join(map(span, axes))} {unit}")
        for organ in organs:
            voxels = [r["voxels"][organ] for r in cases if organ in r["voxels"]]
            found = [n for n in voxels if n]
            text = f"{len(found)} of {len(voxels)} cases" if voxels else "not labelled"
            lines.append(f"    {organ:12} {text}{f', {span(found)} voxels' if found else ''}")
    return lines


def run(args: argparse.Namespace) -> int:
    """Read all folders and print what there is to say; 1 if a case cannot be used."""
    usable = True
    for folder in args.folders:
        well, lines = check_folder(folder, args.layout, args.modality, args.organs or ORGANS)
        usable &= well
        try:
            print(folder, *lines, sep="\n", flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(not usable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 1 if a case cannot be used."""
    use_any_characters()
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m scripts.check DIR [DIR …] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="a hospital's folder")
    text = f"to look at (default: {' '.join(ORGANS)})"
    add("--organs", nargs="+", action="extend", metavar="ORGAN", help=text)
    add("--layout", choices=LAYOUTS, help="where a folder looks like two")
    add("--modality", choices=MODALITIES, help="where names do not tell it")
    args = parser.parse_args(argv)
    return run_command("check", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
