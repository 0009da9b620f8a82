"""The experiment's arms and scenarios: who trains together, on which cases, with GIN or without.

All arms of a seed share cases, initial weights, and the batches and steps of each hospital, so that
a difference between two of them is what the method makes.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from config import Config
from data import Volume
from datasets import DataError
from hospitals import Hospital


class Arm(NamedTuple):
    modalities: tuple[str, ...]  # whose hospitals take part
    pooled: bool  # their cases in one place, instead of federated averaging
    gin: float  # share of the images that GIN transforms
    ratio: float = math.inf  # CT training cases for each MRI one, in the limited scenario


ARMS = {
    "mri-only": Arm(("mri",), pooled=False, gin=0),
    "ct-only": Arm(("ct",), pooled=False, gin=0),
    "centralized": Arm(("mri", "ct"), pooled=True, gin=0),
    "fl": Arm(("mri", "ct"), pooled=False, gin=0),
    "fedgin": Arm(("mri", "ct"), pooled=False, gin=1),
}
ARMS |= {f"{n}+gin": ARMS[n]._replace(gin=1) for n in ("mri-only", "ct-only", "centralized")}

SCENARIOS = {  # the arms that run without --arms
    "limited": ("mri-only", "fl", "fedgin", "centralized+gin"),
    "complete": ("mri-only", "ct-only", "fl", "fedgin", "centralized+gin"),
}
RATIOS = {"1:1": 1, "1:2": 2, "1:5": 5, "all": math.inf}


def label_arms(config: Config) -> dict[str, Arm]:
    """What is trained with each seed: {label: arm}; "fedgin 1:5 p=1" has GIN's share p behind it.

    An arm with CT is trained at each ratio, if limited, and one with GIN for each of its shares.
    """
    arms = {}
    for name in config.arms or SCENARIOS[config.scenario]:
        arm = ARMS[name]
        for ratio in (config.ratios if "ct" in arm.modalities else ()) or ("",):
            for p in config.gin_probability if arm.gin else (0.0,):
                label = [name, ratio, f"p={p:g}" if arm.gin else ""]
                chosen = arm._replace(gin=p, ratio=RATIOS.get(ratio, math.inf))
                arms[" ".join(filter(None, label))] = chosen
    return arms


def find_arm(config: Config, label: str) -> Arm:
    """The arm of a label. Raises ValueError for one that the config does not train."""
    found = label_arms(config)
    if label not in found:
        raise ValueError(f"no arm is labelled {label!r}; there are {', '.join(found)}")
    return found[label]


def check_arms(config: Config, held: Collection[str]) -> None:
    """Raise DataError if an arm needs a modality of which nobody holds training cases."""
    for label, arm in label_arms(config).items():
        for modality in arm.modalities:
            if modality not in held:
                raise DataError(
                    f"arm {label} needs {modality.upper()} training cases and there are none; "
                    f"give folders with --{modality} or choose other --arms"
                )


def taking_part(arm: Arm, hospitals: Sequence[Hospital]) -> list[Hospital]:
    """The hospitals of an arm, by modality in its order."""
    return [h for modality in arm.modalities for h in hospitals if h.modality == modality]


def choose_cases(
    config: Config, arm: Arm, hospitals: Sequence[Hospital]
) -> dict[str, tuple[list[Volume], int]]:
    """Who trains in an arm: {name: (its cases, batches a round)}.

    In the limited scenario few MRI cases take part, and as many CT cases as the ratio says. A
    pooled arm has a single client with everybody's cases and steps.
    """
    limit = {"mri": math.inf, "ct": math.inf}
    if config.scenario == "limited":
        n_mri = sum(len(h.train) for h in hospitals if h.modality == "mri")
        limit["mri"] = min(config.mri_cases, n_mri or math.inf)
        limit["ct"] = limit["mri"] * arm.ratio
    chosen: dict[str, list[Volume]] = {}
    for modality in arm.modalities:
        holders = [h for h in hospitals if h.modality == modality]
        # In turns, so that a small share of the cases still comes from every hospital.
        turns = sorted((i, k) for k, h in enumerate(holders) for i in range(len(h.train)))
        for i, k in turns[: int(min(limit[modality], len(turns)))]:
            chosen.setdefault(holders[k].name, []).append(holders[k].train[i])
    if arm.pooled:
        pool = [case for cases in chosen.values() for case in cases]
        return {"pooled": (pool, config.local_steps * len(chosen))}
    return {name: (cases, config.local_steps) for name, cases in chosen.items()}


def describe_shares(config: Config, hospitals: Sequence[Hospital]) -> str:
    """Who holds and who trains on how many cases."""
    lines = []
    for name, _, *parts in hospitals:
        lines.append(
            "{}: {} cases to train, {} to validate, {} to test".format(name, *map(len, parts))
        )
    for label, arm in label_arms(config).items():
        chosen = choose_cases(config, arm, hospitals)
        shares = (f"{name} {len(cases)}" for name, (cases, _) in chosen.items())
        lines.append(f"{label + ':':27} training cases: {', '.join(shares)}")
    return "\n".join(lines)
