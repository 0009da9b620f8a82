"""What the machine holds and how it is used: memory, and threads that read scans in parallel."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

WANTING = re.compile(  # what a RuntimeError says
    r"can't allocate memory|not enough memory"  # on a CPU: Linux, Windows
    r"|Storage size calculation overflowed"  # more bytes than 64 bits can count
    r"|out of memory|STATUS_ALLOC_FAILED"  # CUDA; cuBLAS and cuDNN
    # cuDNN's search for a plan passes over those that find no memory, until none is left.
    r"|(FIND|GET) was unable to find an engine"
    r"|can't start new thread"  # a limit of memory or of processes
)
CGROUPS = (  # by version: its line in /proc/self/cgroup, and where its limit and use stand
    (r"^0::(.*)$", "", "max", "current"),
    (r"^\d+:memory:(.*)$", "memory", "limit_in_bytes", "usage_in_bytes"),
)
LARGE_SCAN = 4e9  # bytes that preprocessing 512 × 512 × 600 voxels takes, 24 per voxel


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that may still be taken, by the machine and by the limits (cgroups) on this process.

    Infinite where neither is known. Files that the system keeps in memory count as free.
    """
    free, groups = [math.inf], ""
    with contextlib.suppress(OSError, TypeError):
        kilobytes = re.search(r"MemAvailable: *(\d+)", (root / "proc/meminfo").read_text())
        free.append(1024 * int(kilobytes[1]))  # type: ignore[index]
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text()
    for line, place, limit, used in CGROUPS:
        top = root / "sys/fs/cgroup" / place
        for name in re.findall(line, groups, re.MULTILINE):
            for folder in (top / name.strip("/"), *(top / name.strip("/")).parents):
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    statistics = (folder / "memory.stat").read_text()
                    [files] = re.findall(r"^inactive_file (\d+)", statistics, re.MULTILINE)
                    taken = int((folder / f"memory.{used}").read_text()) - int(files)
                    free.append(int((folder / f"memory.{limit}").read_text()) - taken)
                if folder == top:
                    break
    return min(free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory or threads ran out, for which PyTorch raises several kinds of errors."""
    if isinstance(error, RuntimeError):
        return WANTING.search(str(error)) is not None
    return isinstance(error, MemoryError)


def in_parallel(function: Callable, jobs: Sequence, label: str) -> Generator[Any, None, None]:
    """function(job) of every job, in order, with a progress bar; one thread per core.

    There are fewer threads if memory cannot hold that many large scans. Threads suffice because
    decompression, NumPy and PyTorch release Python's lock while they compute.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, int(min(cores or 1, free_memory() / LARGE_SCAN)))
    pool = ThreadPoolExecutor(threads)
    try:
        results = pool.map(function, jobs)
        # disable=None: no bar in a pipe or a log file
        yield from tqdm(results, label, len(jobs), unit="scan", leave=False, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)


def in_background(
    function: Callable, jobs: Iterable[tuple[Any, tuple]]
) -> Iterator[tuple[Any, Any]]:
    """(name, function(*args)) of every (name, args), in order, while this thread makes the next."""
    with ThreadPoolExecutor(1) as pool:
        begun: Iterator[Any] = ((name, pool.submit(function, *args)) for name, args in jobs)
        for (name, result), _following in itertools.pairwise(itertools.chain(begun, [None])):
            yield name, result.result()
