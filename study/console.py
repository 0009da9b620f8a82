"""What a person sees: what a run is, where it is, and the line that says what ended it."""

import contextlib
import dataclasses
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

from federated import Client
from scans.files import DataError
from scans.machine import is_out_of_memory
from study.config import Best, Config, Round, Training
from study.hospitals import Hospital

Item = TypeVar("Item")
# Ends with a line that says what to do; any other exception is a bug and keeps its traceback.
FORESEEN = (DataError, FloatingPointError, OSError)


class Watched(Generic[Item]):
    """Items that count a step each time one of them has been worked on."""

    def __init__(self, items: Iterable[Item], progress: "Progress", what: str) -> None:
        self.items, self.progress, self.what = items, progress, what

    def __iter__(self) -> Iterator[Item]:
        self.progress.show_place(self.what)
        for item in self.items:
            yield item
            self.progress.step()


class Progress:
    """How much of a run's work is done: one bar on a terminal, a line a round elsewhere.

    A step is a batch to train on or a case to segment.
    """

    def __init__(self, total: int, n_trainings: int = 1) -> None:
        form = "{desc} |{bar}| {remaining} left{postfix}"
        self.total, self.done, self._began = total, 0, time.monotonic()
        self.n_trainings, self.n_begun = n_trainings, 0
        self.name = self._what = ""
        self.failed: list[str] = []  # what attempts have failed
        self.on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            bar_format=form,
            smoothing=0,
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )

    def watch(self, items: Iterable[Item], what: str = "") -> Iterable[Item]:
        """The same items; each that has been worked on is a step."""
        return Watched(items, self, what)

    def watch_training(
        self, clients: Mapping[str, Client], held_out: Iterable[Item], rounds: int
    ) -> tuple[dict[str, Client], Iterable[Item]]:
        """The same clients and validation cases, whose batches and cases are steps."""

        def watched(client: Client) -> Client:
            def batches(round_: int) -> Iterable:
                return self.watch(client.batches(round_), f"round {round_} of {rounds}")

            return client._replace(batches=batches)

        return {name: watched(client) for name, client in clients.items()}, self.watch(held_out)

    def step(self) -> None:
        self.done += 1
        self._bar.update()

    def show_place(self, what: str) -> None:
        self._what = what or self._what
        self._bar.set_description_str(self._place().replace(" of ", "/"))

    def _place(self) -> str:
        return ", ".join(filter(None, [self.name, self._what]))

    def show_round(self, done: Round) -> None:
        """Show loss and validation Dice of a round, beside the bar or in a line of its own."""
        dices = [f"{m.upper()} {dice:.2f}" for m, dice in done.val_dice.items()]
        if self.on_terminal:  # in 100 columns
            self._bar.set_postfix_str(", ".join(dices))
        else:
            loss = sum(done.losses.values()) / len(done.losses)
            left = tqdm.format_interval(self.seconds_left())
            figures = ", ".join([f"loss {loss:.2f}", *dices])
            self.say(f"{self._place()}: {figures}; {left} left")

    def show_choice(self, best: Best) -> None:
        """Say whose round's weights are kept at the end of a training."""
        chosen = f"the weights of round {best.round}, validation Dice {best.val_dice:.2f}"
        if math.isnan(best.val_dice):
            chosen = "no validation case holds an organ; the last weights"
        self.say(f"{self.name}: {chosen} are kept")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def seconds_left(self) -> float:
        """How long the steps to come take if they take as long as those so far."""
        a_step = (time.monotonic() - self._began) / max(self.done, 1)
        return a_step * max(self.total - self.done, 0)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Do a part of a run. If it fails foreseeably, say so and let the next part follow."""
        self.n_begun += 1
        self.name = f"training {self.n_begun} of {self.n_trainings} ({name})"
        try:
            yield
        except Exception as error:
            error.add_note(name)
            if not is_foreseen(error):
                raise
            self.failed.append(explain(error))
            self.say(f"FAILED: {self.failed[-1]}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def describe(config: Config, device: torch.device) -> str:
    """What a run is, for the reader's eyes: its data first, then every setting."""
    first = "FedGIN on scans"
    if config.on_phantoms:
        first = (
            "FedGIN on PHANTOMS: without --ct and --mri it trains on synthetic volumes, whose "
            "figures say nothing about patients"
        )
    settings = [
        f"  {key:16} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in dataclasses.asdict(config).items()
        if value not in ((), "", None)
    ]
    return "\n".join([first, *settings, f"  {'device':16} {device}, torch {torch.__version__}"])


def describe_hospitals(
    hospitals: Iterable[Hospital], chosen: Mapping[Training, Mapping[str, Sequence]]
) -> str:
    """Who holds, and who trains on how many cases; chosen: {training: {hospital: its cases}}."""
    lines = [
        f"{h.name}: {len(h.train)} cases to train, {len(h.val)} to validate, {len(h.test)} to test"
        for h in hospitals
    ]
    for training, by_hospital in chosen.items():
        shares = ", ".join(f"{name} {len(cases)}" for name, cases in by_hospital.items())
        lines.append(f"{training.label + ':':27} training cases: {shares}")
    return "\n".join(dict.fromkeys(lines))  # seeds have the same shares


def is_foreseen(error: BaseException) -> bool:
    return isinstance(error, FORESEEN) or is_out_of_memory(error)


def explain(error: BaseException) -> str:
    """An error in a line, behind the notes that say where it was."""
    notes = [f"{note}: " for note in reversed(getattr(error, "__notes__", []))]
    return "".join([*notes, str(error)])


def run_command(name: str, work: Callable[[], int | None], hint: str = "") -> int:
    """Do a command's work and return its exit code; one line says what ended it, if something did.

    2 for bad input, 1 for a run that failed, 130 for one that was stopped. Any other exception is a
    bug, which keeps its traceback. hint: how to go on.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's & has SIGINT ignored
            signal.signal(number, signal.default_int_handler)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, DataError) and not getattr(error, "__notes__", []):
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        if not is_foreseen(error):
            raise
        print(f"{name}: the run failed: {explain(error)}{hint}", file=sys.stderr)
        return 1


def use_any_characters() -> None:
    """Let the streams print what a terminal cannot show, names of files that are no UTF-8 too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
