"""What a run leaves in its folder, and reads again when it is resumed.

Files are whole or absent: each is written under a temporary name, flushed to disk and renamed.

    config.json        the settings and the versions
    hospitals/*.json   which case of each went where, and what its files were
    checkpoint.pt      the training under way, after its last round
    tested.json        the test under way, after its last case
    history.csv        loss, validation Dice and seconds by round
    ARM.pt             a trained arm, for predict.py
    results.json       what is finished, and its scores by case and organ
    scores.csv         the same scores, a line each
    results.md         the tables
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from arms import label_arms
from config import NOT_COMPARED, Config
from data import NORMALIZATION
from datasets import DataError
from tables import list_scores, report, title

FORMAT = 2  # of checkpoints and config.json
EXTENDABLE = ("arms", "ratios", "gin_probability", "seeds")  # a resumed run may have more of them
FOLDERS = ("ct", "mri", "test")  # settings that name folders, however they are written


class Run:
    """What the run in a folder has done, and where it stopped."""

    def __init__(self, config: Config, records: Mapping[str, dict]) -> None:
        """records: as open_run's. Raises DataError for files that no run leaves like this."""
        self.config, self.out = config, Path(config.out)
        nothing: dict = {"finished": [], "history": [], "results": []}
        self._done = read(self.out / "results.json", missing=nothing)
        self._checkpoint = read(self.out / "checkpoint.pt", missing={})
        self._tested = read(self.out / "tested.json", missing={"training": [], "scores": []})
        splits = [record["splits"] for record in records.values()]
        with _blaming(self.out / "results.json"):
            for seed, arm in self._done["finished"]:
                rows = [r for r in self._done["results"] if (r["seed"], r["arm"]) == (seed, arm)]
                rounds = [r for r in self._done["history"] if (r["seed"], r["arm"]) == (seed, arm)]
                n_test = sum(len(s.get(str(seed), {}).get("test", ())) for s in splits)
                if len(rows) < n_test or not rounds:
                    raise ValueError(f"{arm}, seed {seed}, has too few scores or rounds")
        if (self.out / "checkpoint.pt").exists():
            with _blaming(self.out / "checkpoint.pt"):
                state = self._checkpoint
                seed, arm, round_ = state["seed"], state["arm"], state["round"]
                if not len(state["history"]) <= round_ <= config.rounds:
                    raise ValueError(f"round {round_} of {config.rounds}")
                for weights in (state["weights"], state["best"]["weights"] or {}):
                    if not all(torch.isfinite(w).all() for w in weights.values()):
                        raise ValueError("weights that are NaN or infinite")
            named = seed in config.seeds and arm in label_arms(config)
            if not (named or self.is_finished(seed, arm)):
                what = f"arm {arm}, seed {seed}, stopped in round {round_}"
                raise DataError(f"{self.out}: {what}; name it too, or it would be lost")

    def is_finished(self, seed: int, arm: str) -> bool:
        return [seed, arm] in self._done["finished"]

    def checkpoint(self, seed: int, arm: str) -> dict:
        """The state of a training after its last whole round; empty if it has not begun."""
        found = self._checkpoint
        return found if (found.get("seed"), found.get("arm")) == (seed, arm) else {}

    def keep_round(self, state: dict) -> None:
        save(self.out / "checkpoint.pt", state)
        rows = [*self._done["history"], *state["history"]]
        columns = dict.fromkeys(column for row in rows for column in row)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write(self.out / "history.csv", text.getvalue().encode())

    def keep_model(self, state: dict) -> None:
        """Write the best weights of a training, with what predict.py must know to use them."""
        fields = ("organs", "spacing", "patch", "width", "depth")
        model = {"normalization": NORMALIZATION, **{f: getattr(self.config, f) for f in fields}}
        model["phantoms"] = self.config.on_phantoms
        about = {"format": FORMAT, "arm": state["arm"], "seed": state["seed"], "model": model}
        save(model_path(self.config, state["arm"], state["seed"]), {**state["best"], **about})

    def tested(self, seed: int, arm: str) -> list[dict]:
        """The scores of the cases that a trained arm has been tested on so far."""
        return list(self._tested["scores"]) if self._tested["training"] == [seed, arm] else []

    def keep_tested(self, seed: int, arm: str, scores: Sequence[dict]) -> None:
        self._tested = {"training": [seed, arm], "scores": list(scores)}
        write(self.out / "tested.json", json.dumps(self._tested).encode())

    def finish(self, state: dict, scores: Sequence[dict]) -> None:
        """Keep the test scores of a training that is through, once."""
        seed, arm = state["seed"], state["arm"]
        if self.is_finished(seed, arm):
            return
        self._done["history"] += state["history"]
        self._done["results"] += [{"seed": seed, "arm": arm, **score} for score in scores]
        self._done["finished"].append([seed, arm])
        write(self.out / "results.json", json.dumps(self._done, indent=1).encode())

    def report(self, shares: str) -> str:
        """Write the tables and the scores, and remove what only an unfinished run needs.

        shares: a sentence or lines on who trained on how many cases.
        """
        found, organs = self._done["results"], self.config.organs
        text = f"{title(self.config, found)}\n\n{report(found, organs)}"
        write(self.out / "results.md", f"{text}\n\n{indent(shares, ' ' * 4)}\n".encode())
        write(self.out / "scores.csv", list_scores(found).encode())
        for name in ("checkpoint.pt", "tested.json"):
            (self.out / name).unlink(missing_ok=True)
        return text


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever a file of another form leads to into a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"is not what a run leaves ({type(error).__name__}: {error})"
        raise DataError(f"{path}: {what}; choose another --out") from error


def model_path(config: Config, arm: str, seed: int) -> Path:
    """Where a run keeps the trained model of an arm: fedgin-1-5-p1-seed42.pt, for instance."""
    name = arm.replace(":", "-").replace("=", "").replace(" ", "-")
    return Path(config.out) / f"{name}-seed{seed}.pt"


def has_trained(out: Path) -> bool:
    """Whether the run in a folder got through a round."""
    return any((out / name).exists() for name in ("checkpoint.pt", "results.json"))


def check_out(config: Config) -> None:
    """Raise DataError unless the run can have its folder: new, or its own and to be resumed."""
    out = Path(config.out)
    if (out / "config.json").exists():
        if has_trained(out) and not config.resume:
            what = "holds a run; --resume continues or extends it, --out makes another"
            raise DataError(f"{out}: {what}")
        return
    names = ("history.csv", "results.json", "results.md", "scores.csv", "hospitals", "*.pt")
    foreign = [file for name in names for file in out.glob(name)]
    if foreign:
        raise DataError(f"{foreign[0]}: is there, and no run beside it; choose another --out")
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise DataError(f"{parent}: cannot be written; choose another --out")


@contextlib.contextmanager
def open_run(config: Config, hospitals: Mapping[str, dict]) -> Iterator[Run]:
    """Make or continue the run in config.out, and keep every other process out of it.

    hospitals: {name: what to remember of it}. Raises DataError for a damaged file, and for a run
    with other settings or data. With nothing trained yet, the run may still change them.
    """
    out = Path(config.out)
    settings = {"format": FORMAT, **dataclasses.asdict(config)}
    settings |= {k: [str(Path(folder).resolve()) for folder in settings[k]] for k in FOLDERS}
    settings |= {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
    settings, records = json.loads(json.dumps([settings, hospitals]))
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if has_trained(out):
            _merge(out, settings, records)
        elif (out / "config.json").exists():
            shutil.rmtree(out / "hospitals", ignore_errors=True)
        write(out / "config.json", json.dumps(settings, indent=1).encode())
        (out / "hospitals").mkdir(exist_ok=True)
        for name, record in records.items():
            write(out / f"hospitals/{name}.json", json.dumps(record, indent=1).encode())
        yield Run(config, records)


def _merge(out: Path, settings: dict, records: Mapping[str, dict]) -> None:
    """Add what the run in a folder knows to settings and records.

    Raises DataError, with the values of both, for what keeps that run from being continued.
    """
    kept = read(out / "config.json", missing={})
    differ = []
    for key in settings.keys() - {*NOT_COMPARED, *EXTENDABLE, "versions"}:
        if kept.get(key) != settings[key]:
            differ.append(f"{key} {_shown(kept.get(key))}, now {_shown(settings[key])}")
    with _blaming(out / "config.json"):
        for key in EXTENDABLE:
            settings[key] = list(dict.fromkeys([*(kept[key] or ()), *(settings[key] or ())]))
        settings["versions"] = kept["versions"]
    for name, record in records.items():
        path = out / f"hospitals/{name}.json"
        old = read(path, missing=record)
        with _blaming(path):
            splits, files = old["splits"], old["files"]
            if any(splits.get(seed, split) != split for seed, split in record["splits"].items()):
                differ.append(f"{name} has other cases, or splits them otherwise")
            changed = [i for i, stamps in record["files"].items() if files.get(i, stamps) != stamps]
            differ += [f"files of {name} have changed: {', '.join(changed)}"] if changed else []
            record |= {"splits": splits | record["splits"], "files": files | record["files"]}
    if differ:
        why = "; rounds cannot be added, as the learning rate falls to 0 over those planned"
        what = f"holds a run with other settings: {'; '.join(sorted(differ))}"
        what += why if kept.get("rounds") != settings["rounds"] else ""
        raise DataError(f"{out}: {what}. Give its own settings, or choose another --out")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep every other process out of a folder; the system frees it if this one dies."""
    try:
        import fcntl
    except ImportError:  # Windows: there is no lock
        yield
        return
    with open(out / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another process is at work on this run") from error
        yield


def save(path: Path, content: dict) -> None:
    """Write a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def read(path: Path, missing: dict) -> dict:
    """What a JSON file or a checkpoint holds, or `missing` if there is no such file."""
    if not path.exists():
        return missing
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch has many for a file that is not its own
        what = f"cannot be read ({type(error).__name__})"
        raise DataError(f"{path}: {what}; choose another --out") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not what a run leaves; choose another --out")
    return content


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, on the disk when this returns."""
    temporary = path.with_name(f"tmp-{path.name}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
