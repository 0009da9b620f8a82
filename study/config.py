"""Every setting of a run, once: its default, its flag and its help.

Some defaults differ between phantoms, which a CPU trains in minutes, and scans, which want a GPU.
"""

import argparse
import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from data import NORMALIZATION
from scans.layouts import LAYOUTS
from scans.organs import NO_STRUCTURES, ORGANS, common_name, spelling
from scans.phantom import SPACING

VERSION = "3.0.0"
GROUPS = {"scenario": "experiment", "ct": "data", "rounds": "training", "out": "run"}  # of flags


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of a run: an arm with a seed, a ratio and a probability of GIN.

    The arm's name is a key of fedgin.ARMS, the ratio one of fedgin.RATIOS.
    """

    seed: int
    arm: str
    ratio: str = ""  # MRI : CT training cases; empty where all take part
    p: float | None = None  # probability of GIN; None in arms without it

    @property
    def label(self) -> str:
        """Its name in tables, which all seeds share: "fedgin 1:5 p=1", for instance."""
        p = "" if self.p is None else f"p={str(self.p).removesuffix('.0')}"  # no two print alike
        return " ".join(word for word in (self.arm, self.ratio, p) if word)

    @property
    def folder(self) -> str:
        """The name of its folder: "fedgin-1-5-p1-seed42", for instance."""
        name = self.label.replace(":", "-").replace("=", "").replace(" ", "-")
        return f"{name}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Round:
    """The outcome of a round."""

    round: int
    losses: Mapping[str, float]  # by hospital
    val_dice: Mapping[str, float]  # by modality; empty in a round without validation
    seconds: float


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a training has reached after a round; by default, before the first one."""

    round: int = 0
    weights: Mapping[str, Tensor] | None = None
    best_round: int = 0  # the one with the highest validation Dice
    best_dice: float = -math.inf
    best_weights: Mapping[str, Tensor] | None = None
    history: tuple[Round, ...] = ()


def flag(default: Any, text: str, scans: Any = None, **more: Any) -> Any:
    """A field of Config that is a flag too; `scans` is its default on scans, where that differs."""
    if default not in ((), "", False, None):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown}{'' if scans is None else f', on scans {scans}'})"
    metadata = {"help": text, "phantoms": default, "scans": scans, "more": more}
    return dataclasses.field(default=default if scans is None else None, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on. Raises ValueError, naming the flag, for what cannot work."""

    scenario: str = flag("limited", "limited: few MRI training cases; complete: all of them")
    arms: tuple[str, ...] = flag(
        (), "arms to train, out of %(choices)s (default: those of the scenario)", metavar="ARM"
    )
    ratios: tuple[str, ...] = flag(None, "MRI : CT training cases, if limited (default: 1:5)")
    mri_cases: int = flag(None, "number of MRI training cases, if limited (default: 2)")
    seeds: tuple[int, ...] = flag((42,), "run with each; tables show mean ± deviation", metavar="N")
    ct: tuple[str, ...] = flag((), "folders of CT scans; each is a hospital", metavar="DIR")
    mri: tuple[str, ...] = flag((), "folders of MRI scans; each is a hospital", metavar="DIR")
    test: tuple[str, ...] = flag((), "folders that are used for testing only", metavar="DIR")
    sites: int = flag(1, "number of hospitals into which each --ct or --mri folder is split")
    organs: tuple[str, ...] = flag(ORGANS, "organs to segment, in any spelling", metavar="ORGAN")
    partial_labels: bool = flag(False, "let each hospital train on the organs that it labels")
    layout: str = flag("", "layout, needed if a folder matches two", choices=LAYOUTS)
    skip_bad: bool = flag(False, "leave out, and list, the cases that cannot be used")
    spacing: float = flag(SPACING, "voxel size in mm to which scans are resampled", scans=2.0)
    ct_window: tuple[float, float] = flag(
        NORMALIZATION["ct"],
        "range in HU to which CT is clipped",
        nargs=2,
        action="store",
        metavar=("LOW", "HIGH"),
    )
    rounds: int = flag(30, "number of federated rounds", scans=100)
    local_steps: int = flag(10, "training steps per round, at every hospital", scans=50)
    batch_size: int = flag(2, "patches per training step")
    patch: int = flag(32, "width of a patch in voxels", scans=96)
    width: int = flag(8, "channels at the U-Net's first level", scans=32)
    depth: int = flag(4, "levels of the U-Net; 2^(depth − 1) must divide --patch", scans=5)
    lr: float = flag(
        6e-3, "initial learning rate; round t of T uses (1 − (t − 1) / T)^0.9 of it", scans=1e-3
    )
    gin_probability: tuple[float, ...] = flag(
        (1.0, 0.25),
        "probability p that GIN is applied to a training image, in arms with GIN, which are "
        "trained once for each p: the paper uses 1; CT loses less with 0.25",
    )
    val_every: int = flag(3, "rounds from one validation to the next", scans=5)
    nsd_tolerance: float = flag(SPACING, "mm within which a surface counts as correct", scans=2.0)
    out: str = flag("", "folder for the results (default: runs/SCENARIO)", metavar="DIR")
    cache: str = flag("", "folder for preprocessed scans (default: beside --out)", metavar="DIR")

    def __post_init__(self) -> None:
        chosen: dict[str, Any] = {
            field.name: field.metadata["phantoms" if self.on_phantoms else "scans"]
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        if self.scenario == "limited":
            chosen["ratios"] = self.ratios or ("1:5",)
            chosen["mri_cases"] = 2 if self.mri_cases is None else self.mri_cases
        chosen["organs"] = tuple(map(common_name, self.organs))
        chosen["out"] = str(Path(self.out or f"runs/{self.scenario}"))
        chosen["cache"] = self.cache or str(Path(chosen["out"]).parent / "cache")
        for name, value in chosen.items():
            object.__setattr__(self, name, value)
        check(self)

    @property
    def on_phantoms(self) -> bool:
        return not (self.ct or self.mri)

    def is_validated(self, round_: int) -> bool:
        return round_ % self.val_every == 0 or round_ == self.rounds


def flag_name(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work."""
    low, high = config.ct_window
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--ct-window must be LOW below HIGH, in HU, not {low:g} {high:g}")
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), flag_name(field)
        if isinstance(value, tuple) and "" in value:
            raise ValueError(f"{name} has an empty name")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ValueError(f"{name} names something twice: {' '.join(map(str, value))}")
        highest = {int: 1e6, float: 1e38}.get(type(value))
        if highest and not 0 < value <= highest:
            raise ValueError(f"{name} must be a positive number, at most {highest:g}, not {value}")
    if not all(0 <= p <= 1 for p in config.gin_probability):
        given = " ".join(map(str, config.gin_probability))
        raise ValueError(f"--gin-probability must lie between 0 and 1, not {given}")
    if not all(0 <= seed < 2**63 for seed in config.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, config.seeds))}: must lie in 0 … 2^63 - 1")
    divisor = 2 ** (config.depth - 1)
    if config.patch % divisor or config.patch == divisor:
        rule = f"it must be a multiple of {divisor}, and larger"
        raise ValueError(f"--patch {config.patch} does not fit --depth {config.depth}: {rule}")
    for name, path in (("--out", Path(config.out)), ("--cache", Path(config.cache))):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{name} {path} is a file; it must be a folder, or a new name")
    if config.on_phantoms and config.spacing != SPACING:
        raise ValueError(f"--spacing is for scans; phantoms have voxels of {SPACING:g} mm")
    if config.on_phantoms and config.test:
        raise ValueError("--test needs folders to train on; give --ct and --mri too")
    if config.scenario != "limited" and (config.ratios or config.mri_cases):
        raise ValueError("--ratios and --mri-cases are for --scenario limited")
    check_organs(config)


def check_organs(config: Config) -> None:
    """Raise ValueError for names that no structure can have; folders say which they label."""
    forms = [spelling(organ) for organ in config.organs]
    for organ, form in zip(config.organs, forms, strict=True):
        if form in ("", *NO_STRUCTURES) or not organ.isprintable():
            raise ValueError(f"--organs {organ!r}: is not a structure's name")
        if config.on_phantoms and organ not in ORGANS:
            raise ValueError(f"--organs {organ}: phantoms have {', '.join(ORGANS)} only")
    if len(set(forms)) < len(forms):
        raise ValueError(f"--organs names something twice: {' '.join(config.organs)}")


def new_parser(description: str | None, usage: str) -> argparse.ArgumentParser:
    """A parser of a command; description: the docstring of its module, shown as it is."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        None, usage, description, formatter_class=form, allow_abbrev=False
    )


def make_parser(
    description: str | None,
    choices: Mapping[str, Collection] | None = None,
    leave_out: Collection[str] = (),
    texts: Mapping[str, str] = {},
) -> argparse.ArgumentParser:
    """A parser with a flag for each field of Config; `choices` adds those that the caller knows.

    Config has the defaults, and help unless `texts` has it. A flag of several values adds up.
    """
    parser = new_parser(description, "%(prog)s [options]")
    group: Any = parser
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        if field.name in leave_out:
            continue
        options: dict[str, Any] = {"action": "store_true"}
        if field.type is not bool:
            kind = (*get_args(field.type), field.type)[0]
            options = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind)}
            options["choices"] = (choices or {}).get(field.name)
            if kind is not field.type:
                options |= {"nargs": "+", "action": "extend"}
        options |= field.metadata["more"]
        text = texts.get(field.name, field.metadata["help"])
        group.add_argument(flag_name(field), help=text, **options)
    return parser


def to_config(parser: argparse.ArgumentParser, args: argparse.Namespace, **fixed: Any) -> Config:
    """The Config of parsed flags and `fixed`; what cannot work ends the program with code 2."""
    names = {field.name for field in dataclasses.fields(Config)}
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in (vars(args) | fixed).items()
        if key in names and value is not None
    }
    try:
        return Config(**settings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
