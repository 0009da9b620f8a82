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
from scans.cases import PreparedCase, load_cases
from scans.files import DataError, listed
from scans.layouts import SPLITS, Case, find_cases, split_cases
from scans.organs import check_organs
from study.config import Config

PHANTOM_SPLITS = {"train": range(12), "val": range(12, 16), "test": range(16, 24)}  # per modality
VAL_CASES = 8  # per hospital, at most, to validate a round on
FEW = 3  # validation cases of a modality; with fewer, chance chooses the best round
Parts = Mapping[str, Sequence[PreparedCase]]  # by split


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
    sites: list[str]  # the names of its hospitals
    cases: list[Case]  # none on phantoms


def load_hospitals(
    config: Config, needed: Collection[str] = (), all_sites_local: bool = True
) -> tuple[dict[int, list[Hospital]], list[str]]:
    """All hospitals by seed, MRI first and --test last; and what to tell the user about the data.

    Every scan is read here, once. Raises DataError for folders that do not fit together, unusable
    cases, and if no training case has a needed modality; problems that file names show are raised
    before any scan is read. all_sites_local=False allows organs that only other hospitals label.
    """
    sources = find_sources(config)
    check_modalities(needed, {source.modality for source in sources})
    if config.on_phantoms:
        return {seed: phantom_hospitals(config, seed, sources) for seed in config.seeds}, []
    cases = [case for source in sources for case in source.cases]
    warnings, left_out = [warning for case in cases for warning in case.warnings], []
    by_seed: dict[int, list[Hospital]] = {}
    try:
        if all_sites_local or not config.partial_labels:
            structures = {source.folder: source.cases[0].structures for source in sources}
            check_organs(structures, config.organs, config.partial_labels)
        settings = config.spacing, Path(config.cache), config.skip_bad, config.ct_window
        prepared, bad = load_cases(cases, config.organs, *settings)
        left_out += [f"left out: {error}" for error in bad]
        for seed in config.seeds:
            by_seed[seed] = []
            for source in sources:
                parts, empty = split_prepared(source, prepared, seed, bool(config.test))
                by_seed[seed] += split_into_sites(source, parts)
                left_out += empty
            check_modalities(needed, {h.modality for h in by_seed[seed] if h.train})
            warnings += warn_of_few(by_seed[seed], needed if all_sites_local else ())
    except DataError as error:  # which may follow from what was left out or is not read
        raise DataError("\n".join([*_notes(left_out, warnings), str(error)])) from error
    images = [(c.image, s.modality) for s in sources for c in s.cases if c.image in prepared]
    warnings += warn_of_cases(prepared)
    warnings += warn_of_copies((f, prepared[f].image_crc, bool(m)) for f, m in images)
    return by_seed, _notes(left_out, warnings)


def _notes(left_out: Iterable[str], warnings: Iterable[str]) -> list[str]:
    """What to tell the user, once, because seeds and cases have the same."""
    return list(dict.fromkeys([*left_out, *(f"WARNING: {warning}" for warning in warnings)]))


def check_modalities(needed: Iterable[str], held: Collection[str]) -> None:
    for modality in needed:
        if modality not in held:
            what = f"there are no {modality.upper()} training cases, and an arm needs some"
            raise DataError(f"{what}; give folders with --{modality} or choose other --arms")


def find_sources(config: Config) -> list[Source]:
    """What the config names, with the cases of its folders; no scan is opened yet.

    Raises DataError for a folder without cases, a scan in two of them, and hospitals with one name.
    """
    named = [(folder, "mri") for folder in config.mri]
    named += [(folder, "ct") for folder in config.ct]
    named += [(folder, "") for folder in config.test]
    if config.on_phantoms:
        named = [("mri", "mri"), ("ct", "ct"), ("unseen-scanner", "")]
    names = [os.path.basename(os.path.abspath(folder)) for folder, _ in named]
    names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, start=1)]
    sources = []
    for name, (folder, modality) in zip(names, named, strict=True):
        several = config.sites > 1 and modality
        sites = [f"{name}-{i + 1}" for i in range(config.sites)] if several else [name]
        cases = []
        if not config.on_phantoms:
            kind, layout = modality or None, config.layout or None
            cases = find_cases(folder, kind, layout, config.organs, split=bool(modality))
        sources.append(Source(name, folder, modality, sites, cases))
    all_names = [site for source in sources for site in source.sites]
    if len(set(all_names)) < len(all_names):
        raise DataError(f"two hospitals would have the same name ({', '.join(all_names)})")
    scans = Counter(os.path.realpath(case.image) for source in sources for case in source.cases)
    for scan, n in scans.items():
        if n > 1:
            raise DataError(f"{scan}: is there twice, in two of the folders or under two names")
    return sources


def split_prepared(
    source: Source, prepared: Mapping[Path, PreparedCase], seed: int, test_elsewhere: bool
) -> tuple[Parts, list[str]]:
    """The usable cases of a folder by split, and what of it is left out of train and val."""
    usable = [case for case in source.cases if case.image in prepared]
    split: dict[str, list[Case]] = {"train": [], "val": [], "test": usable}
    if source.modality:
        split = split_cases(usable, seed, test_elsewhere)
    parts, left_out = {}, []
    for name, cases in split.items():
        found = [prepared[case.image] for case in cases]
        parts[name] = [case for case in found if name == "test" or case.counts[1:].any()]
        n_empty = len(found) - len(parts[name])
        if n_empty:
            left_out.append(f"left out: {source.name}, {name}: {n_empty} scans without any organ")
    return parts, left_out


def split_into_sites(source: Source, parts: Parts) -> list[Hospital]:
    """Divide the cases of a source among its hospitals; a test source has only one."""
    n_sites, n_train = len(source.sites), len(parts["train"])
    if n_sites > 1 and n_train < n_sites:
        raise DataError(f"--sites {n_sites}: {source.folder} has {n_train} training cases, too few")
    hospitals = []
    for i, name in enumerate(source.sites):
        train, val, test = (parts[split][i::n_sites] for split in SPLITS)
        hospitals.append(Hospital(name, source.modality, train, val, test))
    return hospitals


def phantom_hospitals(config: Config, seed: int, sources: Sequence[Source]) -> list[Hospital]:
    """Hospitals of phantoms; the source without modality is the unseen scanner."""
    hospitals = []
    for source in sources:
        parts: dict[str, list[PreparedCase]] = {split: [] for split in SPLITS}
        scanner = "seen" if source.modality else "unseen"
        for split in SPLITS if source.modality else ("test",):
            for modality in (source.modality,) if source.modality else ("mri", "ct"):
                for index in PHANTOM_SPLITS[split]:
                    parts[split].append(phantom_case(config, seed, modality, index, scanner))
        hospitals += split_into_sites(source, parts)
    return hospitals


def phantom_case(
    config: Config, seed: int, modality: str, index: int, scanner: str
) -> PreparedCase:
    """A phantom with the labels of the organs asked for, numbered from 1."""
    image, labels = phantom.make_phantom(seed, modality, index, scanner)
    organs = config.organs
    numbers = [0] + [organs.index(o) + 1 if o in organs else 0 for o in phantom.ORGANS]
    labels = np.array(numbers, dtype=np.uint8)[labels]
    labelled = np.ones(len(organs) + 1, dtype=bool)
    image = normalize(image, modality, config.ct_window)
    # Each seed has patients of its own.
    volume = make_volume(f"phantom{seed}-{index:02d}", modality, image, labels, labelled)
    target = labels, (phantom.SPACING,) * 3  # it has the model's grid only
    return PreparedCase(
        volume.id, modality, volume.counts, labelled, lambda: volume, lambda: target
    )


def validation_cases(
    seed: int, hospitals: Iterable[Hospital], modalities: Sequence[str]
) -> list[PreparedCase]:
    """A few cases of each hospital of these modalities to validate on, the same in every round.

    A hospital with more than VAL_CASES gives those that balance the organs: each next case holds
    the organs that are rarest among those chosen, and the seed breaks ties. Training cases
    stand in at a hospital that has no validation case.
    """
    chosen = []
    for hospital in (h for h in hospitals if h.modality in modalities):
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


def record(hospitals: Iterable[Hospital]) -> dict[str, str]:
    """{hospital and case: its split and its contents}, which a run must find unchanged."""
    return {
        f"{hospital.name} {case.modality} {case.id}": f"{split} {case.contents}".strip()
        for hospital in hospitals
        for split in SPLITS
        for case in getattr(hospital, split)
    }


def warn_of_cases(prepared: Mapping[Path, PreparedCase]) -> list[str]:
    """Each warning about cases that are used, with the names of some of their scans."""
    files: dict[str, list[Path]] = {}
    for image, case in prepared.items():
        for warning in case.warnings:
            files.setdefault(warning, []).append(image)
    return [f"{listed(images)}: {warning}" for warning, images in files.items()]


def warn_of_copies(images: Iterable[tuple[Path, int, bool]]) -> list[str]:
    """A warning for scans that are there twice, one of them to train on.

    images: (file, checksum of its voxels, whether it is trained on), those only tested on last.
    """
    first: dict[int, Path] = {}
    copies = []
    for image, crc, trained_on in images:
        if crc in first:
            copies.append(f"{image} is a copy of {first[crc]}")
        elif trained_on:
            first[crc] = image
    what = f"{len(copies)} scans are there twice, so training cases may be tested on"
    return [f"{what}: {listed(copies)}"] if copies else []


def warn_of_few(hospitals: Sequence[Hospital], modalities: Iterable[str]) -> list[str]:
    """Warnings of too few cases: to choose a modality's best round, or to test at all."""
    warnings = []
    for modality in modalities:
        if sum(len(h.val) for h in hospitals if h.modality == modality) < FEW:
            few = f"fewer than three validation cases of {modality.upper()}"
            warnings.append(f"{few}: the best round is then chosen by chance")
    if not any(hospital.test for hospital in hospitals):
        warnings.append("no hospital here has a test case; give --test, or three cases or more")
    return warnings
