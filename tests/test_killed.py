"""The command, killed and stopped at random moments: --resume ends as if nothing had been."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import TINY, assert_same, outcome

import fedgin

pytestmark = pytest.mark.slow
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
    errors, *args = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(fedgin.main(args))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Starter:
    """Starts one command at a time."""

    def __init__(self, folder):
        self.errors = folder / "stderr"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, **pipes)

    def start(self, out, *args):
        line = json.dumps([str(self.errors), *TINY, "--out", str(out), *args])
        print(line, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        return int(self.process.stdout.readline()), self.errors.read_text()


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    found = Starter(tmp_path_factory.mktemp("starter"))
    with found.process:
        yield found
        found.process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, starter):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    starter.start(out)
    began = time.monotonic()
    assert starter.end()[0] == 0
    return out, time.monotonic() - began


def test_killed_at_random_moments_and_resumed_it_ends_the_same(
    undisturbed, starter, tmp_path, request
):
    """SIGKILL between batches, in checkpoints, between arms, in evaluation: the same bits."""
    calm, seconds = undisturbed
    kills, died, draw = request.config.getoption("--kills"), 0, random.Random(0)
    for n in range(kills):
        out = tmp_path / str(n * 2 // kills)  # one run for each half of the kills
        pid = starter.start(out, "--resume")
        time.sleep(draw.uniform(0, seconds / 5))
        with contextlib.suppress(ProcessLookupError):  # the run had come to its end
            os.kill(pid, signal.SIGKILL)
        died += starter.end()[0] == -signal.SIGKILL
    assert died >= kills / 2
    for half in ("0", "1"):
        starter.start(tmp_path / half, "--resume")
        assert starter.end()[0] == 0
        assert_same(outcome(calm), outcome(tmp_path / half))


def test_ctrl_c_and_sigterm_say_how_to_go_on(undisturbed, starter, tmp_path):
    calm, _ = undisturbed
    for stop in (signal.SIGINT, signal.SIGTERM):
        pid = starter.start(tmp_path, "--resume")
        while not (tmp_path / "checkpoint.pt").exists():
            time.sleep(0.01)  # the first time: one of eight rounds is done
        time.sleep(0.2)  # the second time: it is at work again
        os.kill(pid, stop)
        code, error = starter.end()
        assert code == 130
        assert "the same command with --resume goes on" in error.splitlines()[-1]
        assert "Traceback" not in error
    starter.start(tmp_path, "--resume")
    assert starter.end()[0] == 0
    assert_same(outcome(calm), outcome(tmp_path))


def test_two_processes_do_not_share_a_run(starter, tmp_path, capsys):
    args = (str(tmp_path / "out"), "--rounds", "50")
    pid = starter.start(*args)
    while not (tmp_path / "out/config.json").exists():
        time.sleep(0.01)
    assert fedgin.main([*TINY, "--out", *args, "--resume"]) == 2
    assert "another process is at work" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    assert starter.end()[0] == -signal.SIGKILL
