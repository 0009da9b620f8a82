"""FedGIN: train one 3D organ segmentation model at hospitals that hold CT or MRI and share neither.

The experiment of arXiv 2508.05137: federated averaging (federated.py) of a U-Net (unet3d.py) that
trains on images transformed by GIN (gin.py), beside the arms that it is compared with.

    python fedgin.py --scenario limited                      # phantoms, a few minutes on a CPU
    python fedgin.py --scenario complete --ct DIR --mri DIR  # scans, best on a GPU
"""

import functools
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import results
from config import Config, describe, how_to_go_on, make_parser, run_command, to_config
from data import Volume
from datasets import DataError
from evaluate import dice, mixed_precision, score_case
from federated import Client, State, federated_rounds, train_locally, weighted_average
from gin import GIN
from hospitals import Hospital, load_hospitals, record
from predict import segment
from tables import mean
from unet3d import UNet3D

# ------------------------------------------------------------------------------ arms and scenarios


class Arm(NamedTuple):
    modalities: tuple[str, ...]  # whose hospitals take part
    pooled: bool  # their cases in one place, instead of federated averaging
    gin: bool


ARMS = {
    "mri-only": Arm(("mri",), pooled=False, gin=False),
    "ct-only": Arm(("ct",), pooled=False, gin=False),
    "centralized": Arm(("mri", "ct"), pooled=True, gin=False),
    "fl": Arm(("mri", "ct"), pooled=False, gin=False),
    "fedgin": Arm(("mri", "ct"), pooled=False, gin=True),
}
ARMS |= {f"{n}+gin": ARMS[n]._replace(gin=True) for n in ("mri-only", "ct-only", "centralized")}

SCENARIOS = {  # the arms that run without --arms
    "limited": ("mri-only", "fl", "fedgin", "centralized+gin"),
    "complete": ("mri-only", "ct-only", "fl", "fedgin", "centralized+gin"),
}
RATIOS = {"1:1": 1, "1:2": 2, "1:5": 5, "all": math.inf}  # CT training cases for each MRI one


def run_labels(config: Config) -> list[str]:
    """The arms to run; the ratio stands behind those that differ by it, if there are several."""
    if config.scenario == "complete" or len(config.ratios) == 1:
        return list(config.arms)
    return [
        f"{name} {ratio}".strip()
        for name in config.arms
        for ratio in (config.ratios if "ct" in ARMS[name].modalities else [""])
    ]


# ------------------------------------------------------------------------------- who trains on what


def choose_cases(
    config: Config, label: str, hospitals: Sequence[Hospital]
) -> dict[str, tuple[list[Volume], int]]:
    """Who trains in an arm: {name: (its cases, batches a round)}; label: the arm and its ratio.

    In the limited scenario few MRI cases take part, and as many CT cases as the ratio says. A
    pooled arm has a single client with everybody's cases and steps.
    """
    name, _, ratio = label.partition(" ")
    limit = {"mri": math.inf, "ct": math.inf}
    if config.scenario == "limited":
        n_mri = sum(len(h.train) for h in hospitals if h.modality == "mri")
        limit["mri"] = min(config.mri_cases, n_mri or math.inf)
        limit["ct"] = limit["mri"] * RATIOS[ratio or config.ratios[0]]
    chosen: dict[str, list[Volume]] = {}
    for modality in ARMS[name].modalities:
        holders = [h for h in hospitals if h.modality == modality]
        # In turns, so that a small share of the cases still comes from every hospital.
        turns = sorted((i, k) for k, h in enumerate(holders) for i in range(len(h.train)))
        for i, k in turns[: int(min(limit[modality], len(turns)))]:
            chosen.setdefault(holders[k].name, []).append(holders[k].train[i])
    if ARMS[name].pooled:
        pool = [case for cases in chosen.values() for case in cases]
        return {"pooled": (pool, config.local_steps * len(chosen))}
    return {name: (cases, config.local_steps) for name, cases in chosen.items()}


def check_arm(label: str, hospitals: Sequence[Hospital]) -> None:
    """Raise DataError if an arm needs a modality of which there is no training case."""
    name = label.split()[0]
    for modality in ARMS[name].modalities:
        if not any(h.train for h in hospitals if h.modality == modality):
            raise DataError(
                f"arm {name} needs {modality.upper()} training cases and there are none; give "
                f"folders with --{modality} or choose other --arms"
            )


def make_clients(
    config: Config, seed: int, label: str, hospitals: Sequence[Hospital], device: torch.device
) -> dict[str, Client]:
    """What federated averaging must know of those who train in an arm."""
    gin, clients = ARMS[label.split()[0]].gin, {}
    for name, (cases, steps) in choose_cases(config, label, hospitals).items():
        counts = np.sum([case.counts for case in cases], axis=0)
        # A class weighs 1 / √(its share of the client's training voxels): with equal weights small
        # organs now and then vanish from the prediction for good.
        weight = torch.from_numpy(counts).clamp(min=1).float().rsqrt().to(device)
        loss = functools.partial(segmentation_loss, weight=weight)
        drawn = functools.partial(batches, config, seed, name, cases, steps, gin, device)
        clients[name] = Client(len(cases), drawn, loss)
    return clients


def batches(
    config: Config,
    seed: int,
    name: str,
    cases: Sequence[Volume],
    steps: int,
    gin: bool,
    device: torch.device,
    round_: int,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor | None]]]:
    """Yield what a hospital trains on in a round: (images, (labels, labelled)), on the device."""
    augment: nn.Module = nn.Identity()
    if gin:
        augment = GIN(config.gin_probability, generator=data.generator(seed, round_, name, "gin"))
    draws = data.generator(seed, round_, name, "patches")
    drawn = data.patches(cases, config.patch, config.batch_size, steps, draws)
    for images, labels, labelled in data.prefetch(drawn, pin=device.type == "cuda"):
        known = None if labelled.all() else labelled.to(device, non_blocking=True)
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        yield augment(images), (labels, known)


# ----------------------------------------------------------------------------- a round and its loss


def train_arm(
    config: Config,
    state: dict,
    hospitals: Sequence[Hospital],
    device: torch.device,
    average: Callable = weighted_average,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Iterator[dict]:
    """Train an arm by FedAvg, yielding its state after each round: see new_state and keep_round.

    Given the state after an earlier round, it goes on from there as if it had never stopped. Where
    other processes train too, `average` and `add_up` go over all of them.
    """

    def lr(round_: int) -> float:
        return config.lr * (1 - (round_ - 1) / config.rounds) ** 0.9

    model = make_model(config, state["seed"], device, state["weights"])
    clients = make_clients(config, state["seed"], state["arm"], hospitals, device)
    modalities = ARMS[state["arm"].split()[0]].modalities
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    rounds = config.rounds, lr, state["round"], train, average
    chance_loss = math.log(len(config.organs) + 1) + 1  # of equal probabilities
    for round_, losses in federated_rounds(model, clients, *rounds):
        if max(losses.values()) > 10 * chance_loss:
            raise FloatingPointError(f"round {round_}: {losses}: exploded; a lower --lr may help")
        val_dice = mean_dice(add_up(validate(config, model, hospitals, modalities)), modalities)
        state = keep_round(state, model, round_, losses, val_dice)
        yield state


def new_state(seed: int, label: str) -> dict:
    """The state of a training before its first round."""
    best = {"val_dice": -math.inf, "round": 0, "weights": None}
    return {"seed": seed, "arm": label, "round": 0, "weights": None, "best": best, "history": []}


def make_model(
    config: Config, seed: int, device: torch.device, weights: State | None = None
) -> nn.Module:
    """The U-Net with the initial weights that all arms of a seed start from, or those given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet3D(1, len(config.organs) + 1, config.width, config.depth)
    model.load_state_dict(weights or model.state_dict())
    return model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def segmentation_loss(
    logits: Tensor, targets: tuple[Tensor, Tensor | None], weight: Tensor
) -> Tensor:
    """Cross-entropy + soft Dice over the organs: logits (B, classes, D, H, W) → scalar.

    targets: labels (B, D, H, W) and which organs each image's hospital labels, (B, classes), or
    None where all are. A voxel of an organ that was never labelled is background by its labels; so
    the probabilities of such organs are added to the background's first (the marginal loss, Shi et
    al. 2021, arXiv 2007.03868). weight: of each class in the cross-entropy.
    """
    labels, labelled = targets
    log_p = logits.log_softmax(dim=1)  # (B, classes, D, H, W)
    if labelled is not None:
        known = labelled[:, :, None, None, None]  # (B, classes, 1, 1, 1)
        merged = torch.cat([log_p[:, :1], log_p[:, 1:].masked_fill(known[:, 1:], -torch.inf)], 1)
        log_p = torch.cat([merged.logsumexp(dim=1, keepdim=True), log_p[:, 1:]], dim=1)
    p = log_p.exp() if labelled is None else log_p.exp() * known
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)  # (B, classes, D, H, W)
    overlap = (p * target).sum((0, 2, 3, 4))
    size = p.sum((0, 2, 3, 4)) + target.sum((0, 2, 3, 4))
    soft_dice = ((2 * overlap + 1) / (size + 1))[1:]
    counted = torch.ones_like(soft_dice) if labelled is None else labelled.any(dim=0)[1:]
    mean_dice = (soft_dice * counted).sum() / counted.sum()
    return F.nll_loss(log_p, labels, weight) + 1 - mean_dice


# ------------------------------------------------------------- validation and the choice of weights


def validate(
    config: Config, model: nn.Module, hospitals: Sequence[Hospital], modalities: Sequence[str]
) -> Tensor:
    """(2, modalities, organs): the sum of Dice over the validation cases with an organ, and n.

    On the model's grid. Training cases stand in at a hospital that has no validation case.
    """
    sums = torch.zeros(2, len(modalities), len(config.organs), dtype=torch.float64)
    for hospital in (h for h in hospitals if h.modality in modalities):
        row = modalities.index(hospital.modality)
        for case in hospital.val or hospital.train:
            prediction = segment(model, case.image, config.patch, case.labels.shape)
            for n in range(1, len(config.organs) + 1):
                if (target := case.labels == n).any():  # by the target: NaN must not depend on
                    score = dice(prediction == n, target)  # what is predicted
                    sums[:, row, n - 1] += torch.tensor([score, 1], dtype=torch.float64)
    return sums


def mean_dice(sums: Tensor, modalities: Sequence[str]) -> dict[str, float]:
    """{modality: the mean over organs of each organ's mean over cases}, from validate's sums."""
    by_organ = sums[0] / sums[1]  # NaN where no case has the organ
    return {m: mean(row.tolist()) for m, row in zip(modalities, by_organ, strict=True)}


def keep_round(state: dict, model: nn.Module, round_: int, losses: dict, val_dice: dict) -> dict:
    """The state of a training after one more round: its weights, the best ones and its history.

    The best weights have the highest validation Dice, the mean over the modalities that can be
    scored; where none can, they are the last ones.
    """
    weights = {key: w.cpu().clone() for key, w in model.state_dict().items()}
    best, val_mean = state["best"], mean(val_dice.values())
    if not val_mean <= best["val_dice"]:  # NaN included
        best = {"val_dice": val_mean, "round": round_, "weights": weights}
    loss, dices = mean(losses.values()), [val_dice.get(m, "") for m in ("mri", "ct")]
    history = [*state["history"], [state["seed"], state["arm"], round_, loss, *dices]]
    return state | {"round": round_, "weights": weights, "best": best, "history": history}


# ----------------------------------------------------------------------------- the test, and a run


def test(config: Config, model: nn.Module, hospitals: Sequence[Hospital]) -> list[dict]:
    """Scores by organ of every test case, on the scan's own grid."""
    found = []
    for hospital in hospitals:
        for case in hospital.test:
            target, spacing = data.read_target(case, config.organs, config.spacing)
            prediction = segment(model, case.image, config.patch, target.shape)
            scores = score_case(
                prediction, target, config.organs, spacing, config.nsd_tolerance, case.labelled
            )
            about = {"hospital": hospital.name, "modality": case.modality, "case": case.id}
            found.append({**about, "scores": scores})
    return found


def run(config: Config) -> None:
    """Train and test every arm with every seed, and write the results to config.out."""
    results.check_out(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(config, device))
    hospitals, left_out = load_hospitals(config)
    print_shares(config, hospitals[config.seeds[0]], left_out)
    with results.open_run(config, record(hospitals, config.organs)) as folder:
        for seed, label in itertools.product(config.seeds, run_labels(config)):
            if folder.is_finished(seed, label):
                continue
            state = folder.checkpoint(seed, label) or new_state(seed, label)
            trained = train_arm(config, state, hospitals[seed], device)
            bar = {"desc": f"{label}, seed {seed}", "total": config.rounds, "unit": "round"}
            try:
                with tqdm(trained, initial=state["round"], **bar) as rounds:
                    for state in rounds:
                        folder.keep_round(state)
                        *_, loss, mri, ct = state["history"][-1]
                        shown = {"loss": loss, "val_mri": mri, "val_ct": ct}
                        rounds.set_postfix({key: v for key, v in shown.items() if v != ""})
                if math.isnan(state["best"]["val_dice"]):
                    print(f"{label}: no validation case holds an organ; the last weights are kept")
                folder.keep_model(state)
                model = make_model(config, seed, device, state["best"]["weights"])
                folder.finish(state, test(config, model, hospitals[seed]))
            except Exception as error:
                error.add_note(f"seed {seed}, arm {label}")
                raise
        report = folder.report(shares_by_ratio(config, hospitals[config.seeds[0]]))
    print(f"\n{report}\n\nEverything is in {config.out}{os.sep}")


def print_shares(config: Config, hospitals: Sequence[Hospital], left_out: Sequence[str]) -> None:
    """Say who holds and trains how many cases; raises DataError for an arm without a modality."""
    for reason in left_out:
        print(f"left out: {reason}")
    for name, _, *parts in hospitals:
        print("{}: {} cases to train, {} to validate, {} to test".format(name, *map(len, parts)))
    for label in run_labels(config):
        check_arm(label, hospitals)
        chosen = choose_cases(config, label, hospitals)
        shares = (f"{name} {len(cases)}" for name, (cases, _) in chosen.items())
        print(f"{label + ':':20} training cases: {', '.join(shares)}")


def shares_by_ratio(config: Config, hospitals: Sequence[Hospital]) -> str:
    """Each ratio with the training cases that it came to, as there may be too few for it."""
    shares = []
    for ratio in config.ratios or ():
        pool, _ = choose_cases(config, f"centralized {ratio}", hospitals)["pooled"]
        n = Counter(case.modality for case in pool)
        shares.append(f"{ratio} ({n['mri']} : {n['ct']} cases)")
    return ", ".join(shares)


def parse(argv: Sequence[str] | None) -> Config:
    parser = make_parser(__doc__, {"scenario": SCENARIOS, "arms": ARMS, "ratios": RATIOS})
    args = parser.parse_args(argv)
    return to_config(parser, args, arms=args.arms or SCENARIOS[args.scenario])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for its exit codes."""
    config = parse(argv)
    return run_command("fedgin.py", lambda: run(config), functools.partial(how_to_go_on, config))


if __name__ == "__main__":
    sys.exit(main())
