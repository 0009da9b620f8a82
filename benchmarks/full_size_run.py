"""fedgin.py with a network that costs next to nothing, for full_size.py: one run in a process.

python -m benchmarks.full_size_run start|whole FLAGS OF fedgin.py

`start` ends it at the first batch. The last line that it prints is JSON: seconds from the start of
the process to the end of the imports and to the first batch, those in between that finding the
cases, their fingerprints and opening the cache took, and the peak memory in MB.
"""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import fedgin  # noqa: E402
from benchmarks.compare import peak_memory  # noqa: E402
from study import hospitals  # noqa: E402

PARTS = {  # of the start
    "listing": (hospitals, "find_sources"),
    "fingerprints": (hospitals, "check_disk"),
    "opening the cache": (hospitals, "load_cases"),
}


class Pointwise(nn.Conv3d):
    """A 1 × 1 × 1 convolution in the place of the U-Net."""

    def __init__(self, in_channels: int, out_channels: int, *_: int) -> None:
        super().__init__(in_channels, out_channels, 1)


def score_shifted(prediction: np.ndarray, target: np.ndarray, *about: Any) -> dict:
    """Scores of the organs 2 voxels off, whatever was predicted.

    What a network that has learnt nothing finds, specks all over the volume, has surfaces that take
    many times as long as organs'.
    """
    return evaluate.score_case(np.roll(target, 2, axis=0), target, *about)


def replace_network() -> None:
    fedgin.UNet3D, fedgin.score_case = Pointwise, score_shifted


def timed(work: Callable, seconds: dict[str, float], name: str) -> Callable:
    """The same function, which adds what its calls take to seconds[name]."""

    def wrapper(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - began

    return wrapper


def main() -> None:
    found = {"imports": time.perf_counter() - BEGAN}
    prefetch, (until, *flags) = data.prefetch, sys.argv[1:]

    def noting_the_first(batches: Iterator, pin: bool = False) -> Iterator:
        for batch in prefetch(batches, pin):
            found.setdefault("first batch", time.perf_counter() - BEGAN)
            if until == "start":
                raise KeyboardInterrupt
            yield batch

    for name, (module, function) in PARTS.items():
        setattr(module, function, timed(getattr(module, function), found, name))
    data.prefetch = noting_the_first
    replace_network()
    if fedgin.main(flags) not in (0, 130):
        sys.exit(1)
    found["memory"] = peak_memory()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
