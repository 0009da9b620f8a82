"""Who holds which cases: folders, or phantoms, become hospitals that train, validate and test.

from config import Config
from hospitals import load_hospitals
by_seed, notes = load_hospitals(Config(ct=("ct_set",), mri=("mri_set",)))
print([(h.name, len(h.train), len(h.val), len(h.test)) for h in by_seed[42]])
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import phantom
from cache import fingerprint
from config import Config
from data import Volume, check_disk, generator, load_cases, make_volume, normalize
from datasets import SPLITS, Case, DataError, check_organs, find_cases, split_cases

PHANTOM_SPLITS = {"train": range(12), "val": range(12, 16), "test": range(16, 24)}  # a modality
VAL_CASES = 8  # of a hospital, at most, that a round is validated on


class Hospital(NamedTuple):
    name: str
    modality: str  # "ct" or "mri"; "" for a folder that is only tested on, which may hold both
    train: Sequence[Volume]
    val: Sequence[Volume]
    test: Sequence[Volume]


class Source(NamedTuple):
    """What --ct, --mri or --test names: a folder, or on phantoms a modality."""

    name: str
    folder: str
    modality: str  # "" for --test
    cases: list[Case]  # none on phantoms


def load_hospitals(
    config: Config, alone: bool = True, sources: Sequence[Source] | None = None
) -> tuple[dict[int, list[Hospital]], list[str]]:
    """All hospitals by seed, MRI first and --test last; and what to tell of cases left out or odd.

    Every scan is read here, once. Raises DataError for folders that do not fit together and for
    cases that cannot be used. Unless alone, other hospitals may label the organs that these lack.
    sources: find_sources's, if they have been found already.
    """
    sources = sources or find_sources(config)
    volumes: Mapping[Path, Any] = {}
    notes: list[str] = []
    if not config.on_phantoms:
        labelled = {source.folder: set(source.cases[0].masks) for source in sources}
        if alone or not config.partial_labels:
            check_organs(labelled, config.organs, config.partial_labels)
        cases = [case for source in sources for case in source.cases]
        cache = None if config.no_cache else Path(config.cache)
        if cache and (wanted := check_disk(cases, config.organs, config.spacing, cache)):
            print(wanted)
        volumes, left_out = load_cases(cases, config.organs, config.spacing, cache, config.skip_bad)
        notes = [f"left out: {reason}" for reason in left_out] + warn_of_copies(sources)
    by_seed: dict[int, list[Hospital]] = {}
    for seed in config.seeds:
        by_seed[seed] = []
        for source in sources:
            if config.on_phantoms:
                parts = phantom_cases(seed, source.modality, config.organs)
            else:
                parts = split_volumes(source, volumes, seed, test_elsewhere=bool(config.test))
                for split in ("train", "val"):
                    held = [volume for volume in parts[split] if volume.counts[1:].any()]
                    if n := len(parts[split]) - len(held):
                        where = f"{source.name}, {split}"
                        notes.append(f"left out: {where}: {n} scans without any organ")
                    parts[split] = held
            by_seed[seed] += split_into_sites(source, parts, config.sites)
    return by_seed, notes


def find_sources(config: Config) -> list[Source]:
    """What the config names, with the cases of its folders; no scan is opened yet.

    Raises DataError for a folder without cases, a scan in two of them, and hospitals of one name.
    """
    named = [(folder, m) for m in ("mri", "ct") for folder in getattr(config, m)]
    named = [("mri", "mri"), ("ct", "ct"), ("other-scanner", "")] if config.on_phantoms else named
    named += [(folder, "") for folder in config.test]
    names = [os.path.basename(os.path.abspath(folder)) for folder, _ in named]
    names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, start=1)]
    sources = []
    for name, (folder, modality) in zip(names, named, strict=True):
        cases = []
        if not config.on_phantoms:
            cases = find_cases(folder, modality or None, config.layout or None)
        sources.append(Source(name, folder, modality, cases))
    all_names = [site for source in sources for site in site_names(source, config.sites)]
    if len(set(all_names)) < len(all_names):
        raise DataError(f"two hospitals would have the same name ({', '.join(all_names)})")
    scans = Counter(case.image.resolve() for source in sources for case in source.cases)
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
    for source in (source for source in sources if source.modality):
        for seed in config.seeds:
            train = split_cases(source.cases, seed, bool(config.test))["train"]
            check_sites(source, len(train), config.sites)
            found |= {source.modality} if train else set()
    return found


def warn_of_copies(sources: Iterable[Source]) -> list[str]:
    """A warning for scans of --test folders that are, byte for byte, in folders to train on."""
    first: dict[tuple, Case] = {}
    copies = []
    for source in sources:  # those of --test come last
        for case in source.cases:
            [(_, *content)] = fingerprint(case, ())
            twin = first.setdefault(tuple(content), case)
            if twin.folder != case.folder and not source.modality:
                copies.append(f"{case.image} is a copy of {twin.image}")
    more = f", and {len(copies) - 1} others too" if len(copies) > 1 else ""
    return [f"WARNING: what is trained on is tested on: {copies[0]}{more}"] if copies else []


def phantom_cases(seed: int, modality: str, organs: Sequence[str]) -> dict[str, list[Volume]]:
    """The phantoms of a modality, by split; without one, of both, from a scanner that none has."""
    everything = np.ones(len(organs) + 1, dtype=bool)
    label = [0] + [organs.index(o) + 1 if o in organs else 0 for o in phantom.ORGANS]
    new_label = np.array(label, dtype=np.uint8)

    def volume(modality: str, index: int, scanner: str = "own") -> Volume:
        image, labels = phantom.phantom(seed, modality, index, scanner)
        image, labels = normalize(image, modality), new_label[labels]
        return make_volume(f"phantom{index:02d}", modality, image, labels, everything)

    if not modality:
        other = [volume(m, i, "other") for m in ("mri", "ct") for i in PHANTOM_SPLITS["test"]]
        return {"train": [], "val": [], "test": other}
    return {split: [volume(modality, i) for i in PHANTOM_SPLITS[split]] for split in SPLITS}


def split_volumes(
    source: Source, volumes: Mapping[Path, Any], seed: int, test_elsewhere: bool
) -> dict[str, list[Volume]]:
    """The usable cases of a folder, by split."""
    usable = [case for case in source.cases if case.image in volumes]
    parts: dict[str, list[Case]] = {"train": [], "val": [], "test": usable}
    if source.modality:
        parts = split_cases(usable, seed, test_elsewhere)
    return {split: [volumes[case.image] for case in cases] for split, cases in parts.items()}


def validation_cases(seed: int, hospitals: Iterable[Hospital]) -> list[Volume]:
    """A few cases of each hospital to validate on, the same in every round.

    Of more than VAL_CASES those are taken, in an order drawn by the seed, that hold what the ones
    before lack most. Training cases stand in at a hospital that has no validation case.
    """
    chosen = []
    for hospital in hospitals:
        cases = hospital.val or hospital.train
        holds = np.array([case.counts[1:] > 0 for case in cases])  # (cases, organs)
        draws = generator(seed, hospital.name, "validation")
        left = torch.randperm(len(cases), generator=draws).tolist()
        taken: list[int] = []
        while left and len(taken) < VAL_CASES:
            worth = (holds[left] / (1 + holds[taken].sum(axis=0))).sum(axis=1)
            taken.append(left.pop(int(worth.argmax())))
        chosen += [cases[i] for i in sorted(taken)]
    return chosen


def split_into_sites(
    source: Source, parts: Mapping[str, Sequence[Volume]], sites: int
) -> list[Hospital]:
    """Divide the cases of a source among its hospitals; one that is only tested on stays whole."""
    names = site_names(source, sites)
    if source.modality:
        check_sites(source, len(parts["train"]), sites)
    return [
        Hospital(name, source.modality, *(parts[split][i :: len(names)] for split in SPLITS))
        for i, name in enumerate(names)
    ]


def check_sites(source: Source, n_train: int, sites: int) -> None:
    if sites > 1 and n_train < sites:
        raise DataError(f"--sites {sites}: {source.folder} has {n_train} training cases, too few")


def site_names(source: Source, sites: int) -> list[str]:
    if sites == 1 or not source.modality:
        return [source.name]
    return [f"{source.name}-{i + 1}" for i in range(sites)]


def record(by_seed: Mapping[int, list[Hospital]], organs: Sequence[str]) -> dict[str, dict]:
    """Of each hospital by name: which case went where, by seed, and what each case's files were."""
    found: dict[str, dict] = {}
    for seed, hospitals in by_seed.items():
        for hospital in hospitals:
            about = found.setdefault(hospital.name, {"splits": {}, "files": {}})
            splits = {split: getattr(hospital, split) for split in SPLITS}
            about["splits"][seed] = {split: [c.id for c in part] for split, part in splits.items()}
            for volume in (c for part in splits.values() for c in part if c.case):
                if volume.id not in about["files"]:
                    stamps = fingerprint(volume.case, organs)
                    about["files"][volume.id] = [stamp[1:] for stamp in stamps]
    return found
