"""What the machine holds and how it is used: memory, and threads that read scans side by side."""

import contextlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

WANTING = re.compile(  # what a RuntimeError says
    r"can't allocate memory|not enough memory"  # on a CPU: Linux, Windows
    r"|out of memory|STATUS_ALLOC_FAILED"  # CUDA; cuBLAS and cuDNN
    # cuDNN's search for a plan passes over those that find no memory, until none is left.
    r"|(FIND|GET) was unable to find an engine"
)


def free_memory(root: Path = Path("/")) -> float:
    """Bytes that may still be taken, by the machine and by the limits (cgroup v2) on this process.

    Infinite where neither is known. Files that the system keeps in memory count as free.
    """
    free = [math.inf]
    with contextlib.suppress(OSError, TypeError):
        kilobytes = re.search(r"MemAvailable: *(\d+)", (root / "proc/meminfo").read_text())
        free.append(1024 * int(kilobytes[1]))  # type: ignore[index]
    with contextlib.suppress(OSError):
        name = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        group, top = root / "sys/fs/cgroup" / name, root / "sys/fs/cgroup"
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, TypeError):  # "max": there is no limit
                limit = int((folder / "memory.max").read_text())
                files = re.search(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
                used = int((folder / "memory.current").read_text())
                free.append(limit - used + int(files[1]))  # type: ignore[index]
            if folder == top:
                break
    return min(free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting, be it a GPU's, for which PyTorch has more than one exception."""
    if isinstance(error, RuntimeError):
        return WANTING.search(str(error)) is not None
    return isinstance(error, MemoryError)


def in_parallel(function: Callable, jobs: Sequence, what: str, peak: int = 0) -> Iterator[Any]:
    """function(job) of every job, in order, behind a progress bar; a thread a core works on them.

    peak: bytes that a job takes, so that no more run at once than memory holds. Threads suffice:
    decompressing, NumPy and PyTorch let go of Python's lock while they compute.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fitting = free_memory() / max(peak, 1)  # infinite where the memory is not known
    pool = ThreadPoolExecutor(max(1, int(min(cores or 1, fitting))))
    try:
        results = pool.map(function, jobs)
        # disable=None: no bar in a pipe or a log file
        yield from tqdm(results, what, len(jobs), unit="scan", leave=False, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)


def in_background(
    function: Callable, jobs: Iterable[tuple[Any, tuple]], threads: int = 2
) -> Iterator[tuple[Any, Any]]:
    """(name, function(*args)) of every (name, args), in order, while this thread makes the next.

    At most `threads` more are begun than are asked for. What making one raises comes in its turn.
    """

    def begun() -> Iterator[tuple[Any, Future]]:
        try:
            for name, args in jobs:
                yield name, pool.submit(function, *args)
        except Exception as error:
            failed: Future = Future()
            failed.set_exception(error)
            yield None, failed

    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[tuple[Any, Future]]()
        for each in begun():
            waiting.append(each)
            if len(waiting) > threads:
                name, result = waiting.popleft()
                yield name, result.result()
        for name, result in waiting:
            yield name, result.result()
