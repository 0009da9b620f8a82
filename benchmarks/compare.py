"""What the benchmarks share: two sides timed in turn, and the ratio of their times.

pip install -r benchmarks/requirements.txt
python -m benchmarks.training_step  # or another of these scripts, from the project's folder
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fedgin
from federated import Client
from study.config import Config, Training
from study.hospitals import phantom_case
from study.inference import choose_device


def parse(description: str | None, **numbers: int) -> argparse.Namespace:
    """The flags: --device, as a torch.device, and one for each of `numbers` with its default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", default=default, type=int, metavar="N")
    args = parser.parse_args()
    device = choose_device() if args.device == "cuda" else torch.device("cpu")
    if device.type != args.device:
        parser.error("--device cuda: PyTorch sees no GPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(f"{name}, Python {platform.python_version()}, PyTorch {torch.__version__}", flush=True)
    args.device = device
    return args


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads on {names[0] if names else platform.processor()}"


def phantom_clients(
    cases: int, hospitals: int, device: torch.device, p: float = 0.0, steps: int | None = None
) -> tuple[nn.Module, dict[str, Client]]:
    """The model and the hospitals of fedgin.py at its defaults, with so many CT phantoms in all.

    p: probability of GIN; steps: batches that a hospital trains on in a round.
    """
    config, training = Config("complete"), Training(0, "fedgin", p=p)
    held = [phantom_case(config, 0, "ct", index, "seen") for index in range(cases)]
    clients = {}
    for k in range(hospitals):
        name, n_steps = f"hospital {k + 1}", steps or config.local_steps
        part = held[k::hospitals]
        clients[name] = fedgin.make_client(config, training, name, part, n_steps, device)
    return fedgin.make_model(config, 0, device), clients


def alternate(
    sides: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds that each side takes, `repeats` times in turn, after `warm_up` turns not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - began)
    return times


def report(title: str, values: dict[str, list[float]], unit: str = "s") -> None:
    """Print each side's median, and the first side's ratio to each other one with its range."""
    ours, *baselines = values
    medians = ", ".join(f"{name} {statistics.median(v):.4g} {unit}" for name, v in values.items())
    print(f"{title}: {medians}")
    for baseline in baselines:
        ratios = [a / b for a, b in zip(values[ours], values[baseline], strict=True)]
        ends = f"{min(ratios):.3f} … {max(ratios):.3f}"
        print(f"    {ours} / {baseline}: {statistics.median(ratios):.3f} ({ends})", flush=True)


def ellipsoid(shape: tuple[int, ...], centre, radii) -> np.ndarray:
    """A boolean ellipsoid; centre and radii as fractions of the shape."""
    axes = [
        ((np.arange(n) + 0.5) / n - c) / r for n, c, r in zip(shape, centre, radii, strict=True)
    ]
    x, y, z = np.meshgrid(*(axis**2 for axis in axes), indexing="ij", sparse=True)
    return x + y + z < 1


def in_processes(module: str, sides: dict[str, list[str]], repeats: int) -> dict[str, list[dict]]:
    """What `measure` returns for `python -m module ARGS` of each side, `repeats` times in turn."""
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, args in sides.items():
            results[name].append(measure([sys.executable, "-m", module, *args]))
    return results


def measure(command: list[str]) -> dict:
    """Run a command; return its last line, which is JSON, with its seconds and peak memory in MB.

    Memory is the proportional set size, summed over the process and all that it has started.
    """
    import psutil

    peak, began = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for each in [root, *root.children(recursive=True)]:
                try:
                    total += each.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            peak = max(peak, total)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {lines[-1:]}")
    return {**json.loads(lines[-1]), "seconds": seconds, "peak_mb": peak / 2**20}
