"""Processes started by torchrun: the same weights as one has, and a clean end when one fails."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import truncate

import fedgin

ROOT = Path(__file__).parent.parent
TINY = ["--rounds", "3", "--local-steps", "1", "--batch-size", "2", "--width", "2", "--depth", "2"]
TINY += ["--arms", "fedgin", "--timeout", "20"]
FOUR_HOSPITALS = ["--sites", "2", "--mri-cases", "4"]


def torchrun(ranks, *words, launcher=(), prefix=(), cwd=None):
    launcher = launcher or ["--standalone", "--nproc-per-node", str(ranks)]
    words = [
        *prefix,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        ROOT / "fedgin.py",
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], env=environment, cwd=cwd, **pipes)


def finish(process, seconds=90):
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def weights(out):
    return torch.load(out / "fedgin.pt", weights_only=True)["weights"]


def assert_close(ours, theirs):
    """Within 1e-6 of each tensor's largest weight."""
    for key, w in theirs.items():
        assert (ours[key] - w).abs().max() <= 1e-6 * w.abs().max(), key


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    assert fedgin.main([*TINY, *FOUR_HOSPITALS, "--out", str(out)]) == 0
    return out


def test_four_ranks_give_the_weights_of_one(one_process, tmp_path):
    code, out, error = finish(torchrun(4, *TINY, *FOUR_HOSPITALS, "--out", tmp_path))
    assert code == 0, error
    assert "rank 1           mri-2" in out
    assert out.count("Everything is in") == 1
    assert_close(weights(tmp_path), weights(one_process))
    assert (tmp_path / "results.md").read_text() == (one_process / "results.md").read_text()


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_1(process):
    """The pid of the worker that has RANK=1."""
    return next(
        pid
        for pid in children(process.pid)
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_torchrun_goes_on_after_a_rank_was_killed(one_process, tmp_path):
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = [*TINY, *FOUR_HOSPITALS, "--out", tmp_path, "--resume"]
    process = torchrun(2, *words, launcher=launcher)
    wait_for(tmp_path / "checkpoint.pt", process)  # round 2 has begun
    os.kill(rank_1(process), signal.SIGKILL)
    code, _, error = finish(process)
    assert "(rank 0): the run failed: rank 1 (mri-2, ct-2): is gone" in error
    assert "--resume goes on" in error
    assert code == 0, error
    assert_close(weights(tmp_path), weights(one_process))


def test_a_rank_that_hangs_ends_the_run_in_time_and_one_process_goes_on(one_process, tmp_path):
    words = [*TINY, *FOUR_HOSPITALS, "--out", str(tmp_path), "--timeout", "2"]
    process = torchrun(2, *words)
    wait_for(tmp_path / "checkpoint.pt", process)
    hanging = rank_1(process)
    os.kill(hanging, signal.SIGSTOP)
    began = time.monotonic()
    for line in process.stderr:
        if "rank 1 (mri-2, ct-2): no answer for 1 s" in line:
            break
    assert time.monotonic() - began < 2 + 2
    os.kill(hanging, signal.SIGKILL)
    assert finish(process)[0] == 1
    assert fedgin.main([*words, "--resume"]) == 0
    assert_close(weights(tmp_path), weights(one_process))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def two_machines(tmp_path, ct_folder, mri_folder):
    """Each has the folder of its own hospital only; with a function that starts the run on both."""
    for machine, folder, name in ((0, mri_folder, "mri"), (1, ct_folder, "ct")):
        (tmp_path / str(machine)).mkdir()
        (tmp_path / str(machine) / name).symlink_to(folder)
    port = free_port()

    def start(*words):
        return [
            torchrun(
                2,
                *TINY,
                *("--mri", "mri", "--ct", "ct", "--patch", "32", "--spacing", "12", *words),
                launcher=[
                    *("--nnodes", "2", "--node-rank", str(machine), "--nproc-per-node", "1"),
                    *("--master-addr", "127.0.0.1", "--master-port", str(port)),
                ],
                cwd=tmp_path / str(machine),
            )
            for machine in (0, 1)
        ]

    return tmp_path, start


def test_two_ranks_open_their_own_folders_only_and_give_the_weights_of_one(two_machines):
    root, start = two_machines
    ends = [finish(process) for process in start("--out", "out")]
    assert [code for code, *_ in ends] == [0, 0], ends
    names = [sorted(p.name for p in (root / f"{i}/out").rglob("*.*")) for i in (0, 1)]
    assert "fedgin.pt" in names[0]
    assert names[1] == ["ct.json"]
    results = (root / "0/out/results.json").read_text()
    assert "s0003" not in results  # CT's test case keeps its name to itself
    folders = ["--mri", str(root / "0/mri"), "--ct", str(root / "1/ct")]
    words = ["--patch", "32", "--spacing", "12", "--out", str(root / "one")]
    assert fedgin.main([*TINY, *folders, *words]) == 0
    assert_close(weights(root / "0/out"), weights(root / "one"))


def test_a_bad_case_ends_all_ranks_with_its_reason(two_machines):
    root, start = two_machines
    copy = (root / "1/ct").readlink()
    (root / "1/ct").unlink()
    subprocess.run(["cp", "-r", copy, root / "1/ct"], check=True)
    truncate(root / "1/ct/s0001/ct.nii.gz")
    for code, _, error in map(finish, start("--out", "out")):
        assert code == 1
        assert any(who in error for who in ("rank 1 (ct): ", "(rank 1): "))
        assert "s0001/ct.nii.gz: cannot be read" in error
    assert not (root / "0/out").exists()


@pytest.fixture
def two_networks():
    """Two network namespaces joined by a cable: how to run in each, and how to cut it."""
    names = ("fedgin0", "fedgin1")
    setup = [f"netns add {name}" for name in names]
    setup += ["link add fedgin0 netns fedgin0 type veth peer name fedgin1 netns fedgin1"]
    for i, name in enumerate(names):
        setup += [f"-n {name} addr add 10.77.0.{i + 1}/24 dev {name}"]
        setup += [f"-n {name} link set {device} up" for device in (name, "lo")]
    if not shutil.which("ip"):
        pytest.skip("network namespaces need iproute2's ip")
    try:
        for line in setup:
            done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {line}: {done.stderr.strip()}")
        cut = ["ip", "-n", "fedgin1", "link", "set", "fedgin1", "down"]
        yield [["ip", "netns", "exec", n] for n in names], lambda: subprocess.run(cut, check=True)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def test_a_cut_link_ends_both_ranks_within_the_timeout(two_networks, tmp_path, monkeypatch):
    inside, cut = two_networks
    processes = []
    for machine, prefix in enumerate(inside):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"fedgin{machine}")
        launcher = [
            *("--nnodes", "2", "--node-rank", machine, "--nproc-per-node", "1"),
            *("--master-addr", "10.77.0.1", "--master-port", "29500"),
        ]
        out = tmp_path / str(machine)
        words = [*TINY, "--timeout", "4", "--rounds", "1000", "--out", out]
        processes.append(torchrun(2, *words, launcher=launcher, prefix=prefix))
    wait_for(tmp_path / "0/checkpoint.pt", processes[0])  # round 2 has begun
    cut()
    began = time.monotonic()
    ends = [finish(process) for process in processes]
    assert time.monotonic() - began < 4 + 6  # torchrun takes its time to leave
    assert [code for code, *_ in ends] == [1, 1]
    assert "rank 1 (ct): no answer for 2 s: it hangs, or the network is cut" in ends[0][2]
    assert "rank 0 (mri): no answer for 4 s" in ends[1][2]
    saved = torch.load(tmp_path / "0/checkpoint.pt", weights_only=True)
    assert saved["round"] >= 1
