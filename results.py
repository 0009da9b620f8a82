"""What a run leaves in its folder, and reads again when it is resumed.

Files are whole or absent: each is written under a temporary name, flushed to disk and renamed.

    config.json        the settings and the versions
    hospitals/*.json   which case of each went where, and what its files were
    checkpoint.pt      the training under way, after its last round
    history.csv        loss and validation Dice by round
    ARM.pt             a trained arm, for predict.py
    results.json       what is finished, and its scores by case and organ
    results.md         the tables
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from config import NOT_COMPARED, Config
from data import NORMALIZATION
from datasets import DataError
from tables import comparisons, summarize, table, title

FORMAT = 1  # of checkpoints and config.json
HISTORY = ("seed", "arm", "round", "loss", "val_dice_mri", "val_dice_ct")


class Run:
    """What the run in a folder has done, and where it stopped."""

    def __init__(self, config: Config, n_test: Mapping[int, int]) -> None:
        """n_test: test cases by seed. Raises DataError for files that no run leaves like this."""
        self.config, self.out = config, Path(config.out)
        nothing: dict = {"finished": [], "history": [], "results": []}
        self._done = read(self.out / "results.json", missing=nothing)
        self._checkpoint = read(self.out / "checkpoint.pt", missing={})
        with _blaming(self.out / "results.json"):
            for seed, arm in self._done["finished"]:
                rows = [r for r in self._done["results"] if (r["seed"], r["arm"]) == (seed, arm)]
                rounds = [r for r in self._done["history"] if r[:2] == [seed, arm]]
                if len(rows) < n_test.get(seed, 0) or not rounds:
                    raise ValueError(f"{arm}, seed {seed}, has too few scores or rounds")
        if (self.out / "checkpoint.pt").exists():
            with _blaming(self.out / "checkpoint.pt"):
                state = self._checkpoint
                if not 0 < state["round"] == len(state["history"]) <= config.rounds:
                    raise ValueError(f"round {state['round']} of {config.rounds}")
                for weights in (state["weights"], state["best"]["weights"]):
                    if not all(torch.isfinite(w).all() for w in weights.values()):
                        raise ValueError("weights that are NaN or infinite")

    def is_finished(self, seed: int, arm: str) -> bool:
        return [seed, arm] in self._done["finished"]

    def checkpoint(self, seed: int, arm: str) -> dict:
        """The state of a training after its last whole round; empty if it has not begun."""
        found = self._checkpoint
        return found if (found.get("seed"), found.get("arm")) == (seed, arm) else {}

    def keep_round(self, state: dict) -> None:
        save(self.out / "checkpoint.pt", state)
        text = io.StringIO()
        csv.writer(text).writerows([HISTORY, *self._done["history"], *state["history"]])
        write(self.out / "history.csv", text.getvalue().encode())

    def keep_model(self, state: dict) -> None:
        """Write the best weights of a training, with what predict.py must know to use them."""
        fields = ("organs", "spacing", "patch", "width", "depth")
        model = {"normalization": NORMALIZATION, **{f: getattr(self.config, f) for f in fields}}
        about = {"format": FORMAT, "arm": state["arm"], "seed": state["seed"], "model": model}
        path = model_path(self.config, state["arm"], state["seed"])
        save(path, {**state["best"], **about})

    def finish(self, state: dict, scores: Sequence[dict]) -> None:
        """Keep the test scores of a training that is through, once."""
        seed, arm = state["seed"], state["arm"]
        if self.is_finished(seed, arm):
            return
        self._done["history"] += state["history"]
        self._done["results"] += [{"seed": seed, "arm": arm, **score} for score in scores]
        self._done["finished"].append([seed, arm])
        write(self.out / "results.json", json.dumps(self._done, indent=1).encode())

    def report(self, shares: str = "") -> str:
        """Write the tables to results.md and remove what only an unfinished run needs."""
        summary = summarize(self._done["results"], self.config.organs)
        tables = table(summary, self.config.organs)
        text = "\n\n".join([title(self.config, shares), tables, comparisons(summary)])
        write(self.out / "results.md", f"{text}\n".encode())
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
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
    """Where a run keeps the trained model of an arm."""
    suffix = f"-seed{seed}" if len(config.seeds) > 1 else ""
    return Path(config.out) / f"{arm.replace(':', '-').replace(' ', '-')}{suffix}.pt"


def check_out(config: Config) -> None:
    """Raise DataError unless the run can have its folder: new, or its own and to be resumed."""
    out = Path(config.out)
    if (out / "config.json").exists():
        if not config.resume:
            raise DataError(f"{out}: holds a run; --resume continues it, --out makes another")
        return
    names = ("history.csv", "results.json", "results.md", "*.pt")
    foreign = [file for name in names for file in out.glob(name)]
    if foreign:
        raise DataError(f"{foreign[0]}: is there, and no run beside it; choose another --out")
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise DataError(f"{parent}: cannot be written; choose another --out")


@contextlib.contextmanager
def open_run(config: Config, hospitals: Mapping[str, dict]) -> Iterator[Run]:
    """Make or continue the run in config.out, and keep every other process out of it.

    hospitals: {name: what to remember of it}. Raises DataError for a damaged file, and with the
    fields that differ if the run there had other settings or other data.
    """
    out = Path(config.out)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    settings = {"format": FORMAT, **dataclasses.asdict(config), "versions": versions}
    contents = {out / "config.json": settings}
    contents |= {out / f"hospitals/{name}.json": about for name, about in hospitals.items()}
    contents = {path: json.loads(json.dumps(content)) for path, content in contents.items()}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        differ: dict[str, None] = {}
        for path, content in contents.items():
            kept = read(path, missing=content)
            differ |= dict.fromkeys(key for key in content if content[key] != kept.get(key))
        fields = ", ".join(field for field in differ if field not in (*NOT_COMPARED, "versions"))
        if fields:
            raise DataError(f"{out}: holds a run with other {fields}; choose another --out")
        (out / "hospitals").mkdir(exist_ok=True)
        for path, content in contents.items():
            if not path.exists():
                write(path, json.dumps(content, indent=1).encode())
        tests = {
            seed: sum(
                len(about["splits"].get(seed, {}).get("test", ())) for about in hospitals.values()
            )
            for seed in config.seeds
        }
        yield Run(config, tests)


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
