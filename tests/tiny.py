"""Tiny runs of the command, in this process and in others, and what of them must be the same."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import fedgin
from scans import files

ROOT = Path(__file__).parent.parent
TINY = ["--rounds", "4", "--local-steps", "2", "--batch-size", "2", "--patch", "32"]
TINY += ["--width", "2", "--depth", "2", "--val-every", "1"]
SEVERAL = {"--arms": ["fl", "fedgin"], "--gin-probability": ["1"]}


def command(*args):
    """SEVERAL stands where args have other values, because a flag given twice adds up."""
    several = [word for flag, v in SEVERAL.items() if flag not in args for word in (flag, *v)]
    return fedgin.main([*TINY, *several, *map(str, args)])


# ------------------------------------------------------------------------- what must be the same


def outcome(out):
    """All that a finished run leaves and that must not depend on how it got there, by its path.

    Not: how long it was trained.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            content = files.read_pt(path)
            found[name] = {**content, "history": list(map(timeless, content["history"]))}
        elif path.name == "history.csv":
            with path.open(newline="") as file:
                found[name] = [list(timeless(row).items()) for row in csv.DictReader(file)]
        else:
            found[name] = "a folder" if path.is_dir() else path.read_bytes()
    return found


def timeless(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def assert_same(a, b):
    """Two runs of the same trainings, as outcome gives them: to the last bit of every weight."""
    assert a.keys() == b.keys()
    for name, content in a.items():
        other = b[name]
        if name.endswith(".pt"):
            content, other = dict(content), dict(other)
            for key in ("weights", "best_weights"):
                assert_equal(content.pop(key), other.pop(key), name)
        assert content == other, name


def assert_equal(a, b, name=""):
    """Two state dicts."""
    assert a.keys() == b.keys()
    for key, w in a.items():
        assert (w.dtype, w.shape) == (b[key].dtype, b[key].shape), f"{name}: {key}"
        assert w.numpy().tobytes() == b[key].numpy().tobytes(), f"{name}: {key}"


# --------------------------------------------------------------------------------- other processes

# Runs the command in processes of its own, forked from one that has imported everything and made
# the phantoms, which are few and small. They note each round and each test case that they keep. One
# may be told to send itself a signal at its n-th step on the disk. A line starts one, whose pid is
# answered; a pid waits for it, and its exit code is answered.
FORKS = """
import functools, json, os, signal, sys
import torch, torch._dynamo
import fedgin
from scans import phantom
from study import hospitals
from study.results import TrainingFolder

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "fcntl.flock"}
hospitals.PHANTOM_SPLITS = {"train": range(3), "val": range(3, 4), "test": range(4, 5)}
large = phantom.make_phantom

@functools.cache
def small(*args):
    return [array[::2, ::2, ::2] for array in large(*args)]  # 16 voxels wide

phantom.make_phantom = small
for seed in (1, 2):
    for modality in ("mri", "ct"):
        for index in range(5):
            small(seed, modality, index, "seen")
        small(seed, modality, 4, "unseen")

def note(name, what):
    keep = getattr(TrainingFolder, name)
    def noted(folder, *args):
        keep(folder, *args)
        os.write(noting, f"{folder.training.folder} {what(*args)}\\n".encode())
    setattr(TrainingFolder, name, noted)

note("keep_round", lambda checkpoint: f"round {checkpoint.round}")
note("keep_scores", lambda hospital, case, _: f"test {hospital.name} {case.modality} {case.id}")

def stop(at, number):
    left = [at]
    def count(event, _):
        if event in STEPS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
    sys.addaudithook(count)

for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    shown = os.open(asked["shown"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(shown, 1), os.dup2(shown, 2)
    noting = os.open(asked["notes"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    code = 1
    try:
        if asked["stop"]:
            stop(*asked["stop"])
        code = fedgin.main(asked["args"])
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


@dataclasses.dataclass
class Started:
    """A command under way."""

    forks: "Forks"
    pid: int
    shown: Path

    def end(self):
        """Its exit code, negative for a signal, and what it printed."""
        return int(self.forks.ask(self.pid)), self.shown.read_text()


class Forks:
    """Starts commands, each in a process of its own; they note in `notes` what they keep."""

    def __init__(self, folder):
        self.folder, self.n = folder, 0
        self.notes = folder / "notes"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, **pipes)

    def ask(self, what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def start(self, *args, stop=None):
        """stop: (n, signal), which it is to send itself at its n-th step on the disk."""
        self.n += 1
        shown = self.folder / f"shown-{self.n}"
        asked = {"args": list(map(str, args)), "stop": stop}
        pid = self.ask({**asked, "shown": str(shown), "notes": str(self.notes)})
        return Started(self, int(pid), shown)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
