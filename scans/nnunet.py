"""nnU-Net's raw layout: what its dataset.json says, and which cases there are."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scans.files import DataError, names_in, read_json, reading
from scans.organs import NO_STRUCTURES, match, spelling

CHANNELS = {  # how the words of nnU-Net's channel names begin, by modality
    "ct": ("ct",),
    "mri": (
        *("mr", "t1", "t2", "pd", "flair", "dwi", "adc", "dixon", "stir", "spir", "haste", "vibe"),
        *("gre", "ssfp", "trufi", "water", "fat", "inphase", "outphase", "opposed"),
    ),
    "neither": ("pet", "suv", "spect", "ultraso", "xray"),
}
PARTS = ("tumor", "tumour", "lesion", "cyst", "cancer")  # in names of what lies within an organ


def read_dataset_json(
    file: Path, organs: Sequence[str]
) -> tuple[list[str], dict[str, tuple[int, ...]], str]:
    """The names of the channels, the values of each label, and the ending of files."""
    dataset = read_json(file)
    with reading(file):
        channels = [str(name) for name in dataset["channel_names"].values()]
        labels = {n: tuple(map(int, np.atleast_1d(v))) for n, v in dataset["labels"].items()}
        ending = str(dataset["file_ending"])
        for name in (name for names in match(organs, labels).values() for name in names):
            if min(labels[name]) < 1:
                raise ValueError(f"label {name} is {min(labels[name])}; expected 1 or more")
    if "ignore" in map(spelling, labels):
        raise DataError(
            f"{file}: has a label 'ignore', whose voxels would be trained and scored on as "
            "background; take it out of labels if no voxel has it"
        )
    return channels, labels, ending


def modality_of(file: Path, channels: Sequence[str], modality: str | None) -> str:
    """The modality that the channel's name says, else the one given."""
    if len(channels) != 1:
        raise DataError(f"{file}: has {len(channels)} channels; expected one, CT or MRI")
    words = re.findall("[a-z]+[0-9]*", channels[0].lower())
    found = {m for m, starts in CHANNELS.items() for w in words if w.startswith(starts)}
    if not found and modality:
        return modality
    if found not in ({"ct"}, {"mri"}):
        raise DataError(
            f"{file}: is channel {channels[0]!r} CT or MRI? Name it CT, MRI or by its sequence, T2 "
            "for instance; --ct, --mri or --modality tells it for a name that says nothing"
        )
    return found.pop()


def find_files(root: Path, ending: str) -> dict[str, tuple[Path, Path]]:
    """{id: (its image, its labels)} of each case of which one of the two is there."""
    images, labels = names_in(root / "imagesTr"), names_in(root / "labelsTr")
    ids = {name.removesuffix(ending) for name in labels if name.endswith(ending)}
    right = f"_0000{ending}"
    ids |= {name.removesuffix(right) for name in images if name.endswith(right)}
    cases = {}
    for id_ in sorted(ids):
        image, label = f"{id_}{right}", f"{id_}{ending}"
        image_file = images.get(image, root / "imagesTr" / image)
        cases[id_] = image_file, labels.get(label, root / "labelsTr" / label)
    return cases


def warn_of_parts(structures: dict[str, tuple[int, ...]], found: dict[str, list[str]]) -> list[str]:
    """A warning where a part of an organ, a tumour for instance, has a label of its own."""
    used = {value for names in found.values() for name in names for value in structures[name]}
    parts = [
        name
        for name, values in structures.items()
        if any(part in name.casefold() for part in PARTS) and not used.issuperset(values)
    ]
    if not (parts and found):
        return []
    what = f"labels {', '.join(parts)} apart from the organs, where such voxels count as background"
    return [f"{what}; {{'liver': [1, 2]}} makes label 2 part of the liver"]


def is_structure(name: str) -> bool:
    return spelling(name) not in NO_STRUCTURES
