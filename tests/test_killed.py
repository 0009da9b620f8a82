"""The command, killed and stopped at random moments: --resume ends as if nothing had been."""

import contextlib
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

# Runs the command again and again, each time in a process of its own, forked from one that has
# imported everything and made the phantoms. It prints each one's pid and then its exit code.
STARTER = """
import functools, json, os, sys
import torch._dynamo, fedgin, phantom
phantom.phantom = functools.cache(phantom.phantom)
for modality, index in ((m, i) for m in ("mri", "ct") for i in range(24)):
    phantom.phantom(42, modality, index)
for line in sys.stdin:
    errors, *words = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(fedgin.main(words))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Starter:
    """Starts one command at a time."""

    def __init__(self, folder):
        self.errors = folder / "stderr"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, **pipes)

    def start(self, out, *words):
        line = json.dumps([str(self.errors), *TINY, "--out", str(out), *words])
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline()), self.errors.read_text()


@pytest.fixture(scope="module")
def starters(tmp_path_factory):
    found = [Starter(tmp_path_factory.mktemp("starter")) for _ in range(2)]
    yield found
    for starter in found:
        with starter.process:
            starter.process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, starters):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    starters[0].start(out)
    began = time.monotonic()
    assert starters[0].end()[0] == 0
    return out, time.monotonic() - began


def kill_and_resume(starter, out, kills, longest, seed, died):
    draw = random.Random(seed)
    for _ in range(kills):
        pid = starter.start(out, "--resume")
        time.sleep(draw.uniform(0, longest))
        with contextlib.suppress(ProcessLookupError):  # the run had come to its end
            os.kill(pid, signal.SIGKILL)
        died.append(starter.end()[0] == -signal.SIGKILL)
    starter.start(out, "--resume")
    died.append(starter.end()[0])


def test_killed_at_random_moments_and_resumed_it_ends_the_same(
    undisturbed, starters, tmp_path, request
):
    """SIGKILL between batches, in checkpoints, between arms, in evaluation: the same bits."""
    calm, seconds = undisturbed
    kills = request.config.getoption("--kills") // 2
    died = [[], []]
    threads = [
        threading.Thread(
            target=kill_and_resume,
            args=(starters[i], tmp_path / str(i), kills, seconds / 5, i, died[i]),
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


def test_ctrl_c_and_sigterm_say_how_to_go_on(undisturbed, starters, tmp_path):
    calm, _ = undisturbed
    for stop in (signal.SIGINT, signal.SIGTERM):
        pid = starters[0].start(tmp_path, "--resume")
        while not (tmp_path / "checkpoint.pt").exists():
            time.sleep(0.01)  # the first time: one of eight rounds is done
        time.sleep(0.2)  # the second time: it is at work again
        os.kill(pid, stop)
        code, error = starters[0].end()
        assert code == 130
        assert "the same command with --resume goes on" in error.splitlines()[-1]
        assert "Traceback" not in error
    starters[0].start(tmp_path, "--resume")
    assert starters[0].end()[0] == 0
    assert_same(outcome(calm), outcome(tmp_path))


def test_two_processes_do_not_share_a_run(starters, tmp_path):
    words = (tmp_path / "out", "--rounds", "50")
    first = starters[0].start(*words)
    while not (tmp_path / "out/config.json").exists():
        time.sleep(0.01)
    starters[1].start(*words, "--resume")
    code, error = starters[1].end()
    os.kill(first, signal.SIGKILL)
    assert starters[0].end()[0] == -signal.SIGKILL
    assert code == 2
    assert "another process is at work" in error
