"""What cases take of the machine, by their headers: memory, and threads that read them.

from datasets import find_cases
from resources import free_memory, peak_bytes
cases = find_cases("Totalsegmentator_dataset_v201", "ct")
print(peak_bytes(cases, spacing=2.0) / free_memory())  # how much of it the largest case takes
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from tqdm import tqdm

from datasets import Case
from nifti import read_header, resampled_size

PEAK = 24  # bytes that data.load_case takes for each voxel of the two grids: 14 to 23 were measured


def grid_voxels(case: Case, spacing: float) -> tuple[int, int]:
    """Voxels of a scan and of its volume, by the header alone; none if it has none."""
    try:
        header = read_header(case.image)
    except ImageFileError:  # which reading it will say
        return 0, 0
    shape = header.get_data_shape()[:3]
    size = resampled_size(shape, voxel_sizes(header.get_best_affine()), spacing)
    return math.prod(shape), math.prod(size)


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


def peak_bytes(cases: Sequence[Case], spacing: float) -> int:
    """What reading the largest case takes; spacing: of the model's grid, infinite for none."""
    return max((PEAK * sum(grid_voxels(case, spacing)) for case in cases), default=0)


def in_parallel(function: Callable, jobs: Sequence, what: str, peak: int = 0) -> Iterator[Any]:
    """function(job) of every job, in order, behind a progress bar; a thread a core works on them.

    peak: bytes that a job takes, so that no more run at once than memory holds. Threads suffice:
    decompressing, NumPy and PyTorch let go of Python's lock while they compute.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ThreadPoolExecutor(int(max(1, min(cores or 1, free_memory() // max(peak, 1)))))
    try:
        results = pool.map(function, jobs)
        bar = {"total": len(jobs), "desc": what, "unit": "scan", "leave": False}
        yield from tqdm(results, **bar, disable=None)  # not in a pipe or a log file
    finally:
        pool.shutdown(cancel_futures=True)
