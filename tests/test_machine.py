"""What a machine has left, how many jobs run at once, and what a lack of memory looks like."""

import math
import threading
import time

import pytest
import torch

from scans import machine
from scans.machine import free_memory, in_background, in_parallel, is_out_of_memory


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_free_memory_is_what_machine_and_cgroups_leave(tmp_path):
    assert free_memory(tmp_path) == math.inf
    write(tmp_path, {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    5000 kB\n"})
    assert free_memory(tmp_path) == 5000 * 1024
    write(tmp_path, {"proc/self/cgroup": "4:memory:/elsewhere\n0::/user/job\n"})
    job, user = "sys/fs/cgroup/user/job/memory.", "sys/fs/cgroup/user/memory."
    write(tmp_path, {job + "max": "max\n", job + "current": "70\n", job + "stat": ""})
    assert free_memory(tmp_path) == 5000 * 1024
    stat = "active_file 5\ninactive_file 30\n"
    write(tmp_path, {user + "max": "1000\n", user + "current": "700\n", user + "stat": stat})
    assert free_memory(tmp_path) == 1000 - 700 + 30  # the limit of a group above holds as well
    write(tmp_path, {job + "max": "200\n", job + "stat": stat})
    assert free_memory(tmp_path) == 200 - 70 + 30


@pytest.mark.parametrize(
    ("group", "folder", "limit", "used"),
    [
        ("0::/", "sys/fs/cgroup", "max", "current"),
        ("0::/elsewhere/job", "sys/fs/cgroup", "max", "current"),  # in a container
        ("5:cpu:/\n4:memory:/", "sys/fs/cgroup/memory", "limit_in_bytes", "usage_in_bytes"),
        ("4:memory:/a/b", "sys/fs/cgroup/memory/a", "limit_in_bytes", "usage_in_bytes"),
    ],
)
def test_the_limits_of_cgroups_of_both_versions_count(group, folder, limit, used, tmp_path):
    write(tmp_path, {"proc/self/cgroup": f"{group}\n"})
    stat = {f"{folder}/memory.stat": "inactive_file 3"}
    write(tmp_path, {f"{folder}/memory.{limit}": "90", f"{folder}/memory.{used}": "50", **stat})
    assert free_memory(tmp_path) == 43


@pytest.mark.parametrize(
    ("cores", "scans_that_fit", "expected"),
    [
        (4, math.inf, 4),
        (4, 2.5, 2),
        (4, 100, 4),
        (4, 0.5, 1),  # one is tried, whatever it takes
        (4, -0.5, 1),
    ],
)
def test_no_more_scans_are_read_at_once_than_cores_and_memory_hold(
    cores, scans_that_fit, expected, monkeypatch
):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(machine, "free_memory", lambda: scans_that_fit * machine.LARGE_SCAN)
    at_once, seen, lock = [0], [], threading.Lock()

    def work(job):
        with lock:
            at_once[0] += 1
            seen.append(at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return job

    assert list(in_parallel(work, range(12), "working")) == list(range(12))
    assert max(seen) == expected


def test_jobs_run_side_by_side_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(3), raising=False)
    together = threading.Barrier(3, timeout=10)

    def work(job):
        together.wait()  # returns once three of them are here
        time.sleep(0.01 * (6 - job))
        return 10 * job

    assert list(in_parallel(work, range(6), "working")) == [0, 10, 20, 30, 40, 50]


def test_running_out_of_memory_is_told_from_bugs():
    wanting = [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        RuntimeError("Storage size calculation overflowed with sizes=[9999999999999]"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("can't start new thread"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ]
    assert all(map(is_out_of_memory, wanting))
    others = RuntimeError("shapes differ"), OSError("no disk"), ValueError("out of memory")
    assert not any(map(is_out_of_memory, others))


def count(begun, n, failing_at=None):
    for i in range(n):
        if i == failing_at:
            raise OSError("the disk is gone")
        begun.append(i)
        yield f"job {i}", (i,)


def test_work_in_the_background_comes_back_in_order_and_little_is_begun_ahead():
    threads, begun = set(), []

    def work(i):
        threads.add(threading.get_ident())
        time.sleep(0.01 * (5 - i % 5))
        return 10 * i

    for i, found in enumerate(in_background(work, count(begun, 20))):
        assert found == (f"job {i}", 10 * i)
        assert len(begun) <= i + 2
    assert i == 19
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("where", ["the jobs", "the work"])
def test_what_fails_in_the_background_is_raised(where, n):
    def work(i):
        if where == "the work" and i == n:
            raise OSError("the disk is gone")
        return i

    jobs, found = count([], 20, n if where == "the jobs" else None), []
    with pytest.raises(OSError, match="the disk is gone"):
        for _, result in in_background(work, jobs):
            found.append(result)
    assert found == list(range(n if where == "the work" else n - 1))
