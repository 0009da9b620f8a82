"""What the user sees: what a run is, how far it is, and the line that says what ended it."""

import contextlib
import dataclasses
import io
import math
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from federated import Client
from scans.files import DataError
from scans.machine import is_out_of_memory
from study.config import Checkpoint, Config, Round, Training
from study.hospitals import Hospital, validation_cases
from study.results import TrainingFolder


def count_steps(folder: TrainingFolder, chosen: Mapping, everyone: Sequence[Hospital]) -> int:
    """Batches and cases until a training is finished; chosen: {hospital that trains: its cases}."""
    config = folder.config
    rounds = range(len(folder.history()) + 1, config.rounds + 1)
    modalities = [hospital.modality for hospital in everyone if hospital.name in chosen]
    n_val = len(validation_cases(folder.training.seed, everyone, modalities))
    n_test = sum(len(hospital.test) for hospital in everyone) - folder.n_tested()
    n_batches = len(rounds) * config.local_steps * len(chosen)
    return n_batches + n_val * sum(map(config.is_validated, rounds)) + n_test


@dataclasses.dataclass
class Watched:
    """Items that move the bar, by one step after each."""

    items: Iterable[Any]
    progress: "Progress"
    place: str

    def __iter__(self) -> Iterator[Any]:
        self.progress.show_place(self.place)
        for item in self.items:
            yield item
            self.progress.bar.update()


class Progress(contextlib.AbstractContextManager):
    """How far a training is: a bar on a terminal, one line per round elsewhere.

    `steps` has the batches and cases of each training. Time left is that of the training at hand,
    because other processes may do those that follow.
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self.steps, self.n_begun = steps, 0
        self.name = self.place = ""
        self.failed: list[str] = []  # why attempts have failed
        self.on_terminal = sys.stderr.isatty()
        form, where = "{desc} |{bar}| {remaining} left{postfix}", {"file": sys.stderr}
        if not self.on_terminal:
            form, where = "{remaining} left", {"file": io.StringIO(), "mininterval": math.inf}
        total = sum(steps.values())
        self.bar = tqdm(total=total, bar_format=form, smoothing=0, dynamic_ncols=True, **where)

    def watch(self, items: Iterable[Any], place: str = "") -> Watched:
        """The same items; each that has been worked on moves the bar."""
        return Watched(items, self, place)

    def watch_clients(self, clients: Mapping[str, Client], rounds: int) -> dict[str, Client]:
        """The same clients, whose batches move the bar."""

        def watched(client: Client) -> Client:
            def batches(round_: int) -> Iterable:
                return self.watch(client.batches(round_), f"round {round_} of {rounds}")

            return client._replace(batches=batches)

        return {name: watched(client) for name, client in clients.items()}

    def show_place(self, place: str) -> None:
        self.place = place or self.place
        self.bar.set_description_str(f"{self.name}, {self.place}".replace(" of ", "/"))

    def show_round(self, done: Round) -> None:
        """Show loss and validation Dice of a round, beside the bar or on its own line."""
        dices = [f"{m.upper()} {dice:.2f}" for m, dice in done.val_dice.items()]
        self.bar.set_postfix_str(", ".join(dices))  # in 100 columns
        if not self.on_terminal:
            loss = sum(done.losses.values()) / len(done.losses)
            figures = ", ".join([f"loss {loss:.2f}", *dices])
            print(f"{self.name}, {self.place}: {figures}; {self.bar}", file=sys.stderr)

    def show_choice(self, reached: Checkpoint) -> None:
        """Say which round's weights are kept at the end of a training."""
        kept = f"the weights of round {reached.best_round}, validation Dice {reached.best_dice:.2f}"
        if math.isnan(reached.best_dice):
            kept = "no validation case holds an organ; the last weights"
        tqdm.write(f"{self.name}: {kept} are kept", file=sys.stderr)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Do a training; see the function attempt."""
        self.n_begun += 1
        self.name = f"training {self.n_begun} of {len(self.steps)} ({name})"
        self.bar.desc, self.bar.postfix = self.name.replace(" of ", "/"), ""
        self.bar.reset(self.steps[name])
        with attempt(name, self.failed):
            yield
        self.bar.total = self.bar.n  # though it failed, or another process did it

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextlib.contextmanager
def attempt(name: str, failed: list[str]) -> Iterator[None]:
    """Do a part of the work; if it fails in a foreseen way, print and record why, and continue."""
    try:
        yield
    except Exception as error:
        error.add_note(name)
        if not is_foreseen(error):
            raise
        failed.append(explain(error))
        tqdm.write(f"FAILED: {failed[-1]}", file=sys.stderr)


def describe(config: Config, device: torch.device) -> str:
    """What a run is: its data first, then every setting."""
    first = "FedGIN on scans"
    if config.on_phantoms:
        first = "FedGIN on PHANTOMS (no --ct, no --mri): its figures say nothing about patients"
    settings = {**dataclasses.asdict(config), "device": f"{device}, torch {torch.__version__}"}
    lines = [
        f"  {key:16} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in settings.items()
        if value not in ((), "", None)
    ]
    return "\n".join([first, *lines])


def describe_hospitals(
    by_seed: Mapping[int, Sequence[Hospital]], chosen: Mapping[Training, Mapping[str, Sequence]]
) -> str:
    """Who holds and who trains on how many cases; chosen: {training: {hospital: its cases}}."""
    lines = [
        f"{h.name}: {len(h.train)} cases to train, {len(h.val)} to validate, {len(h.test)} to test"
        for hospitals in by_seed.values()
        for h in hospitals
    ]
    for training, by_hospital in chosen.items():
        numbers = ", ".join(f"{name} {len(cases)}" for name, cases in by_hospital.items())
        n = Counter(case.modality for cases in by_hospital.values() for case in cases)
        ratio = training.ratio.removeprefix("1:")
        if ratio.isdecimal() and n["ct"] < n["mri"] * int(ratio):
            numbers += f" (WARNING: not {training.ratio}, because there are no more CT cases)"
        lines.append(f"{training.label + ':':27} training cases: {numbers}")
    return "\n".join(dict.fromkeys(lines))  # once for all seeds


def is_foreseen(error: BaseException) -> bool:
    """Whether a line can say what to do; any other error is a bug and keeps its traceback."""
    return isinstance(error, (DataError, FloatingPointError, OSError)) or is_out_of_memory(error)


def explain(error: BaseException) -> str:
    """An error in one line, after the notes that say where it was."""
    notes = [f"{note}: " for note in reversed(getattr(error, "__notes__", []))]
    return "".join([*notes, str(error) or repr(error)])


def run_command(name: str, work: Callable[[], int | None], hint: str = "") -> int:
    """Do a command's work and return its exit code; one line says what ended it, if something did.

    2 for bad input, 1 for a run that failed, 130 for one that was stopped. Any other exception is a
    bug, which keeps its traceback. hint: how to continue.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's & makes Python ignore SIGINT
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
    """Let the streams print what a terminal cannot show, such as file names that are not UTF-8."""
    sys.stderr = sys.stderr or io.StringIO()  # None after 2>&-
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
