r"""What a study on scans of full size costs: each part measured, and what all of it comes to.

python -m benchmarks.full_size [--device cuda]  # most of an hour on two cores
python -m benchmarks.full_size --repeats 1 --ct 6 --mri 4 --amos22 4 --shrink 6 --spacing 12 \
    --patch 32 --width 4  # a taste, in less than a minute

Scans are phantoms on the grids of full_size_data.py, settings those for scans. Where the U-Net is
not measured itself, a network that costs next to nothing stands in for it (full_size_run.py).
--folder keeps the scans, to be used again.
"""

import argparse
import collections
import dataclasses
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import data
import fedgin
from benchmarks.compare import alternate, in_processes, parse
from benchmarks.full_size_data import GRIDS, link_half, write
from benchmarks.full_size_run import PARTS, Pointwise, score_shifted, timed
from benchmarks.full_size_study import SEEDS, passes, passes_of, show_study, show_validation
from federated import RunningAverage, train_locally
from scans.cache import cache_bytes
from scans.cases import PreparedCase, load_cases
from study.config import Checkpoint, Config, Round, Training
from study.hospitals import Hospital, find_sources
from study.inference import mixed_precision
from study.trainings import TrainingFolder

STAND_IN = "benchmarks.full_size_run"
SCANS = Config(ct=("CT",), mri=("MRI",))  # for its defaults
SIZES = ("spacing", "patch", "width", "depth")


def configure(folder: Path, args: argparse.Namespace) -> Config:
    ct, mri, test = ((str(folder / name),) for name in GRIDS)
    sizes = {name: getattr(args, name) for name in SIZES}
    about = {"out": str(folder / "runs/study"), "cache": str(folder / "cache")}
    about |= {"seeds": SEEDS, "gin_probability": (1.0,)}
    return Config("complete", ct=ct, mri=mri, test=test, **about, **sizes)


def clock(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What the work returns, the seconds that it takes, and those of all cores together."""
    began, used = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - began, time.process_time() - used


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Their median, and the ends."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low} … {high})"


# ------------------------------------------------------------------------------------ before a step


def preprocess(config: Config, found: dict[str, float]) -> dict[str, list[PreparedCase]]:
    """The cases of each data set, by way of an empty cache."""
    cores, prepared = len(os.sched_getaffinity(0)), {}
    for name, _, _, cases in find_sources(config):
        about = cases, config.organs, config.spacing
        work = functools.partial(load_cases, *about, Path(config.cache))
        (loaded, _), seconds, used = clock(work)
        prepared[name] = [*loaded.values()]
        each = seconds * min(cores, len(cases)) / len(cases)
        files = [file for case in prepared[name] for file in case.volume.folder.iterdir()]
        written = sum(file.stat().st_size for file in files) / len(cases)
        predicted = cache_bytes(*about) / len(cases)
        found |= {f"preprocessing {name}": each, f"cache {name}": written}
        print(
            f"preprocessing {name}: {len(cases)} cases, {each:.2f} s a case and worker, "
            f"{used / len(cases):.2f} s of a core; {written / 1e6:.1f} MB a case in the cache, "
            f"{predicted / 1e6:.1f} predicted",
            flush=True,
        )
    return prepared


def load(config: Config, cases: Sequence[PreparedCase], batches: int, repeats: int) -> None:
    """How many batches a second come out of the cache."""
    volumes = [case.volume for case in cases]
    checked = [clock(lambda v=v: (v.image, v.labels, v.foreground_voxels))[1] for v in volumes]
    rates = []
    for turn in range(repeats):
        draws = data.generator("patches", turn)
        drawn = data.patches(volumes, config.patch, config.batch_size, batches, draws)
        _, *seconds = clock(lambda drawn=drawn: sum(1 for _ in data.prefetch(drawn)))
        rates.append([batches / s for s in seconds])
    wall, core = zip(*rates, strict=True)
    print(
        f"loading {volumes[0].modality}: {spread(wall, 0)} batches/s, {spread(core, 0)} a second "
        f"of a core; a scan's first use takes {spread(checked, 3)} s more, for its checksums",
        flush=True,
    )


def start(config: Config, folder: Path, cases: int, repeats: int, found: dict[str, float]) -> None:
    """Runs from a full cache with half of the cases and with all, in processes of their own."""
    link_half(folder, folder / "half")
    sides = {cases // 2: folder / "half", cases: folder}
    for until, more in (("start", []), ("whole", ["--rounds", "2", "--local-steps", "4"])):
        runs: dict[int, list] = {n: [] for n in sides}
        for turn in range(repeats if until == "start" else max(1, repeats // 2)):
            for n, where in sides.items():
                args = [
                    until,
                    *flags(config, where),
                    *more,
                    f"--out={folder}/runs/{until}-{n}-{turn}",
                ]
                runs[n] += in_processes(STAND_IN, {"": args}, 1)[""]
        for n in sides:
            show_runs(
                until, n, {name: [run[name] for run in runs[n]] for name in runs[n][0]}, found
            )


def flags(config: Config, folder: Path) -> list[str]:
    """Of fedgin.py, for the data sets in a folder and the configuration's cache."""
    named = {"scenario": "complete", "arms": "fedgin", "gin-probability": 1, "cache": config.cache}
    named |= {name: getattr(config, name) for name in SIZES}
    named |= {flag: folder / name for flag, name in zip(("ct", "mri", "test"), GRIDS, strict=True)}
    return [text for name, value in named.items() for text in (f"--{name}", str(value))]


def show_runs(until: str, n: int, values: dict[str, list], found: dict[str, float]) -> None:
    if until == "whole":
        peak = spread(values["memory"], 0)
        print(f"memory, {n} cases: {peak} MB at the peak of two rounds and a test", flush=True)
        return
    first = values["first batch"]
    imports, *parts = (statistics.median(values[name]) for name in ("imports", *PARTS))
    by_case = sum(parts)
    found["start"], found["start, a case"] = statistics.median(first) - by_case, by_case / n
    print(
        f"start, {n} cases: first batch after {spread(first)} s, imports {imports:.2f} s, "
        f"{', '.join(f'{name} {s:.2f} s' for name, s in zip(PARTS, parts, strict=True))}: these "
        f"three are {by_case / statistics.median(first):.0%}",
        flush=True,
    )


# -------------------------------------------------------------------- whole volumes, and the U-Net


def whole_volumes(
    config: Config,
    cases: dict[str, list[PreparedCase]],
    device: torch.device,
    repeats: int,
    found: dict[str, float],
) -> None:
    """Validation and the test with the stand-in; the test with its overlap and without, in turn."""
    model = Pointwise(1, len(config.organs) + 1).to(device)
    held_out = [case for name in ("ct", "mri") for case in cases[name][: len(GRIDS[name])]]
    _, seconds, _ = clock(lambda: fedgin.validate(config, model, held_out, ("mri", "ct")))
    tests = cases["amos22"][: len(GRIDS["amos22"])]
    hospital, n, parts = Hospital("amos22", "", (), (), tests), len(tests), dict[str, float]()

    def one_by_one(function: Callable, jobs: Iterable[tuple]) -> Iterator[tuple]:
        return ((name, function(*args)) for name, args in jobs)

    def in_turn() -> None:
        with mock.patch.object(fedgin, "in_background", one_by_one):
            run()

    def run() -> None:
        parts.clear()
        segment = timed(fedgin.segment, parts, "segmenting")
        score_case = timed(score_shifted, parts, "scoring")
        with mock.patch.multiple(fedgin, segment=segment, score_case=score_case):
            pairs = [(hospital, case) for case in tests]
            collections.deque(fedgin.run_test(config, model, pairs), maxlen=0)

    times = alternate({"overlapping": run, "in turn": in_turn}, device, repeats, warm_up=0)
    each = {side: [s / n for s in values] for side, values in times.items()}
    found |= {"validation": seconds / len(held_out), "test": statistics.median(each["overlapping"])}
    for name, chosen in (("validation", held_out), ("test", tests)):
        found[f"{name} passes"] = statistics.mean(passes_of(config, chosen))
    print(
        f"validation with the stand-in: {found['validation']:.2f} s a case\n"
        f"test with the stand-in: {spread(each['overlapping'])} s a case, in turn "
        f"{spread(each['in turn'])} s, at last "
        f"{', '.join(f'{part} {s / n:.2f} s' for part, s in parts.items())}",
        flush=True,
    )


def unet(
    config: Config,
    cases: Sequence[PreparedCase],
    device: torch.device,
    args: argparse.Namespace,
    found: dict[str, float],
) -> None:
    """Training steps as a hospital does them, a case of validation, and what ends a round."""
    model, n = fedgin.make_model(config, SEEDS[0], device), len(config.organs) + 1
    hospital, case = Hospital("ct", "ct", cases, (), ()), cases[2]  # of middling size
    training = Training(SEEDS[0], "ct-only+gin", p=1.0)
    folder = TrainingFolder(config, "", training)

    def train() -> None:
        shorter = dataclasses.replace(config, local_steps=args.steps)
        client = fedgin.make_clients(shorter, training, [hospital], device)["ct"]
        work = client.batches(1), client.loss_function
        train_locally(model, *work, lr=config.lr, autocast=mixed_precision(device))

    def end_round() -> None:
        average = RunningAverage()
        for _ in range(2):
            average.add(model.state_dict(), 1.0)
        model.load_state_dict(average.result())
        done = Round(1, {"ct": 1.0}, {"ct": 1.0}, seconds=1.0)
        folder.keep_round(fedgin.keep_round(Checkpoint(), model, done))

    train()  # cuDNN tries its algorithms
    steps = [clock(train)[1] / args.steps for _ in range(args.repeats)]
    whole, rest = (
        clock(lambda m=m: fedgin.validate(config, m, [case], ("ct",)))[1]
        for m in (model, Pointwise(1, n).to(device))
    )
    size = case.volume.labels.shape
    calls = passes(config.patch, size)
    found |= {"step": statistics.median(steps), "pass": (whole - rest) / calls}
    found["round"] = statistics.median(clock(end_round)[1] for _ in range(3))
    print(
        f"U-Net: {spread(steps)} s a training step; {whole:.2f} s to validate on "
        f"{size} voxels, in {calls} forward passes of {found['pass']:.2f} s; "
        f"{found['round']:.2f} s to average two models and write a checkpoint",
        flush=True,
    )
    if device.type == "cuda":
        print(f"GPU memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB at its peak")


def main() -> None:
    numbers = {"ct": 60, "mri": 30, "amos22": 8, "shrink": 1, "batches": 100, "repeats": 5}
    numbers |= {"steps": 1, "folder": ""} | {name: getattr(SCANS, name) for name in SIZES}
    device, args = parse(__doc__, **numbers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).absolute()
        config, found = configure(folder, args), dict[str, float]()
        cases = {name: getattr(args, name) for name in GRIDS}
        _, seconds, _ = clock(lambda: write(folder, cases, args.shrink))
        print(f"{cases} cases written in {seconds:.0f} s", flush=True)
        for left in ("cache", "half", "runs"):  # by an earlier run in --folder
            shutil.rmtree(folder / left, ignore_errors=True)
        prepared = preprocess(config, found)
        for name in ("ct", "mri"):
            load(config, prepared[name], args.batches, args.repeats)
        show_validation(config, prepared)
        start(config, folder, sum(cases.values()), args.repeats, found)
        whole_volumes(config, prepared, device, args.repeats, found)
        unet(config, prepared["ct"], device, args, found)
        show_study(config, found, device.type)


if __name__ == "__main__":
    main()
