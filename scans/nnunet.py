"""nnU-Net's raw layout: what its dataset.json says, and which cases there are."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scans.files import DataError, listed, names_in, read_json, reading
from scans.organs import match, spelling

# How the words of a channel's name begin, by modality; whole words end in a space.
WORDS = {"ct": ("ct",), "neither": ("pet", "suv", "spect ", "ultraso", "xray")}
WORDS["mri"] = ("mr", "t1", "t2", "pd", "flair", "dwi", "adc", "dixon", "stir", "spir", "haste")
WORDS["mri"] += ("vibe", "gre ", "ssfp", "trufi", "water", "fat", "inphase", "outphase", "opposed")
CASES = "the cases are those in imagesTr and labelsTr"
PARTS = ("tumor", "tumour", "lesion", "cyst", "cancer")  # in names of what lies within an organ


def read_dataset_json(
    file: Path, organs: Sequence[str]
) -> tuple[list[str], dict[str, tuple[int, ...]], str]:
    """The names of the channels, the values of each label, and the ending of files."""
    dataset = read_json(file)
    with reading(file):
        missing = {"channel_names", "labels", "file_ending"} - dataset.keys()
        if missing:
            raise ValueError(f"it has no {listed(sorted(missing))}; nnU-Net 2 writes them")
        channels = [str(name) for name in dataset["channel_names"].values()]
        labels = {n: tuple(np.atleast_1d(v).tolist()) for n, v in dataset["labels"].items()}
        wanted = {name for names in match(organs, labels).values() for name in names}
        for name, values in labels.items():
            if not (values and all(n in range(name in wanted, 2**16) for n in values)):
                raise ValueError(f"label {name} is {values}; expected whole numbers, 1 to 65535")
            labels[name] = tuple(map(int, values))  # 1.0 is 1
    if "ignore" in map(spelling, labels):
        what = "has a label 'ignore', whose voxels would be trained and scored on as background"
        raise DataError(f"{file}: {what}; take it out of labels if no voxel has it")
    return channels, labels, str(dataset["file_ending"])


def modality_of(file: Path, channels: Sequence[str], modality: str | None) -> str:
    """The modality that the channel's name says, else the one given."""
    if len(channels) != 1:
        raise DataError(f"{file}: has {len(channels)} channels; expected one, CT or MRI")
    words = re.findall("[a-z]+[0-9]*", channels[0].lower())
    found = {m for m, starts in WORDS.items() for w in words if f"{w} ".startswith(starts)}
    if not found and modality:
        return modality
    if found not in ({"ct"}, {"mri"}):
        advice = "Name it CT or MRI; for a name that says nothing, give --ct, --mri or --modality"
        raise DataError(f"{file}: is channel {channels[0]!r} CT or MRI? {advice}")
    return found.pop()


def find_files(root: Path, ending: str) -> dict[str, tuple[Path, Path]]:
    """{id: (its image, its labels)} of each case that has at least one of the two."""
    images, labels = names_in(root / "imagesTr"), names_in(root / "labelsTr")
    right = f"_0000{ending}"
    ids = {name.removesuffix(ending) for name in labels if name.endswith(ending)}
    ids |= {name.removesuffix(right) for name in images if name.endswith(right)}
    return {
        id_: (
            images.get(f"{id_}{right}", root / "imagesTr" / f"{id_}{right}"),
            labels.get(f"{id_}{ending}", root / "labelsTr" / f"{id_}{ending}"),
        )
        for id_ in sorted(ids)
    }


def warn_of_parts(values: Mapping[str, tuple[int, ...]], organs: Sequence[str]) -> list[str]:
    """A warning where a part of an organ, a tumour for instance, has a label of its own."""
    found = match(organs, values)
    used = {value for names in found.values() for name in names for value in values[name]}
    parts = [name for name in values if any(part in name.casefold() for part in PARTS)]
    apart = [name for name in parts if not used.issuperset(values[name])]
    if not (apart and found):
        return []
    what = f"labels {', '.join(apart)} apart from the organs, where such voxels count as background"
    return [f"{what}; {{'liver': [1, 2]}} makes label 2 part of the liver"]


def warn_of_lists(file: Path, n_cases: int) -> list[str]:
    """Warnings where dataset.json lists other cases than the folders hold; the folders count."""
    dataset, root = read_json(file), file.parent
    folders = [os.path.realpath(root / name) for name in ("imagesTr", "labelsTr")]
    text = json.dumps(dataset.get("training"), ensure_ascii=False)
    paths = [os.path.realpath(root / path) for path in re.findall(r'[^"]+\.nii[^"]*', text)]
    lists = ["dataset"] if dataset.get("dataset") else []
    lists += ["training"] if any(os.path.dirname(path) not in folders for path in paths) else []
    warnings = [f"its list {name!r} is not read; {CASES}" for name in lists]
    n = dataset.get("numTraining")
    if isinstance(n, int) and n < n_cases:
        warnings.append(f"numTraining is {n}, but {n_cases} cases are here, and all are read")
    return warnings
