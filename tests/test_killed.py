"""The real command, killed and stopped at random moments: --resume ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import TINY, assert_same, outcome

ROOT = Path(__file__).parent.parent

# Starts the command again and again, each time in a process of its own, forked from one that has
# imported everything and made the phantoms. It prints each one's pid and then its exit code.
STARTER = """
import functools, json, os, sys
import torch._dynamo, fedgin, phantom
phantom.phantom = functools.cache(phantom.phantom)
for modality, index in ((m, i) for m in ("mri", "ct") for i in range(24)):
    phantom.phantom(42, modality, index)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(fedgin.main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def start(out, *words):
    """The real command in a process of its own, up to where it has read its cases."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "fedgin.py", *TINY, "--out", out, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("fedgin:"):
            break
    return process


def finish(process):
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(out)
    ready = time.monotonic()
    assert finish(process)[0] == 0
    return out, time.monotonic() - ready


def kill_and_resume(out, kills, longest, seed, died):
    draw = random.Random(seed)
    words, command = [sys.executable, "-c", STARTER], [*TINY, "--out", str(out), "--resume"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, cwd=ROOT, text=True, **pipes) as starter:
        for _ in range(kills):
            print(json.dumps(command), file=starter.stdin, flush=True)
            pid = int(starter.stdout.readline())
            time.sleep(draw.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            died.append(int(starter.stdout.readline()) == -signal.SIGKILL)
        starter.stdin.close()
    died.append(finish(start(out, "--resume"))[0])


def test_killed_at_random_moments_and_resumed_it_ends_the_same(undisturbed, tmp_path, request):
    """SIGKILL between batches, in checkpoints, between arms, in evaluation: the same bits."""
    calm, seconds = undisturbed
    kills = request.config.getoption("--kills") // 2
    died = [[], []]
    threads = [
        threading.Thread(
            target=kill_and_resume, args=(tmp_path / str(i), kills, seconds / 3, i, died[i])
        )
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(died[i]) == kills + 1
        assert died[i][-1] == 0
        assert_same(outcome(calm), outcome(tmp_path / str(i)))
    assert sum(died[0][:-1]) + sum(died[1][:-1]) >= kills  # the others had finished before


def test_ctrl_c_and_sigterm_say_how_to_go_on(undisturbed, tmp_path):
    calm, _ = undisturbed
    for stop in (signal.SIGINT, signal.SIGTERM):
        process = start(tmp_path, "--resume")
        while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)  # the first time: one of eight rounds is done
        process.send_signal(stop)
        code, error = finish(process)
        assert code == 130
        assert "the same command with --resume goes on" in error.splitlines()[-1]
        assert "Traceback" not in error
    assert finish(start(tmp_path, "--resume"))[0] == 0
    assert_same(outcome(calm), outcome(tmp_path))


def test_two_processes_do_not_share_a_run(tmp_path):
    first = start(tmp_path, "--rounds", "50")
    try:
        for _ in range(100):
            if (tmp_path / "config.json").exists():
                break
            time.sleep(0.05)
        code, error = finish(start(tmp_path, "--rounds", "50", "--resume"))
        assert code == 2
        assert "another process is at work" in error
    finally:
        first.kill()
        finish(first)
