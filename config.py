"""Every setting of a run, once: its default, its flag and its help.

Some defaults differ between phantoms, which a CPU trains in minutes, and scans, which want a GPU.

    from config import Config
    print(Config().rounds, Config(ct=("ct_set",), mri=("mri_set",)).rounds)  # 20 100
"""

import argparse
import dataclasses
import io
import math
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from datasets import LAYOUTS, ORGANS, DataError
from phantom import SPACING

GROUPS = {"scenario": "experiment", "ct": "data", "rounds": "training", "out": "run"}  # of flags
LIMITS = {"depth": 12, "width": 4096, "patch": 4096, "sites": 10_000, "rounds": 10**6}
NOT_COMPARED = ("out", "cache", "no_cache", "resume")  # a resumed run may change them
# What a sentence explains; anything else is a bug.
FORESEEN = (DataError, FloatingPointError, OSError)


def flag(default: Any, text: str, scans: Any = None, **more: Any) -> Any:
    """A field of Config that is a flag too; `scans` is its default on scans, where that differs."""
    metadata = {"text": text, "phantoms": default, "scans": scans, "more": more}
    return dataclasses.field(default=default if scans is None else None, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on. Raises ValueError, naming the flag, for what cannot work."""

    scenario: str = flag(
        "limited", "limited: few MRI training cases, CT added by --ratios; complete: all there is"
    )
    arms: tuple[str, ...] = flag(
        (), "ways to train, of %(choices)s (default: the scenario's)", metavar="ARM"
    )
    ratios: tuple[str, ...] = flag(None, "MRI : CT training cases, if limited (default: 1:5)")
    mri_cases: int = flag(None, "MRI training cases, if limited (default: 2)")
    seeds: tuple[int, ...] = flag((42,), "a repetition each: mean ± deviation", metavar="N")
    ct: tuple[str, ...] = flag((), "folders of CT scans, each a hospital", metavar="DIR")
    mri: tuple[str, ...] = flag((), "folders of MRI scans, each a hospital", metavar="DIR")
    test: tuple[str, ...] = flag((), "folders to test on, never trained on", metavar="DIR")
    sites: int = flag(1, "hospitals into which each folder to train on, or the phantoms, is split")
    organs: tuple[str, ...] = flag(ORGANS, "to segment", choices=ORGANS, metavar="ORGAN")
    partial_labels: bool = flag(False, "let a hospital lack some organs, and train on those it has")
    layout: str = flag("", "of the folders, where one looks like two", choices=LAYOUTS)
    skip_bad: bool = flag(False, "leave out, and list, cases that cannot be used")
    spacing: float = flag(SPACING, "voxel size, mm, to which scans are resampled", scans=2.0)
    rounds: int = flag(20, "federated rounds", scans=100)
    local_steps: int = flag(
        30, "batches that a hospital trains each round, whatever its size", scans=50
    )
    batch_size: int = flag(2, "patches a batch")
    patch: int = flag(32, "width of a patch, voxels", scans=96)
    width: int = flag(8, "channels at the U-Net's first level", scans=32)
    depth: int = flag(4, "levels of the U-Net; 2^(depth − 1) must divide --patch", scans=5)
    lr: float = flag(
        4e-3, "first learning rate; round t of T has (1 − (t − 1) / T)^0.9 of it", scans=1e-3
    )
    gin_probability: tuple[float, ...] = flag(
        (1.0, 0.25),
        "share of the images that GIN transforms, in arms that use it, which are trained for each: "
        "1 is the paper's, 0.25 kinder to CT",
    )
    val_every: int = flag(
        1, "rounds from one validation to the next, on at most 8 cases a hospital", scans=5
    )
    nsd_tolerance: float = flag(
        SPACING, "mm within which a surface voxel counts as right", scans=2.0
    )
    out: str = flag("", "folder for the results (default: one in runs/)", metavar="DIR")
    cache: str = flag("", "for preprocessed scans (default: cache, beside --out)", metavar="DIR")
    no_cache: bool = flag(False, "keep preprocessed scans in memory instead")
    resume: bool = flag(
        False, "go on where the run in --out stopped, or extend it by seeds, arms, ratios or shares"
    )

    def __post_init__(self) -> None:
        kind = "phantoms" if self.on_phantoms else "scans"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                value = field.metadata[kind]
            if get_args(field.type) and not isinstance(value, tuple | None):
                value = tuple(value) if isinstance(value, list) else (value,)
            object.__setattr__(self, field.name, value)
        out = Path(self.out or f"runs/{self.scenario}")
        object.__setattr__(self, "out", str(out))
        object.__setattr__(self, "cache", self.cache or str(out.parent / "cache"))
        limited = {"ratios": ("1:5",), "mri_cases": 2} if self.scenario == "limited" else {}
        for name, value in limited.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check(self)

    @property
    def on_phantoms(self) -> bool:
        return not (self.ct or self.mri)


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError(f"{name} names something twice: {' '.join(map(str, value))}")
        if type(value) in (int, float):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, not {value}")
            if value > LIMITS.get(field.name, math.inf):
                raise ValueError(f"{name} can be at most {LIMITS[field.name]}")
    if not all(0 <= p <= 1 for p in config.gin_probability):
        shares = " ".join(map(str, config.gin_probability))
        raise ValueError(f"--gin-probability must lie between 0 and 1, not {shares}")
    if not all(0 <= seed < 2**63 for seed in config.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, config.seeds))}: must lie in 0 … 2^63 - 1")
    divisor = 2 ** (config.depth - 1)
    if config.patch % divisor or config.patch == divisor:
        raise ValueError(
            f"--patch {config.patch} does not fit --depth {config.depth}: it must be a multiple of "
            f"{divisor}, and larger"
        )
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out {config.out} is a file; it must be a folder, or a new name")
    if config.on_phantoms and config.spacing != SPACING:
        raise ValueError(f"--spacing is for scans; phantoms have voxels of {SPACING:g} mm")
    if config.test and config.on_phantoms:
        raise ValueError("--test needs folders to train on; give --ct and --mri too")
    if config.scenario != "limited" and (config.ratios or config.mri_cases):
        raise ValueError("--ratios and --mri-cases are for --scenario limited")


def make_parser(
    description: str | None,
    choices: Mapping[str, Collection] | None = None,
    leave_out: Collection[str] = (),
) -> argparse.ArgumentParser:
    """A parser with a flag for each field of Config; `choices` adds those that the caller knows."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group: Any = parser
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if field.name in leave_out:
            continue
        options = {"default": field.default, **field.metadata["more"]}
        if field.name in (choices or {}):
            options["choices"] = (choices or {})[field.name]
        if field.type is bool:
            options["action"] = "store_true"
        else:
            kind = (*get_args(field.type), field.type)[0]
            options["type"] = kind
            options |= {"nargs": "+"} if kind is not field.type else {}
            options.setdefault("metavar", {int: "N", float: "X"}.get(kind))
        help_ = field.metadata["text"] + _default(field)
        group.add_argument("--" + field.name.replace("_", "-"), help=help_, **options)
    return parser


def _default(field: dataclasses.Field) -> str:
    phantoms, scans = field.metadata["phantoms"], field.metadata["scans"]
    if phantoms in ((), "", False, None):
        return ""
    shown = " ".join(map(str, phantoms)) if isinstance(phantoms, tuple) else phantoms
    return f" (default: {shown}{'' if scans is None else f', on scans {scans}'})"


def to_config(parser: argparse.ArgumentParser, args: argparse.Namespace, **fixed: Any) -> Config:
    """The Config of parsed flags and `fixed`; what cannot work ends the program with code 2."""
    names = {field.name for field in dataclasses.fields(Config)}
    settings = {key: value for key, value in (vars(args) | fixed).items() if key in names}
    try:
        return Config(**settings)
    except ValueError as error:
        parser.error(str(error))


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


def how_to_go_on(config: Config) -> str:
    """What to say of a run that has ended early."""
    if not (Path(config.out) / "config.json").exists():
        return ""
    return "\nFinished rounds are kept; the same command with --resume goes on."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting; PyTorch has no exception of its own for that on the CPU."""
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run_command(name: str, work: Callable[[], int | None], hint: Callable[[], str] = str) -> int:
    """Do a command's work and return its exit code; one line says what ended it, if something did.

    2 for bad input, 1 for a run that failed, 130 for one that was stopped. Any other exception is a
    bug, which keeps its traceback. hint() says how to go on, if one can.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell's & has SIGINT ignored
            signal.signal(number, signal.default_int_handler)
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"\n{name}: stopped{hint()}", file=sys.stderr)
        return 130
    except Exception as error:
        notes = "".join(f"{note}: " for note in reversed(getattr(error, "__notes__", [])))
        if isinstance(error, DataError) and not notes:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        if not isinstance(error, FORESEEN) and not is_out_of_memory(error):
            raise
        print(f"{name}: the run failed: {notes}{error}{hint()}", file=sys.stderr)
        return 1
