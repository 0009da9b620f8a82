"""Ranks in threads, which test calls, and in processes, which test runs; tests start both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
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
    store.set_timeout(timedelta(seconds=timeout))

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

# Runs multisite's main in forks of a process that has imported everything. A line starts a fork and
# is answered by its pid, a pid waits for it and is answered by its exit code. A fork may do something
# before the n-th call of a function; it notes that this was called, or it would prove nothing.
SERVER = """
import ctypes, json, os, signal, sys, time
import torch, torch._dynamo
import federated, fedgin
from scans.files import DataError
from scripts import multisite, peers
from study.results import TrainingFolder

def before(owner, name, action, call=1):
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            with open("patched", "a") as file:
                file.write(f"{name}\\n")
            action()
        return function(*args, **kwargs)
    setattr(owner, name, wrapper)

def wait(seconds):
    return lambda: time.sleep(seconds)

def send(number):
    return lambda: os.kill(os.getpid(), number)

def fail(error):
    def action():
        raise error
    return action

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
        if task["network"]:
            ctypes.CDLL(None).setns(os.open(task["network"], os.O_RDONLY), 0)
        exec(task["patch"])
        code = multisite.record_bug(multisite.main)(task["args"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


class Rank:
    """A rank at work in a folder of its own, which holds nothing but its own scans."""

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
    """Starts ranks, and ends those that a test leaves behind."""

    def __init__(self, server, root, sites):
        self.server, self.root, self.sites = server, root, sites
        self.ranks, self.patched = [], []

    def ask(self, task):
        print(json.dumps(task), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def folders(self, args, names, own):
        """The folder of each rank, with its scans, and its flags."""
        for name in names:
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(self.sites / name)
            flags = [f"--{MODALITY[name]}", name, "--out", "out", "--cache", self.sites / "cache"]
            yield folder, [str(flag) for flag in [*flags, *TINY, *args, *(own or {}).get(name, ())]]

    def __call__(self, *args, names=("north", "west"), own=None, patches=None, networks=None):
        """Start a rank for each name; own: flags and patches: code by name."""
        address, port = ("10.77.0.1", 29500) if networks else ("127.0.0.1", free_port())
        for n, (folder, flags) in enumerate(self.folders(args, names, own)):
            environ = {"RANK": n, "GROUP_RANK": n, "LOCAL_RANK": 0, "WORLD_SIZE": len(names)}
            environ |= {"MASTER_ADDR": address, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
            environ |= {"TORCHELASTIC_ERROR_FILE": "error.json", "TORCHELASTIC_RESTART_COUNT": 0}
            environ |= {"GLOO_SOCKET_IFNAME": networks[n]} if networks else {}
            patch = (patches or {}).get(folder.name, "")
            self.patched += [
                (folder / "patched", call) for call in re.findall(r"before\([\w.]+, '(\w+)'", patch)
            ]
            task = {"folder": str(folder), "args": flags, "patch": patch}
            task["environ"] = {key: str(value) for key, value in environ.items()}
            task["network"] = f"/run/netns/{networks[n]}" if networks else ""
            pid = self.ask(task)
            self.ranks.append(Rank(folder, pid, lambda pid=pid: self.ask(pid)))
        return self.ranks[-len(names) :]

    def torchrun(self, *args, names=("north", "west"), options=(), patch=""):
        """Start a torchrun for each name, as users do; patch: code that ranks run first."""
        port = free_port()
        for n, (folder, flags) in enumerate(self.folders(args, names, own=None)):
            program = ["-m", "scripts.multisite"]
            if patch:
                (folder / "worker.py").write_text(patch)
                program = [folder / "worker.py"]
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", len(names)]
            command += ["--node-rank", n, "--nproc-per-node", 1, "--master-addr", "127.0.0.1"]
            command += ["--master-port", port, *options, *program, *flags]
            with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdout=stdout,
                    stderr=stderr,
                )
            self.ranks.append(Rank(folder, process.pid, lambda process=process: process.wait(120)))
        return self.ranks[-len(names) :]

    def end(self):
        for rank in self.ranks:
            if rank.code is None:
                os.kill(rank.pid, signal.SIGKILL)
                rank.end()
        for file, function in self.patched:
            assert function in file.read_text().splitlines(), f"{function} was not called"


def start_server():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
