"""What the benchmarks share: A B A B, and the ratio of A to B with its spread.

pip install -r benchmarks/requirements.txt
python -m benchmarks.training_step  # from the project's folder, or another one of these scripts
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study.config import Config
from study.hospitals import Hospital, load_hospitals
from study.inference import choose_device


def device_argument(description: str) -> torch.device:
    return parse(description)[0]


def parse(description: str, **numbers: Any) -> tuple[torch.device, argparse.Namespace]:
    """The device and all flags: --device, and one for each of `numbers` with its default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default in numbers.items():
        several = isinstance(default, tuple)
        options: dict[str, Any] = {"nargs": len(default)} if several else {}
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name}", default=default, type=kind, metavar="N", **options)
    args = parser.parse_args()
    device = choose_device() if args.device == "cuda" else torch.device("cpu")
    if device.type != args.device:
        parser.error("--device cuda: PyTorch sees no GPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    print(f"{name}, Python {platform.python_version()}, PyTorch {torch.__version__}", flush=True)
    return device, args


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} threads on {names[0] if names else platform.processor()}"


def alternate(
    sides: dict[str, Callable[[], object]], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds that each side takes, `repeats` times in turn, after `warm_up` rounds not counted."""
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


def report(what: str, values: dict[str, list[float]], unit: str = "s") -> None:
    """Medians of all sides, and the first one's ratio to each other one with its spread."""
    ours, *peers = values
    medians = ", ".join(f"{name} {statistics.median(v):.4g} {unit}" for name, v in values.items())
    print(f"{what}: {medians}")
    for peer in peers:
        ratios = [a / b for a, b in zip(values[ours], values[peer], strict=True)]
        spread = f"{min(ratios):.3f} … {max(ratios):.3f}"
        print(f"    {ours} / {peer}: {statistics.median(ratios):.3f} ({spread})", flush=True)


def peak_memory() -> float:
    """MB that this process has held at its most; from Linux.

    Not ru_maxrss, which starts with the peak of the process that has started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+)", status)[0]) / 2**10


def settings(**changes: Any) -> Config:
    """The defaults for phantoms in the complete scenario, but for the changes."""
    return Config("complete", **changes)


def phantom_hospitals(config: Config) -> list[Hospital]:
    return load_hospitals(config)[0][config.seeds[0]]


def ellipsoid(shape: tuple[int, ...], centre, radii) -> np.ndarray:
    """A boolean ellipsoid; centre and radii as shares of the shape."""
    axes = [
        ((np.arange(n) + 0.5) / n - c) / r for n, c, r in zip(shape, centre, radii, strict=True)
    ]
    x, y, z = np.meshgrid(*(axis**2 for axis in axes), indexing="ij", sparse=True)
    return x + y + z < 1


def in_processes(module: str, sides: dict[str, list[str]], repeats: int) -> dict[str, list[dict]]:
    """What `python -m module ARGS` prints as JSON, with wall time and peak memory, in turn."""
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, args in sides.items():
            found[name].append(measure([sys.executable, "-m", module, *args]))
    return found


def measure(command: list[str]) -> dict:
    """Run a command; return its last line, which is JSON, and seconds and peak MB of all of it.

    Memory is the proportional set size, added up over the process and all below it.
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
