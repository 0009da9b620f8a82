"""FedGIN: train one 3D organ segmentation model at hospitals that hold CT or MRI and share neither.

The experiment of arXiv 2508.05137: federated averaging (federated.py) of a U-Net (unet3d.py) that
trains on images transformed by GIN (gin.py), beside the arms that it is compared with.

    python fedgin.py --scenario limited                      # phantoms, a few minutes on a CPU
    python fedgin.py --scenario complete --ct DIR --mri DIR  # scans, best on a GPU
"""

import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import arms
import data
import results
from arms import Arm, choose_cases, find_arm, label_arms, taking_part
from config import Config, describe, how_to_go_on, make_parser, run_command, to_config
from data import Volume
from evaluate import choose_device, dice, mixed_precision, score_case
from federated import Client, State, federated_rounds, train_locally, weighted_average
from gin import GIN
from hospitals import Hospital, find_sources, load_hospitals, record, trainable, validation_cases
from loss import segmentation_loss
from predict import segment
from progress import Progress, count_steps, name_training
from tables import mean
from unet3d import UNet3D, memory_format

CPU = torch.device("cpu")
Watch = Callable[[Iterable, str], Iterable]


def unwatched(items: Iterable, what: str) -> Iterable:
    """Items as they are; Progress.watch shows on the screen how far one is with them."""
    return items


# ------------------------------------------------------------------------------- who trains on what


def make_clients(
    config: Config,
    seed: int,
    arm: Arm,
    hospitals: Sequence[Hospital],
    device: torch.device,
    watch: Watch = unwatched,
) -> dict[str, Client]:
    """What federated averaging must know of those who train in an arm."""
    clients = {}
    for name, (cases, steps) in choose_cases(config, arm, hospitals).items():
        counts = np.sum([case.counts for case in cases], axis=0)
        # A class weighs 1 / √(its share of the client's training voxels): with equal weights small
        # organs now and then vanish from the prediction for good.
        weight = torch.from_numpy(counts).clamp(min=1).float().rsqrt().to(device)
        loss = functools.partial(segmentation_loss, weight=weight)
        drawn = functools.partial(
            batches, config, seed, name, cases, steps, arm.gin, device, watch=watch
        )
        clients[name] = Client(len(cases), drawn, loss)
    return clients


def batches(
    config: Config,
    seed: int,
    name: str,
    cases: Sequence[Volume],
    steps: int,
    p: float,
    device: torch.device,
    round_: int,
    watch: Watch = unwatched,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor | None]]]:
    """Yield what a hospital trains on in a round: (images, (labels, labelled)), on the device.

    GIN transforms a share p of the images.
    """
    augment = GIN(p, generator=data.generator(seed, round_, name, "gin"))
    draws = data.generator(seed, round_, name, "patches")
    drawn = data.patches(cases, config.patch, config.batch_size, steps, draws)
    drawn = data.prefetch(drawn, pin=device.type == "cuda")
    for images, labels, labelled in watch(drawn, f"round {round_} of {config.rounds}"):
        known = None if labelled.all() else labelled.to(device, non_blocking=True)
        images, labels = (part.to(device, non_blocking=True) for part in (images, labels))
        yield augment(images), (labels, known)


# ----------------------------------------------------------------------------------------- a round


def train_arm(
    config: Config,
    state: dict,
    hospitals: Sequence[Hospital],
    device: torch.device = CPU,
    *,
    average: Callable = weighted_average,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
    watch: Watch = unwatched,
) -> Iterator[dict]:
    """Train an arm by FedAvg, yielding its state after each round: see new_state and keep_round.

    Given the state after an earlier round, it goes on from there as if it had never stopped. Where
    other processes train too, `average` and `add_up` go over all of them. What takes time is drawn
    through `watch`.
    """

    def lr(round_: int) -> float:
        return config.lr * (1 - (round_ - 1) / config.rounds) ** 0.9

    arm = find_arm(config, state["arm"])
    model = make_model(config, state["seed"], device, state["weights"])
    clients = make_clients(config, state["seed"], arm, hospitals, device, watch)
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    held_out = validation_cases(state["seed"], taking_part(arm, hospitals))
    chance_loss = math.log(len(config.organs) + 1) + 1  # of equal probabilities
    began = time.monotonic()
    rounds = config.rounds, lr, state["round"], train, average
    for round_, losses in federated_rounds(model, clients, *rounds):
        if max(losses.values()) > 10 * chance_loss:
            raise FloatingPointError(f"round {round_}: {losses}: exploded; a lower --lr may help")
        val_dice = {}
        if round_ % config.val_every == 0 or round_ == config.rounds:
            seen = watch(held_out, f"round {round_} of {config.rounds}")
            sums = validate(config, model, seen, arm.modalities)
            val_dice = mean_dice(add_up(sums), arm.modalities)
        state = keep_round(state, model, losses, val_dice, time.monotonic() - began)
        yield state
        began = time.monotonic()


def new_state(seed: int, label: str) -> dict:
    """The state of a training before its first round; label: one of label_arms."""
    best = {"val_dice": -math.inf, "round": 0, "weights": None}
    return {"seed": seed, "arm": label, "round": 0, "weights": None, "best": best, "history": []}


def make_model(
    config: Config, seed: int, device: torch.device = CPU, weights: State | None = None
) -> nn.Module:
    """The U-Net with the initial weights that all arms of a seed start from, or those given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet3D(1, len(config.organs) + 1, config.width, config.depth)
    model.load_state_dict(weights or model.state_dict())
    return model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]


# ------------------------------------------------------------- validation and the choice of weights


def validate(
    config: Config, model: nn.Module, cases: Iterable[Volume], modalities: Sequence[str]
) -> Tensor:
    """(2, modalities, organs): the sum of Dice over the cases with an organ, and their number.

    On the model's grid.
    """
    sums = torch.zeros(2, len(modalities), len(config.organs), dtype=torch.float64)
    for case in cases:
        prediction = segment(model, case.image, config.patch, case.labels.shape)
        for n in range(1, len(config.organs) + 1):
            if (target := case.labels == n).any():  # by the target: NaN must not depend on
                score = dice(prediction == n, target)  # what is predicted
                row = sums[:, modalities.index(case.modality), n - 1]
                row += torch.tensor([score, 1], dtype=torch.float64)
    return sums


def mean_dice(sums: Tensor, modalities: Sequence[str]) -> dict[str, float]:
    """{modality: the mean over organs of each organ's mean over cases}, from validate's sums."""
    by_organ = sums[0] / sums[1]  # NaN where no case has the organ
    return {m: mean(row.tolist()) for m, row in zip(modalities, by_organ, strict=True)}


def keep_round(
    state: dict,
    model: nn.Module,
    losses: Mapping[str, float],
    val_dice: Mapping[str, float],
    seconds: float,
) -> dict:
    """The state of a training after one more round: its weights, the best ones and its history.

    The best weights have the highest validation Dice, the mean over the modalities that can be
    scored; where none can, they are the last ones. A round may go without validation: val_dice is
    empty then.
    """
    round_ = state["round"] + 1
    weights = {key: w.cpu().clone() for key, w in model.state_dict().items()}
    best, val_mean = state["best"], mean(val_dice.values())
    if val_dice and not val_mean <= best["val_dice"]:  # NaN included
        best = {"val_dice": val_mean, "round": round_, "weights": weights}
    row = {key: state[key] for key in ("seed", "arm")} | {"round": round_}
    row |= {"seconds": round(seconds, 2), "loss": mean(losses.values())}
    row |= {f"val_dice_{m}": val_dice.get(m, "") for m in ("mri", "ct")}
    row |= {f"loss {name}": loss for name, loss in losses.items()}
    history = [*state["history"], row]
    return state | {"round": round_, "weights": weights, "best": best, "history": history}


# ----------------------------------------------------------------------------- the test, and a run


def test(
    config: Config,
    model: nn.Module,
    hospitals: Sequence[Hospital],
    start: int = 0,
    watch: Watch = unwatched,
) -> Iterator[dict]:
    """Yield the scores by organ of every test case, from `start` on, on the scan's own grid."""
    cases = [(hospital, case) for hospital in hospitals for case in hospital.test][start:]

    def segmented() -> Iterator[tuple]:
        for hospital, case in watch(cases, "testing"):
            about = {"hospital": hospital.name, "scanner": "own" if hospital.modality else "other"}
            about |= {"modality": case.modality, "case": case.id}
            target, spacing = data.read_target(case, config.spacing)
            prediction = segment(model, case.image, config.patch, target.shape)
            yield about, prediction, target, spacing, case.labelled

    # The model segments a case while the one before it is scored.
    for about, prediction, target, spacing, labelled in data.prefetch(segmented()):
        scan = prediction, target, config.organs, spacing, config.nsd_tolerance, labelled
        yield {**about, "scores": score_case(*scan)}


def run(config: Config) -> None:
    """Train and test every arm with every seed, and write the results to config.out."""
    config = dataclasses.replace(config, arms=config.arms or arms.SCENARIOS[config.scenario])
    results.check_out(config)
    sources = find_sources(config)
    arms.check_arms(config, trainable(config, sources))
    device = choose_device()
    print(describe(config, device))
    by_seed, notes = load_hospitals(config, sources=sources)
    first = by_seed[config.seeds[0]]
    arms.check_arms(config, {hospital.modality for hospital in first if hospital.train})
    shares = arms.describe_shares(config, first)
    print(*notes, shares, sep="\n")
    with results.open_run(config, record(by_seed, config.organs)) as folder:
        everything = itertools.product(config.seeds, label_arms(config))
        todo = [
            folder.checkpoint(*training) or new_state(*training)
            for training in everything
            if not folder.is_finished(*training)
        ]
        print(f"{len(todo)} trainings of {config.rounds} rounds to do", flush=True)
        steps = sum(count_steps(config, state, by_seed[state["seed"]]) for state in todo)
        with Progress(steps) as progress:
            for state in todo:
                progress.name = name_training(config, state)
                place = by_seed[state["seed"]], device, folder, progress
                try:
                    folder.finish(*run_training(config, state, *place))
                except Exception as error:
                    error.add_note(f"seed {state['seed']}, arm {state['arm']}")
                    raise
        report = folder.report(shares)
    print(f"\n{report}\n\nEverything is in {config.out}{os.sep}")


def run_training(
    config: Config,
    state: dict,
    hospitals: Sequence[Hospital],
    device: torch.device,
    folder: results.Run,
    progress: Progress,
    **federation: Callable,
) -> tuple[dict, list[dict]]:
    """Train one arm with one seed and test it, from where it stopped; keep what comes of it.

    Returns its last state and the scores. federation: train_arm's average and add_up.
    """
    seed, label = state["seed"], state["arm"]
    trained = train_arm(config, state, hospitals, device, watch=progress.watch, **federation)
    for state in trained:
        folder.keep_round(state)
        progress.show_round(state["history"][-1])
    if math.isnan(state["best"]["val_dice"]):
        progress.say(f"{label}: no validation case holds an organ; the last weights are kept")
    folder.keep_model(state)
    model = make_model(config, seed, device, state["best"]["weights"])
    scores = folder.tested(seed, label)
    for score in test(config, model, hospitals, len(scores), progress.watch):
        scores.append(score)
        folder.keep_tested(seed, label, scores)
    return state, scores


def parse(argv: Sequence[str] | None) -> Config:
    parser = make_parser(
        __doc__, {"scenario": arms.SCENARIOS, "arms": arms.ARMS, "ratios": arms.RATIOS}
    )
    return to_config(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for its exit codes."""
    config = parse(argv)
    return run_command("fedgin.py", lambda: run(config), functools.partial(how_to_go_on, config))


if __name__ == "__main__":
    sys.exit(main())
