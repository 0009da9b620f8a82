"""The folder of a training: what it leaves, and reads again when it goes on.

    training.json    what it is, on how many cases it trains, where and when it was trained
    checkpoint.pt    after its last round, until model.pt is there
    history.csv      loss, validation Dice and seconds by round
    model.pt         its best weights, for scripts.predict
    testing.csv      the test under way, after its last case
    scores.csv       testing.csv, renamed after the last case: that it exists is "finished"
    lock             held by the process that is at work on it

Each carries the run's id, or is vouched for by training.json, which does.
"""

import dataclasses
import functools
import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import NORMALIZATION
from scans import files
from scans.cases import PreparedCase
from scans.files import DataError
from study import tables
from study.config import VERSION, Best, Checkpoint, Config, Round, Training
from study.hospitals import Hospital

ROOT = Path(__file__).parent.parent
MODULES = ("data", "evaluate", "federated", "fedgin", "gin", "unet3d")
OF_MODELS = ("organs", "spacing", "patch", "width", "depth")  # settings that predictions need
ELSEWHERE = "choose another --out"


class TrainingFolder:
    """Of one training of a run. Whoever holds it (see RunFolder.take) may write to it."""

    def __init__(self, config: Config, run_id: str, training: Training) -> None:
        self.config, self.run_id, self.training = config, run_id, training
        self.path = Path(config.out) / training.folder
        self.name = f"{training.label}, seed {training.seed}"

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """training.json; raises DataError if it is missing, damaged or of another run."""
        path = self.path / "training.json"
        about = files.read_json(path)
        if about.pop("checksum", "") != files.sha256(files.to_json(about)):
            raise DataError(f"{path}: is not as this program left it; {ELSEWHERE}")
        ours = {"run": self.run_id, "training": dataclasses.asdict(self.training)}
        if {key: about.get(key) for key in ours} != ours:
            raise DataError(f"{path}: is of another run or training; {ELSEWHERE}")
        return about

    def is_finished(self) -> bool:
        """Raises DataError for a finished training whose files are not as it left them."""
        if not (self.path / "scores.csv").exists():
            return False
        for name, checksum in self.about.get("finished files", {"training.json": ""}).items():
            path = self.path / name
            if not path.exists() or files.checksum(path) != checksum:
                what = f"{path}: is missing, or not as it was when the training finished"
                raise DataError(f"{what}; bring it back, or delete {self.path} to train anew")
        return True

    def is_trained(self) -> bool:
        return (self.path / "model.pt").exists()

    def is_begun(self) -> bool:
        return (self.path / "training.json").exists()

    def begin(self, n_cases: Mapping[str, float], device: torch.device) -> None:
        """Note what is trained, on how many cases of each hospital, and where."""
        settings = Path(self.config.out) / "config.json"
        with files.lock(settings.with_name("lock"), wait=True):
            if files.checksum(settings) != self.run_id:
                raise DataError(f"{settings}: has just got other settings; {ELSEWHERE}")
            about = self.about if self.is_begun() else {}
            trained_on, here = about.get("trained on", []), environment(device)
            self._note(
                {
                    **about,
                    "run": self.run_id,
                    "training": dataclasses.asdict(self.training),
                    "cases": dict(n_cases),
                    "trained on": trained_on if here in trained_on else [*trained_on, here],
                }
            )

    def _note(self, about: dict[str, Any]) -> None:
        self.about = about
        content = {**about, "checksum": files.sha256(files.to_json(about))}
        files.write(self.path / "training.json", files.to_json(content))

    # ------------------------------------------------------------------------------ its training

    def checkpoint(self) -> Checkpoint:
        """What the training has reached; raises DataError for a damaged file or another run's."""
        path = self.path / ("model.pt" if self.is_trained() else "checkpoint.pt")
        if not path.exists():
            return Checkpoint()
        found = files.read_pt(path)
        with files.blaming(path, ELSEWHERE):
            if found["run"] != self.run_id:
                raise ValueError("it is of another run")
            history = tuple(Round(**row) for row in found["history"])
            if self.is_trained():
                best = Best(**{**found["best"], "weights": found["weights"]})
                return Checkpoint(found["round"], None, best, history)
            return Checkpoint(found["round"], found["weights"], Best(**found["best"]), history)

    def keep_round(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and the history so far."""
        content = {
            "run": self.run_id,
            "round": checkpoint.round,
            "weights": checkpoint.weights,
            "best": vars(checkpoint.best),
            "history": [vars(done) for done in checkpoint.history],
        }
        files.write_pt(self.path / "checkpoint.pt", content)
        self._write_history(checkpoint)

    def keep_model(self, checkpoint: Checkpoint) -> None:
        """Write the best weights of a training that is through, with what it takes to use them."""
        model = {name: getattr(self.config, name) for name in OF_MODELS}
        model["normalization"] = {**NORMALIZATION, "ct": self.config.ct_window}
        content = {
            "run": self.run_id,
            "arm": self.training.label,
            "seed": self.training.seed,
            "model": {**model, "phantoms": self.config.on_phantoms},
            "round": checkpoint.round,
            "weights": checkpoint.best.weights,
            "best": {**vars(checkpoint.best), "weights": None},
            "history": [vars(done) for done in checkpoint.history],
        }
        files.write_pt(self.path / "model.pt", content)
        (self.path / "checkpoint.pt").unlink(missing_ok=True)

    def _write_history(self, checkpoint: Checkpoint) -> None:
        rows = []
        for done in checkpoint.history:
            row = {**dataclasses.asdict(self.training), "round": done.round}
            row |= {"seconds": round(done.seconds, 2), "loss": tables.mean(done.losses.values())}
            row |= {f"val_dice_{m}": done.val_dice.get(m, "") for m in ("mri", "ct")}
            rows.append(row | {f"loss {name}": loss for name, loss in done.losses.items()})
        files.write_rows(self.path / "history.csv", rows)

    def history(self) -> list[dict[str, str]]:
        """A row a round, as far as the training has come."""
        path = self.path / "history.csv"
        return files.read_rows(path) if path.exists() else []

    # ---------------------------------------------------------------------------------- its test

    def scores(self) -> list[dict]:
        """Of the test cases so far, a row an organ, the organs of a case one after another."""
        finished = self.is_finished()
        path = self.path / ("scores.csv" if finished else "testing.csv")
        if not path.exists():
            return []
        if not finished and files.checksum(path) not in self.about.get("testing.csv", []):
            what = f"{path}: is not as this program left it, by training.json"
            raise DataError(f"{what}; delete it to test anew")
        with files.blaming(path, ELSEWHERE):
            return [tables.parse_score(row) for row in files.read_rows(path)]

    def n_tested(self) -> int:
        """How many test cases are scored."""
        return len(self._rows) // len(self.config.organs)

    def keep_scores(self, hospital: Hospital, case: PreparedCase, scores: Mapping) -> None:
        """Add the scores of a test case, {organ: what score_case gives}."""
        about = {
            **dataclasses.asdict(self.training),
            "hospital": hospital.name,
            "scanner": "own" if hospital.modality else "other",
            "case": case.volume.id,
            "modality": case.volume.modality,
        }
        self._rows += tables.score_rows(about, scores)
        self._write_testing(self._rows)

    def _write_testing(self, rows: Sequence[Mapping]) -> None:
        """Write testing.csv, for which training.json vouches as it was and as it will be."""
        path, content = self.path / "testing.csv", files.to_csv(rows, tables.SCORE)
        before = [files.checksum(path)] if path.exists() else []
        self._note({**self.about, "testing.csv": [*before, files.sha256(content)]})
        files.write(path, content)

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return self.scores()

    def finish(self, checkpoint: Checkpoint, everybodys: Sequence[Mapping] | None = None) -> None:
        """End a training whose last test case is scored; everybodys: scores, elsewhere too."""
        self._write_history(checkpoint)
        testing, scores = self.path / "testing.csv", self.path / "scores.csv"
        # Without a test case there is none yet.
        self._write_testing(self._rows if everybodys is None else everybodys)
        finished = {
            "finished": time.strftime("%Y-%m-%d %H:%M"),
            "finished files": {
                "history.csv": files.checksum(self.path / "history.csv"),
                "scores.csv": files.checksum(testing),
            },
        }
        self._note({**self.about, **finished})
        testing.replace(scores)


def environment(device: torch.device) -> dict[str, Any]:
    """What may change the last digits of a training."""
    code = b"".join((ROOT / f"{name}.py").read_bytes() for name in MODULES)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "version": VERSION,
        "modules": hashlib.sha256(code).hexdigest()[:16],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
