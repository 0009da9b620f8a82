"""What the parts that full_size.py measures come to in a study of all cases, in five arms.

It counts by the program's own rules: fedgin.choose_cases, hospitals.validation_cases and the
defaults for scans, but for GIN's share of the images: the paper's alone.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from evaluate import sliding_window
from fedgin import ARMS, choose_cases, plan
from scans.cases import PreparedCase
from scripts.download import DATA_SETS
from study.config import Config
from study.hospitals import VAL_CASES, Hospital, validation_cases

SEEDS = (42, 123, 215)
STEP = 3  # forward passes that a training step counts as: one, and two for the way back
DOWNLOADS = ("totalsegmentator-ct", "totalsegmentator-mri", "amos22")
CASES = {"ct": 1228, "mri": 616, "amos22": 360}
CASE: Any = SimpleNamespace(volume=None)  # it is only counted
HOSPITALS = (  # with --test, nobody is tested on test cases of the first two's own
    Hospital("mri", "mri", [CASE] * 505, [CASE] * 56, ()),  # 561, of which a tenth validates
    Hospital("ct", "ct", [CASE] * 1082, [CASE] * 57, ()),
    Hospital("amos22", "", (), (), [CASE] * 360),
)


@functools.cache
def passes(patch: int, shape: tuple[int, ...]) -> int:
    """Forward passes, each of a batch of windows, over a volume."""
    calls = []

    def model(windows: torch.Tensor) -> torch.Tensor:
        calls.append(windows)
        return windows

    sliding_window(model, torch.zeros(1, *shape), patch)
    return len(calls)


def passes_of(config: Config, cases: Sequence[PreparedCase]) -> list[int]:
    """Forward passes over each of the cases."""
    return [passes(config.patch, case.volume.labels.shape) for case in cases]


def show_validation(config: Config, cases: Mapping[str, list[PreparedCase]]) -> None:
    """The share of forward passes that validation has at a hospital, with its cases by the rule."""
    training, all_of_it = STEP * config.local_steps * config.val_every, 0.0
    for name in ("mri", "ct"):
        hospital = Hospital(name, name, (), cases[name], ())
        chosen = [validation_cases(seed, [hospital], [name]) for seed in SEEDS]
        found = [sum(passes_of(config, held_out)) for held_out in chosen]
        n = statistics.mean(found)
        all_of_it += n
        print(
            f"validation of {name}: {len(chosen[0])} of {len(cases[name])} cases, {n:.0f} "
            f"forward passes ({min(found)} … {max(found)} by seed) every {config.val_every} "
            f"rounds, in which training has {training}: a share of {n / (n + training):.1%}"
        )
    most = max(passes_of(config, [*cases["ct"], *cases["mri"]]))
    print(
        f"validation of both: a share of {all_of_it / (all_of_it + 2 * training):.1%}; 20% at "
        f"{training / 4 / VAL_CASES:.0f} forward passes a case, the largest here takes {most}",
        flush=True,
    )


def count(config: Config) -> dict[str, int]:
    """Steps, rounds, cases to validate and cases to test in the study."""
    total = dict.fromkeys(("steps", "rounds", "validation", "test"), 0)
    validations = math.ceil(config.rounds / config.val_every)
    for training in plan(config):
        n_hospitals = len(choose_cases(config, training, HOSPITALS))
        total["steps"] += config.rounds * config.local_steps * n_hospitals
        total["rounds"] += config.rounds
        validating = [h for h in HOSPITALS if h.modality in ARMS[training.arm].modalities]
        total["validation"] += validations * sum(min(VAL_CASES, len(h.val)) for h in validating)
        total["test"] += sum(len(h.test) for h in HOSPITALS)
    return total


def show_study(config: Config, found: Mapping[str, float], where: str) -> None:
    """Print the table; found: seconds of each part and bytes, by the names used here."""
    n, rows = count(config), []
    gigabytes = {name: DATA_SETS[name][4] for name in DOWNLOADS}
    cached = {name: cases * found[f"cache {name}"] / 1e9 for name, cases in CASES.items()}
    for name, cases in CASES.items():
        rows.append((f"preprocessing {name}, on a worker", cases, found[f"preprocessing {name}"]))
    rows += [
        ("start, from a full cache", 1, found["start"]),
        ("… listing, fingerprints, opening entries", sum(CASES.values()), found["start, a case"]),
        ("training steps, the U-Net", n["steps"], found["step"]),
        ("rounds: average of two, checkpoint", n["rounds"], found["round"]),
        ("validation, the U-Net", n["validation"], found["validation passes"] * found["pass"]),
        ("validation, the rest", n["validation"], found["validation"]),
        ("test, the U-Net", n["test"], found["test passes"] * found["pass"]),
        ("test, the rest", n["test"], found["test"]),
    ]
    print(f"\n| term | how many | seconds each | hours, {where} |\n| --- | --- | --- | --- |")
    print(f"| download | {len(DOWNLOADS)} zip files | | {sum(gigabytes.values()):.1f} GB |")
    print(f"| cache on disk | {sum(CASES.values()):,} cases | | {sum(cached.values()):.1f} GB |")
    hours = {what: k * seconds / 3600 for what, k, seconds in rows}
    for what, k, seconds in rows:
        print(f"| {what} | {k:,} | {seconds:.3g} | {hours[what]:.3g} |")
    others = sum(h for what, h in hours.items() if "U-Net" not in what)
    print(f"| all | | | {sum(hours.values()):.0f}, {others:.0f} without the U-Net |")
    default = dataclasses.replace(config, gin_probability=Config().gin_probability)
    shares = " and ".join(f"{p:g}" for p in default.gin_probability)
    print(
        f"By default GIN's arms are trained for the shares {shares}: {len(plan(default))} "
        f"trainings instead of {len(plan(config))}, {count(default)['steps']:,} steps"
    )
