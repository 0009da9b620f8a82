"""What a person sees: what a run is, where it is, and the line that says what ended it."""

import contextlib
import dataclasses
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from federated import Client
from scans.files import DataError
from scans.machine import is_out_of_memory
from study.config import Checkpoint, Config, Round, Training
from study.hospitals import Hospital, validation_cases
from study.results import TrainingFolder

# Ends with a line that says what to do; any other exception is a bug and keeps its traceback.
FORESEEN = (DataError, FloatingPointError, OSError)


def count_steps(
    folder: TrainingFolder, names: Collection[str], hospitals: Sequence[Hospital]
) -> int:
    """Batches to train on and cases to segment until a training is finished.

    names: of the hospitals that train.
    """
    config = folder.config
    rounds = range(len(folder.history()) + 1, config.rounds + 1)
    n_validations = sum(config.is_validated(round_) for round_ in rounds)
    modalities = [hospital.modality for hospital in hospitals if hospital.name in names]
    n_val = len(validation_cases(folder.training.seed, hospitals, modalities))
    n_test = sum(len(hospital.test) for hospital in hospitals) - folder.n_tested()
    return len(rounds) * config.local_steps * len(names) + n_validations * n_val + n_test


class Watched:
    """Items that count as a step each time one of them has been worked on."""

    def __init__(self, items: Iterable[Any], progress: "Progress", place: str) -> None:
        self.items, self.progress, self.place = items, progress, place

    def __iter__(self) -> Iterator[Any]:
        self.progress.show_place(self.place)
        for item in self.items:
            yield item
            self.progress.step()


class Progress:
    """How much of a run's work is done: one bar on a terminal, one line per round elsewhere.

    A step is a batch to train on or a case to segment; `steps` are those of each training.
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self.steps, self.total, self.done = steps, sum(steps.values()), 0
        self.n_begun, self.began = 0, time.monotonic()
        self.name = self.place = ""
        self.failed: list[str] = []  # why attempts have failed
        self.bar = tqdm(
            total=self.total,
            bar_format="{desc} |{bar}| {remaining} left{postfix}",
            smoothing=0,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def watch(self, items: Iterable[Any], place: str = "") -> Watched:
        """The same items; each that has been worked on is a step."""
        return Watched(items, self, place)

    def watch_clients(self, clients: Mapping[str, Client], rounds: int) -> dict[str, Client]:
        """The same clients, whose batches are steps."""

        def watched(client: Client) -> Client:
            def batches(round_: int) -> Iterable:
                return self.watch(client.batches(round_), f"round {round_} of {rounds}")

            return client._replace(batches=batches)

        return {name: watched(client) for name, client in clients.items()}

    def step(self) -> None:
        self.done += 1
        self.bar.update()

    def show_place(self, place: str) -> None:
        self.place = place or self.place
        self.bar.set_description_str(f"{self.name}, {self.place}".replace(" of ", "/"))

    def show_round(self, done: Round) -> None:
        """Show loss and validation Dice of a round, beside the bar or in a line of its own."""
        dices = [f"{m.upper()} {dice:.2f}" for m, dice in done.val_dice.items()]
        self.bar.set_postfix_str(", ".join(dices))  # in 100 columns
        if self.bar.disable:
            loss = sum(done.losses.values()) / len(done.losses)
            figures = ", ".join([f"loss {loss:.2f}", *dices])
            a_step = (time.monotonic() - self.began) / max(self.done, 1)
            left = tqdm.format_interval(a_step * max(self.total - self.done, 0))
            self.say(f"{self.name}, {self.place}: {figures}; {left} left")

    def show_choice(self, reached: Checkpoint) -> None:
        """Say whose round's weights are kept at the end of a training."""
        chosen = (
            f"the weights of round {reached.best_round}, validation Dice {reached.best_dice:.2f}"
        )
        if math.isnan(reached.best_dice):
            chosen = "no validation case holds an organ; the last weights"
        self.say(f"{self.name}: {chosen} are kept")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Do a training. If it fails foreseeably, say so and let the next one follow."""
        self.n_begun += 1
        self.name, before = f"training {self.n_begun} of {len(self.steps)} ({name})", self.done
        try:
            yield
        except Exception as error:
            error.add_note(name)
            if not is_foreseen(error):
                raise
            self.failed.append(explain(error))
            self.say(f"FAILED: {self.failed[-1]}")
        # What others have done, or what has failed, is no longer to be done here.
        self.total -= self.steps[name] - (self.done - before)
        self.bar.total = self.total

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


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
    by_seed: Mapping[int, Sequence[Hospital]],
    chosen: Mapping[Training, Mapping[str, Sequence]],
) -> str:
    """Who holds, and who trains on how many cases; chosen: {training: {hospital: its cases}}."""
    lines = [
        f"{h.name}: {len(h.train)} cases to train, {len(h.val)} to validate, {len(h.test)} to test"
        for hospitals in by_seed.values()
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
