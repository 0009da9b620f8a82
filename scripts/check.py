"""Every problem of some folders of scans in one pass, and what they hold.

    python -m scripts.check DIR [DIR …]

Exit code 1 if a case cannot be used.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scans.cases import peak_bytes, read_case, split_duplicates
from scans.files import DataError
from scans.layouts import KNOWN_BAD, LAYOUTS, MODALITIES, Case, find_cases
from scans.machine import in_parallel
from scans.nifti import Problem
from scans.organs import ORGANS
from study.console import run_command, use_any_characters


def inspect(case: Case) -> dict:
    """What there is to say of a case: its problems, spacing and size, and voxels by organ."""
    organs = [organ for organ in ORGANS if organ in case.masks]
    scan, labels, problems = read_case(case, organs)
    if (case.layout, case.id) in KNOWN_BAD:
        what = f"{case.id} {KNOWN_BAD[case.layout, case.id]}"
        problems.append(Problem(case.image, what, "it is used if nothing else is wrong", True))
    if labels is None:
        labels = np.empty(0, dtype=np.uint8)
    elif not labels.any():
        problems.append(Problem(case.image, "has no organ at all", "it is all background", True))
    counts = np.bincount(labels.ravel(), minlength=len(organs) + 1)
    return {
        "id": case.id,
        "modality": case.modality,
        "usable": all(problem.usable for problem in problems),
        "spacing": list(scan.spacing) if scan else None,
        "size": list(scan.voxels.shape) if scan else None,
        "voxels": {organ: int(n) for organ, n in zip(organs, counts[1:], strict=True)},
        "problems": [problem._asdict() for problem in problems],
    }


def check_folder(folder: str, layout: str | None = None, modality: str | None = None) -> dict:
    """Read every case of a folder: {"cases": what each holds, "problems": all there are}."""
    try:
        cases = find_cases(folder, modality, layout)
    except DataError as error:
        what = str(error).removeprefix(f"{Path(folder)}: ")
        problem = Problem(Path(folder), what, "nothing of it can be used")
        return {"cases": [], "problems": [problem._asdict()]}
    reports = list(in_parallel(inspect, cases, folder, peak_bytes(cases, spacing=math.inf)))
    problems = [p._asdict() for p in (*cases[0].remarks, *split_duplicates(cases)[1])]
    problems += [problem for report in reports for problem in report.pop("problems")]
    return {"cases": reports, "problems": problems}


def summarize(reports: Sequence[dict]) -> list[str]:
    """Lines that sum up the usable cases of a folder, by modality."""

    def span(values: Sequence[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:.6g}" if low == high else f"{low:.6g}…{high:.6g}"

    lines = []
    for modality in sorted({report["modality"] for report in reports}):
        cases = [r for r in reports if r["modality"] == modality and r["usable"]]
        total = sum(r["modality"] == modality for r in reports)
        lines.append(f"  {modality.upper()}: {len(cases)} of {total} cases usable")
        if not cases:
            continue
        for key, unit in (("spacing", "mm"), ("size", "voxels")):
            axes = zip(*(r[key] for r in cases), strict=True)
            lines.append(f"    {key:12} {' × '.join(map(span, axes))} {unit}")
        for organ in ORGANS:
            voxels = [r["voxels"][organ] for r in cases if organ in r["voxels"]]
            found = [n for n in voxels if n]
            text = f"{len(found)} of {len(voxels)} cases" if voxels else "not labelled"
            lines.append(f"    {organ:12} {text}{f', {span(found)} voxels' if found else ''}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 1 if a case cannot be used."""
    use_any_characters()
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m scripts.check DIR [DIR …] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a hospital's folder")
    parser.add_argument("--layout", choices=LAYOUTS, help="where a folder looks like two")
    parser.add_argument("--modality", choices=MODALITIES, help="where names do not tell it")
    parser.add_argument("--json", action="store_true", help="for scripts: all of it as JSON")
    args = parser.parse_args(argv)
    return run_command("check", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Read all folders and print what there is to say; 1 if a case cannot be used."""
    found = {folder: check_folder(folder, args.layout, args.modality) for folder in args.folders}
    try:
        print(
            json.dumps(found, indent=1, default=str) if args.json else describe(found), flush=True
        )
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(not all(p["usable"] for content in found.values() for p in content["problems"]))


def describe(found: Mapping[str, dict]) -> str:
    """Each folder's problems, and lines that sum up its cases."""
    lines = []
    for folder, content in found.items():
        problems = [f"  {Problem(**problem)}" for problem in content["problems"]]
        lines += [folder, *problems, *(summarize(content["cases"]) or ["  no case"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
