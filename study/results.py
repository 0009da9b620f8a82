"""A run is a folder of trainings: what is in it, and the tables made of it.

    config.json                 what all trainings share; its hash is the run's id
    hospitals/NAME-seedN.json   which case of each hospital went where, and what its files were
    results.md                  the tables; like scores.csv and history.csv, made of the trainings'
    fedgin-1-5-p1-seed42/       a training, see trainings.py

Nothing is removed or merged: what is not there is to be done. Files are whole or absent.
"""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scans import files
from scans.files import DataError
from study import tables
from study.config import Config, Training
from study.hospitals import Hospital, validation_cases
from study.trainings import ELSEWHERE, TrainingFolder, environment

MADE_BY = {"made by": "fedgin.py", "format": 3}
NOT_SHARED = ("arms", "ratios", "gin_probability", "seeds", "out", "cache", "no_cache")
OWNED = (
    "history.csv",
    "scores.csv",
    "results.md",
    "hospitals",
    "predictions.json",
    "*/training.json",
)
FOLDERS = ("ct", "mri", "test")  # settings that name folders, however they are written


class RunFolder:
    """Of a run: which of its trainings are finished, and the folders of all."""

    def __init__(self, config: Config, order: Sequence[str]) -> None:
        """order: all arms there are, as rows of tables follow one another.

        Raises DataError for a folder of something else, and for a run with other settings.
        """
        self.config, self.out, self.order = config, Path(config.out), order
        fields = dataclasses.asdict(config)
        settings = {key: value for key, value in fields.items() if key not in NOT_SHARED}
        settings |= {k: [str(Path(folder).resolve()) for folder in settings[k]] for k in FOLDERS}
        self.settings = json.loads(json.dumps({**MADE_BY, **settings}))
        self.id = files.sha256(files.to_json(self.settings))
        self._compare_settings()

    def _compare_settings(self) -> None:
        path = self.out / "config.json"
        if not path.exists():
            for name in OWNED:  # without config.json they are somebody else's
                for foreign in self.out.glob(name):
                    what = "is there, and no config.json of a run beside it"
                    raise DataError(f"{foreign}: {what}; {ELSEWHERE}")
            files.check_writable(self.out)
            return
        kept = files.read_json(path)
        if kept.get("made by") != MADE_BY["made by"]:
            what = (
                "is of version 1, which must end it" if "gin_probability" in kept else "is no run's"
            )
            raise DataError(f"{path}: {what}; {ELSEWHERE}")
        if kept != self.settings and self._any_begun():
            raise DataError(f"{self.out}: {_differences(kept, self.settings)}, or {ELSEWHERE}")

    def _any_begun(self) -> bool:
        return any(True for _ in self.out.glob("*/training.json"))

    def open(self, records: Iterable[dict]) -> None:
        """Write what all trainings share, or compare it with what is there.

        records: of each hospital and seed, "hospital", "seed", "cases" by split, and their "files".
        Raises DataError, naming what differs.
        """
        hospitals = self.out / "hospitals"
        with files.lock(self.out / "lock", wait=True):
            self._compare_settings()
            files.write(self.out / "config.json", files.to_json(self.settings))
            hospitals.mkdir(exist_ok=True)
            seeds = {folder.training.seed for folder in self.begun()}
            paths = [path for seed in seeds for path in hospitals.glob(f"*-seed{seed}.json")]
            kept = {path: files.read_json(path) for path in sorted(paths)}
            for record in json.loads(json.dumps(list(records))):
                own = hospitals / f"{record['hospital']}-seed{record['seed']}.json"
                for path, other in kept.items():
                    with files.blaming(path, ELSEWHERE):
                        if path == own or other["hospital"] == record["hospital"]:
                            _compare_records(other, record, same_seed=path == own)
                if own not in kept:
                    files.write(own, files.to_json(record), root=self.out)

    def folder(self, training: Training) -> TrainingFolder:
        return TrainingFolder(self.config, self.id, training)

    def unfinished(self, trainings: Iterable[Training]) -> list[Training]:
        return [training for training in trainings if not self.folder(training).is_finished()]

    def take(self, trainings: Sequence[Training]) -> Iterator[TrainingFolder]:
        """The folder of each training in turn that is unfinished and that nobody holds, held.

        After each of them the tables are written anew.
        """
        for training in trainings:
            folder = self.folder(training)
            with contextlib.ExitStack() as stack:
                # Not while another process looks who holds it, and holds it for that moment.
                with files.lock(self.out / "lock", wait=True):
                    held = stack.enter_context(files.lock(folder.path / "lock"))
                if not held or folder.is_finished():
                    continue
                yield folder
            self.report(trainings)

    def count_steps(
        self, chosen: Mapping[Training, Collection[str]], by_seed: Mapping[int, Sequence[Hospital]]
    ) -> int:
        """Batches to train on and cases to segment until all is done; see console.Progress.

        chosen: {training: the hospitals that train}.
        """
        config, total = self.config, 0
        for training, names in chosen.items():
            hospitals, folder = by_seed[training.seed], self.folder(training)
            rounds = range(folder.checkpoint().round + 1, config.rounds + 1)
            n_validations = sum(config.is_validated(round_) for round_ in rounds)
            modalities = [hospital.modality for hospital in hospitals if hospital.name in names]
            n_val = len(validation_cases(training.seed, hospitals, modalities))
            total += len(rounds) * config.local_steps * len(names) + n_validations * n_val
            total += sum(len(hospital.test) for hospital in hospitals) - folder.n_tested()
        return total

    def begun(self) -> list[TrainingFolder]:
        """Of all trainings that have begun, by arm, ratio, p and seed."""

        def rank(folder: TrainingFolder) -> tuple:
            training = folder.training
            return self.order.index(training.arm), training.ratio, -(training.p or 0), training.seed

        folders = []
        for path in self.out.glob("*/training.json"):
            about = files.read_json(path)
            with files.blaming(path, ELSEWHERE):
                folders.append(self.folder(Training(**about["training"])))
                if folders[-1].path != path.parent or about["training"]["arm"] not in self.order:
                    raise ValueError("it is of another training or version")
        return sorted(folders, key=rank)

    def describe(self, trainings: Sequence[Training]) -> str:
        """What is there of the trainings: how many are finished, and how far the others are."""
        left = self.unfinished(trainings)
        lines = [f"{self.out}: {len(trainings) - len(left)} of {len(trainings)} trainings finished"]
        for folder in map(self.folder, left):
            reached = folder.checkpoint().round
            if folder.is_trained():
                lines.append(f"{folder.name}, in its test")
            elif reached:
                lines.append(f"{folder.name}, in round {reached + 1} of {self.config.rounds}")
        if not left:
            last = max(self.folder(t).about["finished"] for t in trainings)
            versions = {self.folder(t).about["trained on"][-1]["version"] for t in trainings}
            lines.append(f"the last one on {last}, by version {' and '.join(sorted(versions))}")
        return ", ".join(lines)

    def report(self, trainings: Iterable[Training]) -> str:
        """Write results.md, scores.csv and history.csv; return what is for the screen."""
        with files.lock(self.out / "lock", wait=True):
            begun, organs = self.begun(), self.config.organs
            done = [folder for folder in begun if folder.is_finished()]
            scores = [score for folder in done for score in folder.scores()]
            left = {folder.training for folder in begun} | {*trainings}
            left -= {folder.training for folder in done}
            title = self._title(done, len(left))
            remarks = "\n".join([*self._elsewhere(left), *_remarks(done)])
            shown = "\n\n".join(filter(None, [title, tables.screen(scores, organs), remarks]))
            cases = [f"    {folder.name}: {folder.about['cases']}" for folder in done]
            text = [shown, tables.details(scores, organs), "Training cases:", "\n".join(cases)]
            files.write_rows(self.out / "scores.csv", scores, tables.SCORE)
            rows = [row for folder in begun for row in folder.history()]
            files.write_rows(self.out / "history.csv", rows)
            files.write(self.out / "results.md", files.to_bytes("\n\n".join(text) + "\n"))
        return f"{shown}\n\nAll tables: {self.out / 'results.md'}"

    def _title(self, done: Sequence[TrainingFolder], n_left: int) -> str:
        seeds = " ".join(dict.fromkeys(str(folder.training.seed) for folder in done))
        source = "scans"
        if self.config.on_phantoms:
            source = "PHANTOMS (synthetic volumes, not patients)"
        left = f"; NOT FINISHED: {n_left} trainings" if n_left else ""
        return f"## Test Dice, {self.config.scenario} scenario, seeds {seeds}: {source}{left}"

    def _elsewhere(self, trainings: Iterable[Training]) -> list[str]:
        """Which trainings other processes are at work on."""
        lines = []
        for folder in map(self.folder, trainings):
            holder = files.holder(folder.path / "lock")
            if holder:
                lines.append(f"under way elsewhere: {folder.name} ({holder})")
        return sorted(lines)


def _remarks(done: Iterable[TrainingFolder]) -> list[str]:
    """In what finished trainings differ that should be alike, and whose models are gone."""
    lines = []
    for key in environment(torch.device("cpu")):
        values = sorted({str(where[key]) for place in done for where in place.about["trained on"]})
        if len(values) > 1:
            lines.append(f"NOTE: trainings differ in {key}: {', '.join(values)}")
    lines += [f"NOTE: the model of {p.name} is gone" for p in done if not p.is_trained()]
    return lines


def _differences(kept: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    differ = [
        f"{key} {_shown(kept.get(key))}, now {_shown(settings.get(key))}"
        for key in sorted({*kept, *settings})
        if kept.get(key) != settings.get(key)
    ]
    why = "; rounds cannot be added, as the learning rate falls to 0 over those planned"
    more = why if kept.get("rounds") != settings.get("rounds") else ""
    return f"holds a run with other settings: {'; '.join(differ)}{more}. Give its own settings"


def _compare_records(kept: Mapping[str, Any], now: Mapping[str, Any], same_seed: bool) -> None:
    """Raise DataError for a hospital whose files or cases are others than before."""
    changed = [i for i, stamps in now["files"].items() if kept["files"].get(i, stamps) != stamps]
    if changed:
        raise DataError(f"files of {now['hospital']} have changed: {', '.join(changed)}")
    if same_seed and kept["cases"] != now["cases"]:
        raise DataError(f"{now['hospital']} has other cases, or splits them otherwise")
    if same_seed and kept != now:
        raise DataError(f"it is no longer the record of {now['hospital']}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
