"""Who holds which cases: folders, or phantoms, become hospitals that train, validate and test.

from config import Config
from hospitals import load_hospitals
by_seed, left_out = load_hospitals(Config(ct=("ct_set",), mri=("mri_set",)))
print([(h.name, len(h.train), len(h.val), len(h.test)) for h in by_seed[42]])
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import phantom
from config import Config
from data import Volume, fingerprint, load_cases, make_volume, normalize
from datasets import SPLITS, Case, DataError, check_organs, find_cases, split_cases

PHANTOM_SPLITS = {"train": range(12), "val": range(12, 16), "test": range(16, 24)}  # a modality


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
    config: Config, alone: bool = True
) -> tuple[dict[int, list[Hospital]], list[str]]:
    """All hospitals by seed, MRI first and --test last; and which cases were left out, and why.

    Every scan is read here, once. Raises DataError for folders that do not fit together and for
    cases that cannot be used. Unless alone, other hospitals may label the organs that these lack.
    """
    sources = find_sources(config)
    volumes: Mapping[Path, Any] = {}
    left_out: list[str] = []
    if not config.on_phantoms:
        labelled = {source.folder: set(source.cases[0].masks) for source in sources}
        if alone or not config.partial_labels:
            check_organs(labelled, config.organs, config.partial_labels)
        cases = [case for source in sources for case in source.cases]
        cache = None if config.no_cache else Path(config.cache)
        volumes, left_out = load_cases(cases, config.organs, config.spacing, cache, config.skip_bad)
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
                        left_out.append(f"{source.name}, {split}: {n} scans without any organ")
                    parts[split] = held
            by_seed[seed] += split_into_sites(source, parts, config.sites)
    return by_seed, left_out


def find_sources(config: Config) -> list[Source]:
    """What the config names, with the cases of its folders; no scan is opened yet.

    Raises DataError for a folder without cases, a scan in two of them, and hospitals of one name.
    """
    named = [(folder, m) for m in ("mri", "ct") for folder in getattr(config, m)]
    named = [(m, m) for m in ("mri", "ct")] if config.on_phantoms else named
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


def phantom_cases(seed: int, modality: str, organs: Sequence[str]) -> dict[str, list[Volume]]:
    """The phantoms of a modality, by split."""
    everything = np.ones(len(organs) + 1, dtype=bool)
    label = [0] + [organs.index(o) + 1 if o in organs else 0 for o in phantom.ORGANS]
    new_label = np.array(label, dtype=np.uint8)

    def volume(index: int) -> Volume:
        image, labels = phantom.phantom(seed, modality, index)
        image, labels = normalize(image, modality), new_label[labels]
        return make_volume(f"phantom{index:02d}", modality, image, labels, everything)

    return {split: [volume(index) for index in PHANTOM_SPLITS[split]] for split in SPLITS}


def split_volumes(
    source: Source, volumes: Mapping[Path, Any], seed: int, test_elsewhere: bool
) -> dict[str, list[Volume]]:
    """The usable cases of a folder, by split."""
    usable = [case for case in source.cases if case.image in volumes]
    parts: dict[str, list[Case]] = {"train": [], "val": [], "test": usable}
    if source.modality:
        parts = split_cases(usable, seed, test_elsewhere)
    return {split: [volumes[case.image] for case in cases] for split, cases in parts.items()}


def split_into_sites(
    source: Source, parts: Mapping[str, Sequence[Volume]], sites: int
) -> list[Hospital]:
    """Divide the cases of a source among its hospitals; one that is only tested on stays whole."""
    names = site_names(source, sites)
    if len(names) > 1 and len(parts["train"]) < sites:
        n = len(parts["train"])
        raise DataError(f"--sites {sites}: {source.folder} has {n} training cases, too few")
    return [
        Hospital(name, source.modality, *(parts[split][i :: len(names)] for split in SPLITS))
        for i, name in enumerate(names)
    ]


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
