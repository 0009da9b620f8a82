"""What cases take, by their headers, and how many are read at once."""

import math
import threading
import time

import numpy as np
import pytest
from conftest import awkward_affine, save, truncate, write_totalsegmentator

import resources
from data import load_case
from datasets import ORGANS, find_cases
from phantom import SPACING
from resources import free_memory, grid_voxels, in_parallel, peak_bytes


@pytest.mark.parametrize("affine", [None, awkward_affine((1.5, 2.5, 6.0), (-1, 1, -1), (1, 2, 0))])
def test_the_header_tells_the_size_of_both_grids(affine, tmp_path):
    write_totalsegmentator(tmp_path, "ct", 1, affine=affine)
    [case] = find_cases(tmp_path)
    for spacing in (2.0, 7.3, SPACING):
        volume = load_case(case, ORGANS, spacing)
        assert grid_voxels(case, spacing) == (32**3, volume.image.size)
    assert grid_voxels(case, math.inf) == (32**3, 1)


def test_a_file_without_a_header_takes_nothing(tmp_path):
    cases = find_cases(write_totalsegmentator(tmp_path, "ct", 4))
    cases[0].image.unlink()
    cases[1].image.write_bytes(b"no NIfTI")
    save(cases[2].image, np.ones((4, 5), np.float32))
    assert [grid_voxels(case, 9.0) for case in cases[:3]] == [(0, 0)] * 3
    truncate(cases[3].image)  # behind the header
    assert grid_voxels(cases[3], 9.0) == (32**3, 32**3)
    assert peak_bytes(cases, 9.0) == resources.PEAK * 2 * 32**3
    assert peak_bytes([], 9.0) == 0


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


def test_without_a_cgroup_of_its_own_the_containers_limit_counts(tmp_path):
    write(tmp_path, {"proc/self/cgroup": "0::/\n"})
    top = "sys/fs/cgroup/memory."
    write(tmp_path, {top + "max": "90", top + "current": "50", top + "stat": "inactive_file 0"})
    assert free_memory(tmp_path) == 40


def most_at_once(monkeypatch, cores, free, peak):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(resources, "free_memory", lambda: free)
    at_once, seen, lock = [0], [], threading.Lock()

    def work(job):
        with lock:
            at_once[0] += 1
            seen.append(at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return job

    assert list(in_parallel(work, range(12), "working", peak)) == list(range(12))
    return max(seen)


@pytest.mark.parametrize(
    ("cores", "free", "peak", "expected"),
    [
        (4, math.inf, 10**9, 4),
        (4, 25, 10, 2),
        (4, 1000, 10, 4),
        (4, 5, 10, 1),  # one is tried, whatever it takes
        (4, -5, 10, 1),
        (2, 5, 0, 2),
    ],
)
def test_no_more_cases_are_read_at_once_than_cores_and_memory_hold(
    cores, free, peak, expected, monkeypatch
):
    assert most_at_once(monkeypatch, cores, free, peak) == expected


def test_a_newer_python_counts_the_cores_itself(monkeypatch):
    monkeypatch.setattr(resources.os, "process_cpu_count", lambda: 3, raising=False)
    assert most_at_once(monkeypatch, 1, math.inf, 1) == 3


def test_jobs_run_side_by_side_and_come_back_in_order(monkeypatch):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(3), raising=False)
    together = threading.Barrier(3, timeout=10)

    def work(job):
        together.wait()  # returns once three of them are here
        time.sleep(0.01 * (6 - job))
        return 10 * job

    assert list(in_parallel(work, range(6), "working")) == [0, 10, 20, 30, 40, 50]


def test_whoever_stops_listening_cancels_the_jobs_to_come(monkeypatch):
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(1), raising=False)
    done = []

    def work(job):
        done.append(job)
        time.sleep(0.01)

    results = in_parallel(work, range(1000), "working")
    next(results)
    results.close()
    assert len(done) < 100
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count
