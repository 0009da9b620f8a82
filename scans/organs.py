"""Names of structures: what is asked for, found among what folders label in their own spelling.

Case, spaces, hyphens and underscores do not matter, nor where left or right stands or how short:
Kidney_L, "left kidney" and kidney_left are one.
"""

import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from scans.files import DataError

ORGANS = ("liver", "kidneys", "spleen", "pancreas", "gallbladder")  # the paper's; phantoms' too
# AMOS22's by number, because the names in its dataset.json are misspelt.
AMOS = {1: "spleen", 2: "right kidney", 3: "left kidney", 4: "gallbladder", 5: "esophagus"}
AMOS |= {6: "liver", 7: "stomach", 8: "aorta", 9: "postcava", 10: "pancreas"}
AMOS |= {11: "right adrenal gland", 12: "left adrenal gland", 13: "duodenum", 14: "bladder"}
AMOS |= {15: "prostate or uterus"}
SIDES = {"l": "left", "lt": "left", "r": "right", "rt": "right"}
# AMOS22's names, and TotalSegmentator's
SYNONYMS = {"kidneys": "kidney", "postcava": "inferiorvenacava", "bladder": "urinarybladder"}
NO_STRUCTURES = ("background", "ignore")


def spelling(name: str) -> str:
    """The form that all spellings of a name share: "kidneyleft" for Kidney_L; may be empty."""
    stem = sides = ""
    for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFC", name).casefold()):
        word = SIDES.get(word, word)
        before, middle, after = re.findall("^(left|right)?(.*?)(left|right)?$", word)[0]
        stem, sides = stem + middle, sides + before + after
    return SYNONYMS.get(stem, stem) + sides


def common_name(name: str) -> str:
    """One of ORGANS in the spelling that it has there; another name as it is."""
    return {spelling(organ): organ for organ in ORGANS}.get(spelling(name), name)


def match(organs: Iterable[str], structures: Iterable[str]) -> dict[str, list[str]]:
    """{organ: the structures that mean it}, without missing organs; kidneys are both kidneys."""
    forms = {structure: spelling(structure) for structure in structures}
    found = {}
    for organ in organs:
        wanted = {spelling(organ)}
        both = {"kidneyleft", "kidneyright"}
        if wanted == {"kidney"} and both.issubset(forms.values()):  # of one, the other is unknown
            wanted |= both
        names = [structure for structure, form in forms.items() if form in wanted]
        if names:
            found[organ] = names
    return found


def check_organs(
    structures: Mapping[str, Collection[str]], organs: Sequence[str], partial: bool
) -> None:
    """Raise DataError unless every folder labels all organs; structures: {folder: its names}.

    With partial it is enough that every folder labels one of them, and every organ has a folder.
    """
    labelled = {folder: set(match(organs, names)) for folder, names in structures.items()}
    some, common = set.union(*labelled.values()), set.intersection(*labelled.values())
    held = "; ".join(f"{k}: {', '.join(names) or 'none'}" for k, names in structures.items())
    idle = [folder for folder, found in labelled.items() if not found]
    if partial and idle:
        raise DataError(f"{idle[0]}: labels none of {', '.join(organs)} ({held}); leave it out")
    usable = [organ for organ in organs if organ in (some if partial else common)]
    lacking = [organ for organ in organs if organ not in usable]
    lacking = [f"{o} (left and right)" if spelling(o) == "kidney" else o for o in lacking]
    if lacking:
        advice = [f"--organs {shlex.join(usable)}"] if usable else []
        if some.issuperset(organs):
            advice.append("--partial-labels, and each hospital trains on the organs that it has")
        raise DataError(
            f"{'no folder' if partial else 'not every folder'} labels {', '.join(lacking)} "
            f"({held}); use {' or '.join(advice) or 'folders that share an organ'}"
        )


def check_apart(
    where: Path, structures: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[str]]
) -> None:
    """Raise DataError for organs that share voxels, because one label map holds all of them.

    structures: {name: its label values, none in a mask of its own}; found: what match gives.
    """
    owner: dict[object, str] = {}
    for organ, names in found.items():
        for label in [label for name in names for label in structures[name] or (name,)]:
            other = owner.setdefault(label, organ)
            if other != organ:
                what = f"{other} and {organ} share voxels (label {label})"
                raise DataError(f"{where}: {what}; leave one out of --organs")
