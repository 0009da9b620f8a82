"""Who holds which cases: folders, or phantoms, become hospitals that train, validate and test."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import generator, make_volume, normalize
from scans import phantom
from scans.cache import check_disk
from scans.cases import PreparedCase, load_cases
from scans.files import DataError
from scans.layouts import Case, find_cases, split_cases
from scans.organs import check_organs
from scans.splits import SPLITS
from study.config import Config

PHANTOM_SPLITS = {"train": range(12), "val": range(12, 16), "test": range(16, 24)}  # a modality
VAL_CASES = 8  # of a hospital, at most, that a round is validated on
FEW = 3  # validation cases of a modality; the best round of fewer is chance
COPIES = 5  # that are named, at most


class Hospital(NamedTuple):
    name: str
    modality: str  # "ct" or "mri"; "" for a folder that is only tested on, which may hold both
    train: Sequence[PreparedCase]
    val: Sequence[PreparedCase]
    test: Sequence[PreparedCase]


class Source(NamedTuple):
    """What --ct, --mri or --test names: a folder, or on phantoms a modality."""

    name: str
    folder: str
    modality: str  # "" for --test
    cases: list[Case]  # none on phantoms


def load_hospitals(
    config: Config, needed: Collection[str] = (), alone: bool = True
) -> tuple[dict[int, list[Hospital]], list[str]]:
    """All hospitals by seed, MRI first and --test last; and what to tell the user about the data.

    Every scan is read here, once. Raises DataError for folders that do not fit together, for cases
    that cannot be used, and where no training case has a needed modality; what can be told before a
    scan is read is told then. Unless alone, other hospitals may label the organs that these lack.
    """
    sources = find_sources(config)
    check_modalities(needed, trainable(config, sources))
    prepared: Mapping[Path, PreparedCase] = {}
    notes: list[str] = []
    if not config.on_phantoms:
        if alone or not config.partial_labels:
            labelled = {s.folder: {o for case in s.cases for o in case.masks} for s in sources}
            structures = {s.folder: s.cases[0].structures for s in sources}
            check_organs(labelled, config.organs, config.partial_labels, structures)
        prepared, notes = _load_scans(config, sources)
    by_seed: dict[int, list[Hospital]] = {}
    try:
        for seed in config.seeds:
            by_seed[seed] = []
            for source in sources:
                if config.on_phantoms:
                    parts = phantom_cases(seed, source.modality, config.organs, config.ct_window)
                else:
                    parts = split_prepared(source, prepared, seed, bool(config.test))
                    notes += _leave_out_empty(source.name, parts)
                by_seed[seed] += split_into_sites(source, parts, config.sites)
            check_modalities(needed, {h.modality for h in by_seed[seed] if h.train})
            notes += warn_of_few(by_seed[seed], needed if alone else ())
    except DataError as error:  # which may follow from what was left out
        lines = [note for note in notes if note.startswith("left out: ")]
        raise DataError("\n".join([*lines, str(error)])) from error
    return by_seed, list(dict.fromkeys(notes))  # seeds have the same


def check_modalities(needed: Iterable[str], held: Collection[str]) -> None:
    for modality in needed:
        if modality not in held:
            raise DataError(
                f"there are no {modality.upper()} training cases, and an arm needs some; give "
                f"folders with --{modality} or choose other --arms"
            )


def _load_scans(
    config: Config, sources: Sequence[Source]
) -> tuple[dict[Path, PreparedCase], list[str]]:
    """The usable cases of all folders by scan file, and what to tell the user about them."""
    cases = [case for source in sources for case in source.cases]
    cache = None if config.no_cache else Path(config.cache)
    notes = [str(remark) for remark in dict.fromkeys(r for case in cases for r in case.remarks)]
    if cache is not None:
        space = check_disk(cases, config.organs, config.spacing, cache, config.ct_window)
        if space:
            notes.append(space)
    prepared, left_out = load_cases(
        cases, config.organs, config.spacing, cache, config.skip_bad, config.ct_window
    )
    notes += [f"left out: {reason}" for reason in left_out]
    return prepared, notes + warn_of_cases(prepared) + warn_of_copies(sources, prepared)


def warn_of_cases(prepared: Mapping[Path, PreparedCase]) -> list[str]:
    """A warning for each thing that may be wrong with cases that are used, with their names."""
    files: dict[str, list[str]] = {}
    for case in prepared.values():
        for problem in case.problems:
            files.setdefault(f"{problem.what}; {problem.consequence}", []).append(str(problem.file))
    return [f"WARNING: {', '.join(names)}: {what}" for what, names in files.items()]


def warn_of_few(hospitals: Sequence[Hospital], modalities: Iterable[str]) -> list[str]:
    """Warnings of what so few cases cannot tell: the best round of a modality, or anything."""
    notes = []
    for modality in modalities:
        if sum(len(h.val) for h in hospitals if h.modality == modality) < FEW:
            few = f"fewer than three validation cases of {modality.upper()}"
            notes.append(f"WARNING: {few}: the choice of a round by them is chance")
    if not any(hospital.test for hospital in hospitals):
        none = "no hospital here has a test case, so the report has none of theirs"
        notes.append(f"WARNING: {none}; give a folder with --test, or three cases or more")
    return notes


def _leave_out_empty(name: str, parts: dict[str, list[PreparedCase]]) -> list[str]:
    """Take cases without any organ out of what a hospital trains and validates on; say how many."""
    notes = []
    for split in ("train", "val"):
        held = [case for case in parts[split] if case.volume.counts[1:].any()]
        n_empty = len(parts[split]) - len(held)
        if n_empty:
            notes.append(f"left out: {name}, {split}: {n_empty} scans without any organ")
        parts[split] = held
    return notes


def find_sources(config: Config) -> list[Source]:
    """What the config names, with the cases of its folders; no scan is opened yet.

    Raises DataError for a folder without cases, a scan in two of them, and hospitals of one name.
    """
    if config.on_phantoms:
        named = [("mri", "mri"), ("ct", "ct"), ("other-scanner", "")]
    else:
        named = [(folder, "mri") for folder in config.mri]
        named += [(folder, "ct") for folder in config.ct]
        named += [(folder, "") for folder in config.test]
    names = [os.path.basename(os.path.abspath(folder)) for folder, _ in named]
    names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, start=1)]
    sources = []
    for name, (folder, modality) in zip(names, named, strict=True):
        cases = []
        if not config.on_phantoms:
            cases = find_cases(folder, modality or None, config.layout or None, config.organs)
        sources.append(Source(name, folder, modality, cases))
    all_names = [site for source in sources for site in site_names(source, config.sites)]
    if len(set(all_names)) < len(all_names):
        raise DataError(f"two hospitals would have the same name ({', '.join(all_names)})")
    scans = Counter(os.path.realpath(case.image) for source in sources for case in source.cases)
    for scan, n in scans.items():
        if n > 1:
            where = "in two of the folders given, or under two names"
            raise DataError(f"{scan}: is there twice, {where}; a scan has one role only")
    return sources


def trainable(config: Config, sources: Iterable[Source]) -> set[str]:
    """The modalities that have training cases, as far as names of files tell.

    Raises DataError for a folder that has fewer than --sites asks for.
    """
    if config.on_phantoms:
        return {"mri", "ct"}
    found = set()
    for source in sources:
        if source.modality:
            for seed in config.seeds:
                train = split_cases(source.cases, seed, bool(config.test))["train"]
                check_sites(source, len(train), config.sites)
                if train:
                    found.add(source.modality)
    return found


def warn_of_copies(sources: Iterable[Source], prepared: Mapping[Path, PreparedCase]) -> list[str]:
    """A warning for scans that are there twice, one of them to train on, by their voxels.

    That is by what is made of them: how a file is compressed or named and what else its header says
    are no difference.
    """
    first: dict[int, Path] = {}
    copies = []
    for source in sources:  # those of --test come last
        for image in (case.image for case in source.cases if case.image in prepared):
            twin = first.get(prepared[image].image_crc)
            if twin:
                copies.append(f"{image} is a copy of {twin}")
            elif source.modality:
                first[prepared[image].image_crc] = image
    more = f"; and {len(copies) - COPIES} more" if len(copies) > COPIES else ""
    what = f"{len(copies)} scans are there twice, and what is trained on may be tested on"
    return [f"WARNING: {what}: {'; '.join(copies[:COPIES])}{more}"] if copies else []


def phantom_cases(
    seed: int, modality: str, organs: Sequence[str], ct_window: tuple[float, float]
) -> dict[str, list[PreparedCase]]:
    """The phantoms of a modality by split; for "" those of both, from a scanner no hospital has."""
    if modality:
        return {
            split: [
                _make_case(seed, modality, index, organs, "own", ct_window) for index in indices
            ]
            for split, indices in PHANTOM_SPLITS.items()
        }
    test = []
    for each in ("mri", "ct"):
        for index in PHANTOM_SPLITS["test"]:
            test.append(_make_case(seed, each, index, organs, "other", ct_window))
    return {"train": [], "val": [], "test": test}


def _make_case(
    seed: int,
    modality: str,
    index: int,
    organs: Sequence[str],
    scanner: str,
    ct_window: tuple[float, float],
) -> PreparedCase:
    """A phantom with the labels of these organs, numbered from 1."""
    image, labels = phantom.make_phantom(seed, modality, index, scanner)
    numbers = [0] + [organs.index(o) + 1 if o in organs else 0 for o in phantom.ORGANS]
    labels = np.array(numbers, dtype=np.uint8)[labels]
    labelled = np.ones(len(organs) + 1, dtype=bool)
    image = normalize(image, modality, ct_window)
    volume = make_volume(f"phantom{index:02d}", modality, image, labels, labelled)
    # It has no other grid than the model's.
    return PreparedCase(volume, lambda: (labels, (phantom.SPACING,) * 3), files=[])


def split_prepared(
    source: Source, prepared: Mapping[Path, PreparedCase], seed: int, test_elsewhere: bool
) -> dict[str, list[PreparedCase]]:
    """The usable cases of a folder, by split."""
    usable = [case for case in source.cases if case.image in prepared]
    parts: dict[str, list[Case]] = {"train": [], "val": [], "test": usable}
    if source.modality:
        parts = split_cases(usable, seed, test_elsewhere)
    return {split: [prepared[case.image] for case in cases] for split, cases in parts.items()}


def validation_cases(
    seed: int, hospitals: Iterable[Hospital], modalities: Sequence[str]
) -> list[PreparedCase]:
    """A few cases of each hospital of these modalities to validate on, the same in every round.

    Of more than VAL_CASES they are taken one by one, each time the one with the organs that those
    taken so far hold least often; an order drawn by the seed decides between equals. Training cases
    stand in at a hospital that has no validation case.
    """
    chosen = []
    for hospital in (h for h in hospitals if h.modality in modalities):
        cases = hospital.val or hospital.train
        holds = np.array([case.volume.counts[1:] > 0 for case in cases])  # (cases, organs)
        draws = generator(seed, hospital.name, "validation")
        left = torch.randperm(len(cases), generator=draws).tolist()
        taken: list[int] = []
        while left and len(taken) < VAL_CASES:
            worth = (holds[left] / (1 + holds[taken].sum(axis=0))).sum(axis=1)
            taken.append(left.pop(int(worth.argmax())))
        chosen += [cases[i] for i in sorted(taken)]
    return chosen


def split_into_sites(
    source: Source, parts: Mapping[str, Sequence[PreparedCase]], sites: int
) -> list[Hospital]:
    """Divide the cases of a source among its hospitals; one that is only tested on stays whole."""
    names = site_names(source, sites)
    if source.modality:
        check_sites(source, len(parts["train"]), sites)
    hospitals = []
    for i, name in enumerate(names):
        train, val, test = (parts[split][i :: len(names)] for split in SPLITS)
        hospitals.append(Hospital(name, source.modality, train, val, test))
    return hospitals


def check_sites(source: Source, n_train: int, sites: int) -> None:
    if sites > 1 and n_train < sites:
        raise DataError(f"--sites {sites}: {source.folder} has {n_train} training cases, too few")


def site_names(source: Source, sites: int) -> list[str]:
    if sites == 1 or not source.modality:
        return [source.name]
    return [f"{source.name}-{i + 1}" for i in range(sites)]


def record(by_seed: Mapping[int, Iterable[Hospital]]) -> list[dict]:
    """Which case of each hospital went where, with each seed, and what its files were."""
    return [
        {
            "hospital": hospital.name,
            "seed": seed,
            "cases": {s: [c.volume.id for c in getattr(hospital, s)] for s in SPLITS},
            "files": {c.volume.id: c.files for s in SPLITS for c in getattr(hospital, s)},
        }
        for seed, hospitals in by_seed.items()
        for hospital in hospitals
    ]
