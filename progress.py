"""Where a run is, on the screen: one bar on a terminal, a line a round in a pipe or a log file.

from progress import Progress
with Progress(total=200) as progress:  # steps of the whole run, of which the time left follows
    for batch in progress.watch(batches, "arm 1 of 2, round 1"):
        ...
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from arms import choose_cases, find_arm, label_arms, taking_part
from config import Config
from hospitals import Hospital, validation_cases

Item = TypeVar("Item")


class Progress:
    """How much of a run's work is done; a step is a batch to train on or a case to segment."""

    def __init__(self, total: int) -> None:
        form = "{desc} |{bar}| {remaining} left{postfix}"
        self.total, self.done, self._began = total, 0, time.monotonic()
        self.name = self._place = ""
        self.watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, bar_format=form, smoothing=0, dynamic_ncols=True, disable=not self.watched
        )

    def watch(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """The same items; each that has been worked on is a step."""
        self._place = f"{self.name}, {what}" if self.name else what
        self._bar.set_description_str(self._place.replace(" of ", "/"))
        for item in items:
            yield item
            self.done += 1
            self._bar.update()

    def show_round(self, row: Mapping[str, Any]) -> None:
        """Show a round's line of the history, beside the bar or in a line of its own."""
        columns = {"loss": "loss", "val_dice_mri": "MRI", "val_dice_ct": "CT"}
        figures = [f"{name} {row[key]:.2f}" for key, name in columns.items() if row[key] != ""]
        if self.watched:
            self._bar.set_postfix_str(", ".join(figures[1:] or figures))  # in 100 columns
        else:
            left = tqdm.format_interval(self.seconds_left())
            self.say(f"{self._place}: {', '.join(figures)}; {left} left")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def seconds_left(self) -> float:
        """How long the steps to come take if they take as long as those so far."""
        a_step = (time.monotonic() - self._began) / max(self.done, 1)
        return a_step * max(self.total - self.done, 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def name_training(config: Config, state: dict) -> str:
    """Which of a run's trainings this is."""
    labels, seeds = list(label_arms(config)), config.seeds
    name = f"arm {labels.index(state['arm']) + 1} of {len(labels)} ({state['arm']})"
    if len(seeds) > 1:
        name += f", seed {seeds.index(state['seed']) + 1} of {len(seeds)}"
    return name


def count_steps(config: Config, state: dict, hospitals: Sequence[Hospital]) -> int:
    """Batches to train on and cases to segment from a training's state to the end of its test."""
    arm, start = find_arm(config, state["arm"]), state["round"]
    a_round = sum(steps for _, steps in choose_cases(config, arm, hospitals).values())
    n_val = len(validation_cases(state["seed"], taking_part(arm, hospitals)))
    every = config.val_every
    validations = math.ceil(config.rounds / every) - start // every
    n_test = sum(len(hospital.test) for hospital in hospitals)
    return (config.rounds - start) * a_round + validations * n_val + n_test
