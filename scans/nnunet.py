"""nnU-Net's raw layout: what its dataset.json says, and which images there are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scans.files import DataError, names_in
from scans.organs import match, spelling

IMAGES = r"\.nii|\.nii\.gz|\.mha|\.nrrd|\.tiff?|\.png"  # how names of images end
CHANNELS = {  # how the words of nnU-Net's channel names begin, by modality
    "ct": ("ct",),
    "mri": (
        *("mr", "t1", "t2", "pd", "flair", "dwi", "adc", "dixon", "stir", "spir", "haste", "vibe"),
        *("gre", "ssfp", "trufi", "water", "fat", "inphase", "outphase", "opposed"),
    ),
    "neither": ("pet", "suv", "spect", "ultraso", "xray"),
}


def read_dataset_json(
    file: Path, organs: Sequence[str]
) -> tuple[list[str], dict[str, tuple[int, ...]], str]:
    """The names of the channels, the values of each label, and the ending of files."""
    try:
        dataset = json.loads(file.read_text(encoding="utf-8-sig"))
        channels = [str(name) for name in dataset["channel_names"].values()]
        labels = {
            name: tuple(int(v) for v in np.atleast_1d(value))
            for name, value in dataset["labels"].items()
        }
        for name in (name for names in match(organs, labels).values() for name in names):
            if min(labels[name]) < 1 or max(labels[name]) > 65535:
                raise ValueError(f"label {name} is {labels[name]}, expected 1 to 65535")
        ending = str(dataset["file_ending"])
        if not ending.startswith("."):
            raise ValueError(f"file_ending {ending!r} has no dot")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{file}: expected nnU-Net's channel_names, labels and file_ending "
            f"({type(error).__name__}: {error})"
        ) from error
    if "ignore" in map(spelling, labels):
        raise DataError(
            f"{file}: has a label 'ignore', whose voxels would be trained and scored on as "
            "background; take it out of labels if no voxel has it"
        )
    return channels, labels, ending


def modality_of(file: Path, channels: Sequence[str], modality: str | None) -> str:
    """What the channel is by its name, else what it is said to be."""
    if len(channels) != 1:
        raise DataError(
            f"{file}: has {len(channels)} channels; expected one, CT or an MRI sequence"
        )
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


def find_images(root: Path, ending: str) -> dict[str, tuple[Path, str]]:
    """{id: its image, and what is wrong with the name} of all that images or labels speak of."""
    folder, names = root / "imagesTr", names_in(root / "imagesTr")
    right = f"_0000{ending}"
    found = {
        name.removesuffix(right): (folder / name, "") for name in names if name.endswith(right)
    }
    labels = [n.removesuffix(ending) for n in names_in(root / "labelsTr") if n.endswith(ending)]
    for name in names:
        stem = re.fullmatch(rf"(.+?)({re.escape(ending)}|{IMAGES})", name, re.IGNORECASE)
        if stem and not name.endswith(right):
            id_ = stem[1] if stem[1] in labels else re.sub(r"_\d{4}$", "", stem[1])
            problem = f"nnU-Net's name for it would be {id_}{right}; rename it"
            found.setdefault(id_, (folder / name, problem))
    return {id_: (folder / f"{id_}{right}", "") for id_ in labels} | found
