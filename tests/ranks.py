"""Ranks in threads, which test calls, and in processes of their own, which test whole runs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from torch import distributed

from scripts import peers

ROOT = Path(__file__).parent.parent
MODALITY = {"north": "mri", "south": "mri", "west": "ct"}
TINY = ["--rounds", "3", "--local-steps", "1", "--batch-size", "2", "--width", "2", "--depth", "2"]
TINY += ["--patch", "32", "--spacing", "12", "--val-every", "1", "--gin-probability", "1"]

# ------------------------------------------------------------------------------------- in threads


def outcomes(size, function, timeout=60.0, sent=None):
    """What function(peers) gives or raises at each rank: a thread, linked to the others by gloo.

    All tensors that the ranks sum up are appended to `sent`.
    """
    own, store = threading.local(), distributed.HashStore()

    def link(_, store, rank, world_size, timeout):
        own.group = distributed.ProcessGroupGloo(store, rank, world_size, timeout)

    def all_reduce(numbers):
        if sent is not None:
            sent.append(numbers.clone())
        own.group.allreduce([numbers]).wait()

    def be(rank):
        own.environ = {"RANK": rank, "WORLD_SIZE": size, "TORCHELASTIC_RESTART_COUNT": "0"}
        own.environ |= {"GROUP_RANK": "1", "TORCHELASTIC_ERROR_FILE": os.devnull}
        try:
            with peers.join("abc"[rank], timeout) as joined:
                return function(joined)
        except BaseException as error:
            return error
        finally:
            own.group = None  # its links close, as those of a process that ends

    environ = type("", (), {"environ": property(lambda _: own.environ)})()
    with (
        mock.patch.object(peers, "os", environ),
        mock.patch.object(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 0)])),
        mock.patch.object(distributed, "init_process_group", link),
        mock.patch.object(distributed, "all_reduce", all_reduce),
        ThreadPoolExecutor(size) as pool,
    ):
        return list(pool.map(be, range(size)))


def together(size, function, **more):
    """The outcomes of all ranks; raises the first error that is a rank's own."""
    found = outcomes(size, function, **more)
    errors = [each for each in found if isinstance(each, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, ConnectionError)):
        raise error
    return found


# ----------------------------------------------------------------------------------- in processes

# What a rank may do before the n-th call of a function. That it was called is noted in a file: a
# patch that nobody calls would prove nothing.
TOOLS = """
import ctypes, json, os, signal, sys, time
import torch, torch._dynamo
import fedgin
from scans.files import DataError
from scripts import multisite
from study.results import TrainingFolder

def before(owner, name, action, call=1):
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            with open("patched", "a") as file:
                file.write(name + "\\n")
            action()
        return function(*args, **kwargs)
    setattr(owner, name, wrapper)

def fail(error):
    raise error
"""
# Forks ranks from a process that has imported everything. A line starts one and is answered by its
# pid; a pid waits for it and is answered by its exit code.
SERVER = """
for line in sys.stdin:
    task = json.loads(line)
    if isinstance(task, int):
        print(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 1
    try:
        signal.alarm(120)  # should it hang
        os.chdir(task["folder"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(task["environ"])
        exec(task["patch"])
        code = multisite.record_bug(multisite.main)(task["flags"])
        code = 99 if torch.distributed.is_initialized() else code  # which may abort at the exit
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


class Rank:
    """A rank in a folder of its own, with only its own scans."""

    def __init__(self, folder, pid, wait):
        self.folder, self.out, self.pid, self.wait = folder, folder / "out", pid, wait
        self.code = None

    def end(self):
        """The exit code, once there is one."""
        if self.code is None:
            self.code = self.wait()
        return self.code

    @property
    def error(self):
        return (self.folder / "stderr").read_text()

    def failure(self):
        """The line that says why the run failed."""
        lines = [line for line in self.error.splitlines() if ": the run failed: " in line]
        assert lines, self.error
        return lines[-1]

    def summary(self):
        """What torchrun's summary says of this rank."""
        return json.loads((self.folder / "error.json").read_text())["message"]["message"]


class Launcher:
    """Starts a rank for each of some names, and ends those that a test leaves behind."""

    def __init__(self, server, root, sites):
        self.server, self.root, self.sites = server, root, sites
        self.ranks, self.patched = [], []

    def __call__(self, *args, names=("north", "west"), own=(), patches=(), torchrun=None):
        """own: flags and patches: code by name; torchrun: its options, if it is to start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for n, name in enumerate(names):
            folder, patch = self.root / name, dict(patches).get(name, "")
            folder.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(self.sites / name)
            flags = [f"--{MODALITY[name]}", name, "--out", "out", "--cache", self.sites / "cache"]
            flags = [str(flag) for flag in [*flags, *TINY, *args, *dict(own).get(name, ())]]
            called = re.findall(r"before\([\w.]+, '(\w+)'", patch)
            self.patched += [(folder / "patched", function) for function in called]
            if torchrun is None:
                environ = f"RANK={n} LOCAL_RANK=0 GROUP_RANK=1 WORLD_SIZE={len(names)} "
                environ += f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} TORCHELASTIC_RUN_ID=x "
                environ += "TORCHELASTIC_ERROR_FILE=error.json TORCHELASTIC_RESTART_COUNT=0"
                environ = dict(pair.split("=") for pair in environ.split())
                task = {"folder": str(folder), "flags": flags, "patch": patch, "environ": environ}
                pid = self.ask(task)
                self.ranks.append(Rank(folder, pid, lambda pid=pid: self.ask(pid)))
            else:
                options = f"--nnodes {len(names)} --node-rank {n} --nproc-per-node 1 --master-addr "
                options += f"127.0.0.1 --master-port {port} {torchrun}"
                self.ranks.append(start_torchrun(folder, options.split(), patch, flags))
        return self.ranks[-len(names) :]

    def ask(self, task):
        print(json.dumps(task), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def end(self):
        for rank in self.ranks:
            if rank.code is None:
                os.kill(rank.pid, signal.SIGKILL)
                rank.end()
        for file, function in self.patched:
            assert function in file.read_text().splitlines(), f"{function} was not called"


def start_torchrun(folder, options, patch, flags):
    program = ["-m", "scripts.multisite"]
    if patch:
        program = ["worker.py"]
        end = "code = multisite.record_bug(multisite.main)()\nsys.stdout.flush()\nos._exit(code)"
        (folder / "worker.py").write_text(f"{TOOLS}\n{patch}\n{end}")  # as multisite itself ends
    command = [sys.executable, "-m", "torch.distributed.run", *options, *program, *flags]
    with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        streams = {"stdout": stdout, "stderr": stderr}
        process = subprocess.Popen(command, cwd=folder, env=environ, **streams)
    return Rank(folder, process.pid, lambda: process.wait(120))


def start_server():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", TOOLS + SERVER], cwd=ROOT, **pipes)
