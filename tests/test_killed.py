"""Runs that are killed, stopped, extended, shared and damaged end as if nothing had been.

pytest tests/test_killed.py --kills 60
"""

import collections
import itertools
import os
import random
import shutil
import signal
import time

import pytest
from tiny import Forks, assert_same, outcome

from scans.files import TEMPORARY

pytestmark = pytest.mark.slow
SMALL = ["--rounds", "3", "--local-steps", "1", "--batch-size", "1", "--patch", "16"]
SMALL += ["--width", "2", "--depth", "2", "--organs", "liver", "spleen"]
ALL = {
    "--arms": ("mri-only", "fl", "fedgin"),
    "--seeds": ("1", "2"),
    "--ratios": ("1:1", "all"),
    "--gin-probability": ("1", "0.25"),
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as found:
        yield found


def flags(chosen):
    return [
        *SMALL,
        *itertools.chain.from_iterable((flag, *names) for flag, names in chosen.items()),
    ]


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    """A run of everything, and how long a training takes."""
    out, began = tmp_path_factory.mktemp("undisturbed") / "out", time.monotonic()
    code, shown = forks.start(*flags(ALL), "--out", out).end()
    assert code == 0, shown
    assert len(list(out.glob("*/scores.csv"))) == 2 * (1 + 2 + 2 * 2)
    return out, (time.monotonic() - began) / 14


class Sequence:
    """What befalls a run, drawn from a seed."""

    def __init__(self, seed, forks, calm, a_training, folder):
        self.draw, self.forks, self.calm, self.a_training = (
            random.Random(seed),
            forks,
            calm,
            a_training,
        )
        self.out, self.copy = folder / "out", folder / "calm"
        self.all = {flag: self.some(names) for flag, names in ALL.items()}
        self.steps = []  # for whoever must look for a mistake
        self.damaged = {}  # what the files were that have been spoilt
        self.anew = set()  # folders of trainings that may begin anew
        forks.notes.unlink(missing_ok=True)

    def some(self, names):
        return tuple(self.draw.sample(names, self.draw.randint(1, len(names))))

    def start(self, chosen, stop=None):
        self.steps.append(f"{' '.join(flags(chosen)[len(SMALL) :])} {stop or ''}")
        return self.forks.start(*flags(chosen), "--out", self.out, stop=stop)

    def run(self):
        """One command, or two at once, some of the trainings each, and a stop."""
        started = []
        for _ in range(self.draw.choice((1, 1, 2))):
            number = self.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, None))
            at_step = self.draw.random() < 0.6
            stop = (int(10 ** self.draw.uniform(0, 2.7)), number) if number and at_step else None
            chosen = {flag: self.some(names) for flag, names in self.all.items()}
            started.append((self.start(chosen, stop), number, stop))
        waiting = []
        for command, number, stop in started:
            if number and not stop:
                waiting.append((self.draw.uniform(0, 4 * self.a_training), command.pid, number))
        passed = 0
        for seconds, pid, number in sorted(waiting):
            time.sleep(seconds - passed)
            passed = seconds
            self.steps.append(f"after {seconds:.3f} s {number!r}")
            os.kill(pid, number)  # its process is there, though it may have come to its end
        ends = {signal.SIGKILL: -9, signal.SIGINT: 130}
        self.end([(command, {0, ends.get(number, 0)}) for command, number, _ in started])

    def end(self, started):
        """Whether all commands end as they were made to; others must name a file that is spoilt."""
        to_mend = set()
        for command, expected in started:
            code, shown = command.end()
            self.steps.append(f"→ {code}")
            if code not in expected:
                self.steps.append(shown)
                named = {path for path in self.damaged if names(shown, path)}
                assert code in (1, 2), "an unexpected end"
                assert named, "no spoilt file is named"
                assert "Traceback" not in shown
                to_mend |= named
        for path in sorted(to_mend):
            self.mend(path)
        return not to_mend

    def damage(self):
        """Spoil or remove a file that a process reads again."""
        candidates = [
            path
            for path in sorted(self.out.rglob("*"))
            if path.is_file()
            and path.name != "lock"
            and path not in self.damaged
            # What scripts.predict refuses, and no run reads again.
            and not (path.name == "model.pt" and (path.parent / "scores.csv").exists())
        ]
        if not candidates:
            return
        path, how = self.draw.choice(candidates), self.draw.choice(("cut", "flip", "remove"))
        content = path.read_bytes()
        place, bit = self.draw.randrange(len(content)), 1 << self.draw.randrange(8)
        self.steps.append(f"{how} {path.relative_to(self.out)} at {place}, bit {bit}")
        self.damaged[path] = content
        if how == "remove":
            path.unlink()
            self.anew.add(path.parent.name)
        elif how == "cut":
            path.write_bytes(content[:place])
        else:
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])

    def mend(self, path):
        """Bring a file back, or delete the training's folder: it is trained anew."""
        content, of_training = self.damaged.pop(path), "-seed" in path.parent.name
        if of_training and self.draw.random() < 0.5:
            shutil.rmtree(path.parent)
            self.anew.add(path.parent.name)
        else:
            path.write_bytes(content)
        self.steps.append(f"mend {path.relative_to(self.out)}: {path.exists()}")

    def go(self):
        for _ in range(self.draw.randint(3, 7)):
            self.draw.choice((self.run, self.run, self.damage))()
        whole = {flag: self.draw.sample(names, len(names)) for flag, names in self.all.items()}
        well = False
        while not well:
            started = [self.start(whole) for _ in range(self.draw.choice((1, 2)))]
            well = self.end([(command, {0}) for command in started])
        self.compare()

    def compare(self):
        """With the undisturbed trainings, in a run of which nothing is left to do."""
        trainings = {path.parent.name for path in self.out.glob("*/scores.csv")}
        seeds = {name.rpartition("seed")[2] for name in trainings}
        for path in self.calm.rglob("*"):
            if path.is_file() and path.parent.name in trainings | {"out"}:
                copy(path, self.copy / path.relative_to(self.calm))
            if path.parent.name == "hospitals" and path.stem.rpartition("seed")[2] in seeds:
                copy(path, self.copy / path.relative_to(self.calm))
        for name in ("scores.csv", "history.csv", "results.md"):
            (self.copy / name).unlink()
        code, shown = self.forks.start(*flags(self.all), "--out", self.copy).end()
        assert code == 0, shown
        expected, found = outcome(self.copy), outcome(self.out)
        for path in self.damaged:  # a finished run does not read which cases were whose
            if path.parent.name == "hospitals":
                for each in (expected, found):
                    each.pop(str(path.relative_to(self.out)), None)
        assert_same(expected, found)
        assert not list(self.out.rglob(f"{TEMPORARY}*"))
        kept = collections.Counter(self.forks.notes.read_text().splitlines())
        twice = [what for what, n in kept.items() if n > 1 and what.split()[0] not in self.anew]
        assert not twice, "done again, though it was on the disk"


def names(shown, path):
    """Whether a refusal names a file; of config.json it says what differs, or that it lacks."""
    of_settings = "holds a run with other settings: ", "no config.json of a run beside it"
    if path.name == "config.json" and any(words in shown for words in of_settings):
        return True
    of_test = f"{path.with_name('testing.csv')}: is not as this program left it, by training.json"
    return f"{path}: " in shown or (path.name == "training.json" and of_test in shown)


def copy(path, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)


def test_whatever_befalls_a_run_it_ends_the_same(undisturbed, forks, tmp_path, request):
    """The bits of an undisturbed run, or a refusal that names a spoilt file; no round twice."""
    kills, first = request.config.getoption("--kills"), request.config.getoption("--first-kill")
    failures = []
    for seed in range(first, first + kills):
        sequence = Sequence(seed, forks, *undisturbed, tmp_path / str(seed))
        try:
            sequence.go()
        except AssertionError as error:
            failures.append(f"sequence {seed}: {error}\n" + "\n".join(sequence.steps))
        else:
            shutil.rmtree(tmp_path / str(seed))
    assert not failures, "\n\n".join(failures)


def test_ctrl_c_and_sigterm_say_how_to_go_on(undisturbed, forks, tmp_path):
    calm, _ = undisturbed
    chosen, out = {"--arms": ("fl",), "--seeds": ("1",), "--ratios": ("all",)}, tmp_path / "out"
    training = out / "fl-all-seed1"
    for number, file in ((signal.SIGINT, "checkpoint.pt"), (signal.SIGTERM, "testing.csv")):
        command = forks.start(*flags(chosen), "--out", out)
        while not (training / file).exists():
            time.sleep(0.001)
        os.kill(command.pid, number)
        code, shown = command.end()
        assert code == 130
        assert shown.splitlines()[-1] == "fedgin.py: stopped; the same command goes on"
        assert "Traceback" not in shown
        assert not (training / "scores.csv").exists()
    code, _ = forks.start(*flags(chosen), "--out", out).end()
    assert code == 0
    of_calm = {k: v for k, v in outcome(calm).items() if k.startswith(training.name)}
    assert_same(of_calm, {k: v for k, v in outcome(out).items() if k.startswith(training.name)})
