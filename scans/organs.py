"""Names of structures: what is asked for, found among what folders label in their own spelling.

Case, spaces, hyphens and underscores do not matter, nor where left or right stands and how short:
Kidney_L, "left kidney" and kidney_left are one.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from scans.files import DataError
from scans.nifti import Problem

ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")  # the paper's; phantoms' too
AMOS = {  # by number: the names in its dataset.json are misspelt
    1: "spleen",
    2: "right kidney",
    3: "left kidney",
    4: "gallbladder",
    5: "esophagus",
    6: "liver",
    7: "stomach",
    8: "aorta",
    9: "postcava",
    10: "pancreas",
    11: "right adrenal gland",
    12: "left adrenal gland",
    13: "duodenum",
    14: "bladder",
    15: "prostate or uterus",
}
SIDES = {"l": "left", "lt": "left", "r": "right", "rt": "right"}
SYNONYMS = {  # AMOS22's names, and TotalSegmentator's
    "kidneys": "kidney",
    "postcava": "inferiorvenacava",
    "bladder": "urinarybladder",
}
NO_STRUCTURES = ("background", "ignore")
PARTS = ("tumor", "tumour", "lesion", "cyst", "cancer")  # in names of what lies within an organ


def spelling(name: str) -> str:
    """A name as all its spellings have it: "kidneyleft" for Kidney_L. Empty if nothing is left."""
    what = sides = ""
    for word in re.findall(r"[^\W_]+", name.casefold()):
        word = SIDES.get(word, word)
        before, middle, after = re.findall("^(left|right)?(.*?)(left|right)?$", word)[0]
        what, sides = what + middle, sides + before + after
    return SYNONYMS.get(what, what) + sides


def common_name(name: str) -> str:
    """One of ORGANS as it stands there; another name as it is."""
    return {spelling(organ): organ for organ in ORGANS}.get(spelling(name), name)


def match(organs: Iterable[str], structures: Iterable[str]) -> dict[str, list[str]]:
    """{organ: the structures that are it}, without those that are missing; kidneys are both."""
    spelt = {structure: spelling(structure) for structure in structures}
    found = {}
    for organ in organs:
        wanted = {spelling(organ)}
        if wanted == {"kidney"}:
            wanted |= {"kidneyleft", "kidneyright"}
        names = [structure for structure, its in spelt.items() if its in wanted]
        if names:
            found[organ] = names
    return found


def check_organs(
    labelled: Mapping[str, set[str]],
    organs: Sequence[str],
    partial: bool,
    structures: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise DataError unless every folder labels all organs; labelled: {folder: those it labels}.

    With partial it is enough that every folder labels one of them, and every organ has a folder.
    structures: {folder: all that it labels, in its own spelling}, for the message.
    """
    structures = structures or {k: [o for o in organs if o in v] for k, v in labelled.items()}
    union, common = set.union(*labelled.values()), set.intersection(*labelled.values())
    usable = [organ for organ in organs if organ in (union if partial else common)]
    idle = [folder for folder, its_organs in labelled.items() if not its_organs & set(organs)]
    if set(organs) <= set(usable) and not idle:
        return
    held = "; ".join(f"{k}: {', '.join(names) or 'none'}" for k, names in structures.items())
    if partial and idle:
        raise DataError(f"{idle[0]}: labels none of {', '.join(organs)} ({held}); leave it out")
    advice = [f"--organs {shlex.join(usable)}"] if usable else []
    if not partial and set(organs) <= union:
        advice.append("--partial-labels, and each hospital trains on the organs that it has")
    if not advice and set.intersection(*({*map(spelling, n)} for n in structures.values())):
        advice.append("--organs with names that all of them have")
    lacking = ", ".join(organ for organ in organs if organ not in usable)
    raise DataError(
        f"not {'one folder' if partial else 'every folder'} labels {lacking} ({held}); "
        f"use {' or '.join(advice) or 'folders that share an organ'}"
    )


def check_apart(
    where: Path, structures: Mapping[str, tuple[int, ...]], found: Mapping[str, list[str]]
) -> list[Problem]:
    """A warning where a part of an organ, a tumour say, is labelled apart from it.

    structures: {name: its label values, none in a mask of its own}; found: what match gives. Raises
    DataError for organs that share voxels: one label map holds them.
    """
    owner: dict[object, str] = {}
    for organ, names in found.items():
        for label in [label for name in names for label in structures[name] or (name,)]:
            if owner.setdefault(label, organ) != organ:
                raise DataError(
                    f"{where}: {owner[label]} and {organ} share voxels (label {label}), of which "
                    "each can be of one organ only; leave one out of --organs"
                )
    apart: dict[str, list[str]] = {}
    plain = {name: _without_side(name) for name in structures if not _is_part(name)}
    for part in filter(_is_part, structures):
        labels = structures[part] or (part,)
        named = [name for name, its in plain.items() if its and its in _without_side(part)]
        beside = [o for o, names in found.items() if not named or {*named} & {*names}]
        if beside and not owner.keys() >= {*labels}:
            apart.setdefault(", ".join(beside), []).append(part)
    then = "such voxels count as background, holes in the organ; {'liver': [1, 2]} fills them"
    return [
        Problem(where, f"labels {', '.join(parts)} apart from {beside}", then, True)
        for beside, parts in apart.items()
    ]


def _is_part(name: str) -> bool:
    return any(part in name.casefold() for part in PARTS)


def _without_side(name: str) -> str:
    return spelling(name).removesuffix("left").removesuffix("right")
