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

pytestmark = pytest.mark.slow
SMALL = ["--rounds", "3", "--local-steps", "1", "--batch-size", "1", "--patch", "16"]
SMALL += ["--width", "2", "--depth", "2", "--organs", "liver", "spleen", "--ratios", "all"]
SMALL += ["--gin-probability", "1"]
ALL = {"--arms": ("fl", "fedgin"), "--seeds": ("1", "2")}
ENDS = {signal.SIGKILL: -9, signal.SIGINT: 130}  # exit codes


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as found:
        yield found


def flags(chosen):
    return [*SMALL, *itertools.chain.from_iterable((flag, *chosen[flag]) for flag in chosen)]


@pytest.fixture(scope="module")
def undisturbed(forks, tmp_path_factory):
    """What a run of everything leaves."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    code, shown = forks.start(*flags(ALL), "--out", out).end()
    assert code == 0, shown
    assert len(list(out.glob("*/scores.json"))) == 4
    return outcome(out)


class Sequence:
    """What befalls a run, drawn from a seed."""

    def __init__(self, seed, forks, out):
        self.draw, self.forks, self.out = random.Random(seed), forks, out
        self.steps = []  # for whoever must look for a mistake
        self.damaged = {}  # what the files were that have been spoilt
        self.anew = set()  # folders of trainings that may begin anew
        forks.notes.unlink(missing_ok=True)

    def start(self, chosen, stop=None):
        self.steps.append(f"{' '.join(flags(chosen)[len(SMALL) :])} {stop or ''}")
        return self.forks.start(*flags(chosen), "--out", self.out, stop=stop)

    def run(self):
        """One command or two at once, each for some of the trainings; most are stopped.

        They stop at a step on the disk: between two of them it is as it is before the second.
        """
        started = []
        for _ in range(self.draw.choice((1, 1, 2))):
            number = self.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, None))
            stop = (int(10 ** self.draw.uniform(0, 2.7)), number) if number else None
            chosen = {f: self.draw.sample(ALL[f], self.draw.randint(1, 2)) for f in ALL}
            started.append((self.start(chosen, stop), {0, ENDS.get(number, 0)}))
        self.end(started)

    def end(self, started):
        """Whether all commands end as they were made to; others must name a file that is spoilt."""
        to_mend = set()
        for command, expected in started:
            code, shown = command.end()
            self.steps.append(f"→ {code}")
            if code not in expected:
                self.steps.append(shown)
                assert code == 1, "an unexpected end"
                assert "Traceback" not in shown
                named = {path for path in self.damaged if f"{path}: cannot be read (" in shown}
                assert named, "no spoilt file is named"
                to_mend |= named
        for path in sorted(to_mend):
            self.mend(path)
        return not to_mend

    def damage(self):
        """Cut off, or flip a bit of, a file that a training will go on from."""
        found = [
            path
            for path in sorted(self.out.rglob("*.pt"))
            if path not in self.damaged and not (path.parent / "scores.json").exists()
        ]
        if not found:
            return
        path, flip = self.draw.choice(found), self.draw.random() < 0.5
        content = path.read_bytes()
        place, bit = self.draw.randrange(len(content)), 1 << self.draw.randrange(8)
        self.steps.append(f"damage {path.relative_to(self.out)} at {place}, bit {flip and bit}")
        self.damaged[path] = content
        rest = bytes([content[place] ^ bit]) + content[place + 1 :] if flip else b""
        path.write_bytes(content[:place] + rest)

    def mend(self, path):
        """Bring a file back, or delete the training's folder: it is trained anew."""
        content = self.damaged.pop(path)
        if self.draw.random() < 0.5:
            shutil.rmtree(path.parent)
            self.anew.add(path.parent.name)
        else:
            path.write_bytes(content)
        self.steps.append(f"mend {path.relative_to(self.out)}: {path.exists()}")

    def go(self, calm):
        """Play the sequence, let it come to its end, and compare."""
        for _ in range(self.draw.randint(3, 7)):
            self.draw.choice((self.run, self.run, self.damage))()
        well = False
        while not well:
            started = [self.start(ALL) for _ in range(self.draw.choice((1, 2)))]
            well = self.end([(command, {0}) for command in started])
        assert_same(calm, outcome(self.out))
        kept = collections.Counter(self.forks.notes.read_text().splitlines())
        twice = [what for what, n in kept.items() if n > 1 and what.split()[0] not in self.anew]
        assert not twice, "done again, though it was on the disk"


def test_whatever_befalls_a_run_it_ends_the_same(undisturbed, forks, tmp_path, request):
    """The bits of an undisturbed run, or a refusal that names a spoilt file; no round twice."""
    kills, first = request.config.getoption("--kills"), request.config.getoption("--first-kill")
    failures = []
    for seed in range(first, first + kills):
        sequence = Sequence(seed, forks, tmp_path / str(seed))
        try:
            sequence.go(undisturbed)
        except AssertionError as error:
            failures.append(f"sequence {seed}: {error}\n" + "\n".join(sequence.steps))
        else:
            shutil.rmtree(tmp_path / str(seed))
    assert not failures, "\n\n".join(failures)


def test_ctrl_c_and_sigterm_say_how_to_go_on(undisturbed, forks, tmp_path):
    chosen, out = {"--arms": ("fl",), "--seeds": ("1",)}, tmp_path / "out"
    training = out / "fl-all-seed1"
    for number, file in ((signal.SIGINT, "checkpoint.pt"), (signal.SIGTERM, "testing.json")):
        command = forks.start(*flags(chosen), "--out", out)
        while not (training / file).exists():
            time.sleep(0.001)
        os.kill(command.pid, number)
        code, shown = command.end()
        assert code == 130
        assert shown.splitlines()[-1] == "fedgin.py: stopped; repeat the command to continue"
        assert "Traceback" not in shown
        assert not (training / "scores.json").exists()
    code, _ = forks.start(*flags(chosen), "--out", out).end()
    assert code == 0
    calm, found = (
        {name: content for name, content in run.items() if name.startswith(training.name)}
        for run in (undisturbed, outcome(out))
    )
    assert_same(calm, found)
