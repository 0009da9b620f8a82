"""A run is a folder of trainings: what is in it, and the tables made of it.

docs/runs.md lists the files. Each is whole or absent; one that is missing was not made yet.
"""

import contextlib
import csv
import dataclasses
import io
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import NORMALIZATION
from scans import files
from scans.cases import PreparedCase
from scans.files import DataError
from study import tables
from study.config import VERSION, Checkpoint, Config, Round, Training
from study.hospitals import Hospital, record

MADE_BY = {"made by": "fedgin.py", "format": 4}
NOT_SHARED = ("arms", "ratios", "gin_probability", "seeds", "out", "cache")
FOLDERS = ("ct", "mri", "test")  # settings that name folders, which may be moved
OWNED = ("history.csv", "scores.csv", "results.md", "predictions.json", "*/training.json")
OF_MODELS = ("organs", "spacing", "patch", "width", "depth")  # settings that predictions need
ROOT = Path(__file__).parent.parent
MODULES = ("data", "evaluate", "federated", "fedgin", "gin", "unet3d")


class TrainingFolder:
    """The folder of one training. Only the process that holds it may write (see RunFolder.hold)."""

    def __init__(self, config: Config, training: Training) -> None:
        self.config, self.training = config, training
        self.path = Path(config.out) / training.folder
        self.name = f"{training.label}, seed {training.seed}"

    def is_finished(self) -> bool:
        return (self.path / "scores.json").exists()

    def is_trained(self) -> bool:
        return (self.path / "model.pt").exists()

    def begin(self, n_cases: Mapping[str, float], device: torch.device) -> None:
        """Note, once, what is trained, on how many cases of each hospital, and where."""
        path = self.path / "training.json"
        if not path.exists():
            metadata = {"training": dataclasses.asdict(self.training), "cases": dict(n_cases)}
            files.write(path, files.to_json({**metadata, "environment": environment(device)}))

    def metadata(self) -> dict[str, Any]:
        return files.read_json(self.path / "training.json")

    def checkpoint(self) -> Checkpoint:
        """What the training has reached; raises DataError for a damaged file."""
        path = self.path / ("model.pt" if self.is_trained() else "checkpoint.pt")
        if not path.exists():
            return Checkpoint()
        with files.reading(path):
            found = files.read_pt(path)
            found["history"] = tuple(Round(**row) for row in found["history"])
            return Checkpoint(**{f.name: found[f.name] for f in dataclasses.fields(Checkpoint)})

    def keep_round(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and the history so far."""
        files.write(self.path / "checkpoint.pt", files.to_pt(to_plain(checkpoint)))
        self._write_history(checkpoint)

    def keep_model(self, checkpoint: Checkpoint) -> None:
        """Write the best weights of a training after its last round, and the settings they need."""
        model = {name: getattr(self.config, name) for name in OF_MODELS}
        model["normalization"] = {**NORMALIZATION, "ct": self.config.ct_window}
        model["phantoms"] = self.config.on_phantoms
        content = {"arm": self.training.label, "seed": self.training.seed, "model": model}
        content |= to_plain(dataclasses.replace(checkpoint, weights=checkpoint.best_weights))
        (self.path / "testing.json").unlink(missing_ok=True)  # of a model that was removed
        files.write(self.path / "model.pt", files.to_pt(content))
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def _write_history(self, checkpoint: Checkpoint) -> None:
        rows = []
        for done in checkpoint.history:
            row = {**dataclasses.asdict(self.training), "round": done.round}
            row |= {"seconds": round(done.seconds, 2), "loss": tables.mean(done.losses.values())}
            row |= {f"val_dice_{m}": done.val_dice.get(m) for m in ("mri", "ct")}
            rows.append(row | {f"loss {name}": loss for name, loss in done.losses.items()})
        files.write(self.path / "history.csv", files.to_csv(rows))

    def history(self) -> list[dict[str, str]]:
        """A row per round, as far as the training has come."""
        path = self.path / "history.csv"
        if not path.exists():
            return []
        with files.reading(path):
            text = path.read_bytes().decode("utf-8", "surrogateescape")
            return list(csv.DictReader(io.StringIO(text, newline="")))

    def scores(self) -> list[dict[str, Any]]:
        """Of the test cases so far, one row per organ, the organs of a case in a row."""
        path = self.path / ("scores.json" if self.is_finished() else "testing.json")
        return files.read_json(path)["scores"] if path.exists() else []

    def n_tested(self) -> int:
        """How many test cases are scored."""
        return len(self.scores()) // len(self.config.organs)

    def keep_scores(self, hospital: Hospital, case: PreparedCase, scores: Mapping) -> None:
        """Add the scores of a test case, {organ: what score_case gives}."""
        of_case = {**dataclasses.asdict(self.training), "hospital": hospital.name}
        of_case["scanner"] = "seen" if hospital.modality else "unseen"
        of_case |= {"case": case.id, "modality": case.modality}
        self._write_scores(self.scores() + tables.score_rows(of_case, scores))

    def _write_scores(self, scores: Sequence[Mapping]) -> None:
        files.write(self.path / "testing.json", files.to_json({"scores": scores}))

    def finish(self, checkpoint: Checkpoint, all_scores: Sequence[Mapping] | None = None) -> None:
        """End a training whose test is done; all_scores: with those of other hospitals."""
        self._write_history(checkpoint)
        self._write_scores(self.scores() if all_scores is None else all_scores)
        (self.path / "checkpoint.pt").unlink(missing_ok=True)  # if a kill has left it
        (self.path / "testing.json").replace(self.path / "scores.json")


class RunFolder:
    """The folder of a run: its settings, its trainings and its tables."""

    def __init__(self, config: Config, trainings: Sequence[Training], arms: Sequence[str]) -> None:
        """trainings: those asked for; arms: all that there are, in the order of a table's rows.

        Raises DataError for a folder of something else, and for a run with other settings.
        """
        self.config, self.out = config, Path(config.out)
        self.trainings, self.arms = trainings, arms
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SHARED}
        names = {k: [os.path.basename(os.path.abspath(f)) for f in settings[k]] for k in FOLDERS}
        self.settings = {**MADE_BY, **settings, **names}
        path = self.out / "config.json"
        # Looked for before config.json, which another process that begins the run writes first.
        foreign = [found for name in OWNED for found in self.out.glob(name)]
        if path.exists():
            kept = files.read_json(path)
            if any(kept.get(key) != value for key, value in MADE_BY.items()):
                what = "is not of a run of version 3; finish an older run with its own version"
                raise DataError(f"{path}: {what}, or choose another --out")
            files.check_same(path, kept, self.settings)
        elif foreign:
            what = "exists, but there is no config.json beside it; choose another --out"
            raise DataError(f"{foreign[0]}: {what}")

    def open(self, by_seed: Mapping[int, Iterable[Hospital]]) -> None:
        """Write the settings and which case is where, or compare them with what is there."""
        with files.lock(self.out / "lock", wait=True):
            self.begun()  # what does not belong here is reported before training
            files.claim(self.out / "config.json", self.settings)
            for seed, hospitals in by_seed.items():
                now = record(hospitals)
                for path in sorted(self.out.glob("cases-*.json")):  # all seeds split the same scans
                    kept = {k: v.split()[-1] for k, v in files.read_json(path).items() if k in now}
                    files.check_same(path, kept, {key: now[key].split()[-1] for key in kept})
                files.claim(self.out / f"cases-seed{seed}.json", now)

    def folder(self, training: Training) -> TrainingFolder:
        return TrainingFolder(self.config, training)

    def unfinished(self) -> list[Training]:
        return [each for each in self.trainings if not self.folder(each).is_finished()]

    @contextlib.contextmanager
    def hold(self, folder: TrainingFolder) -> Iterator[bool]:
        """Hold the folder of a training; yield False if another process holds or has finished it.

        After a training the tables are rewritten.
        """
        with files.lock(folder.path / "lock") as free:
            if not free:
                tqdm.write(f"{folder.name}: another process is at work on it", file=sys.stderr)
            held = free and not folder.is_finished()
            yield held
        if held:
            self.report()

    def begun(self) -> list[TrainingFolder]:
        """All trainings that have begun, by arm, ratio, p and seed."""
        ranks: dict[TrainingFolder, tuple] = {}
        for path in self.out.glob("*/training.json"):
            with files.reading(path):
                t = Training(**files.read_json(path)["training"])
                if t.folder != path.parent.name:
                    raise ValueError(f"it belongs to a folder {t.folder}")
                ranks[self.folder(t)] = self.arms.index(t.arm), t.ratio, -(t.p or 0), t.seed
        return sorted(ranks, key=ranks.__getitem__)

    def describe(self) -> str:
        """How many trainings are finished, and which have begun."""
        left, n_all = [self.folder(training) for training in self.unfinished()], len(self.trainings)
        rounds = {each.name: len(each.history()) for each in left}
        text = "".join(f", {name} after round {n}" for name, n in rounds.items() if n)
        return f"{self.out}: {n_all - len(left)} of {n_all} trainings finished{text}"

    def report(self) -> str:
        """Write results.md, scores.csv and history.csv; return the text for the screen."""
        with files.lock(self.out / "lock", wait=True):
            begun, organs = self.begun(), self.config.organs
            done = [folder for folder in begun if folder.is_finished()]
            scores = [score for folder in done for score in folder.scores()]
            rows = [row for folder in begun for row in folder.history()]
            shown = [self._title(begun, done), tables.screen(scores, organs), *remarks(done)]
            cases = [f"    {folder.name}: {folder.metadata()['cases']}" for folder in done]
            details = [tables.details(scores, organs), "Training cases:", "\n".join(cases)]
            text = "\n\n".join([*shown, *details])
            files.write(self.out / "scores.csv", files.to_csv(scores, tables.SCORE))
            files.write(self.out / "history.csv", files.to_csv(rows))
            files.write(self.out / "results.md", f"{text}\n".encode("utf-8", "surrogateescape"))
        return "\n\n".join([*shown, f"All tables: {self.out / 'results.md'}"])

    def _title(self, begun: Iterable[TrainingFolder], done: Iterable[TrainingFolder]) -> str:
        finished = [folder.training for folder in done]
        n_left = len({*self.trainings, *(folder.training for folder in begun)} - {*finished})
        left = f"; NOT FINISHED: {n_left} of the trainings" if n_left else ""
        seeds = " ".join(dict.fromkeys(str(training.seed) for training in finished))
        on_phantoms = self.config.on_phantoms
        source = "PHANTOMS (synthetic volumes, not patients)" if on_phantoms else "scans"
        return f"## Test Dice, {self.config.scenario} scenario, seeds {seeds}: {source}{left}"


def to_plain(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**vars(checkpoint), "history": [vars(done) for done in checkpoint.history]}


def environment(device: torch.device) -> dict[str, Any]:
    """What may change the last digits of a training."""
    code = b"".join((ROOT / f"{name}.py").read_bytes() for name in MODULES)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "version": VERSION,
        "modules": files.sha256(code),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def remarks(done: Iterable[TrainingFolder]) -> list[str]:
    """A note for each difference between the environments of finished trainings."""
    notes, environments = [], [folder.metadata()["environment"] for folder in done]
    for key in dict.fromkeys(key for each in environments for key in each):
        values = sorted({str(each[key]) for each in environments if key in each})
        if len(values) > 1:
            notes.append(f"NOTE: trainings differ in {key}: {', '.join(values)}")
    return notes
