"""FedGIN: train one 3D organ segmentation model at hospitals whose CT or MRI scans stay there.

The experiment of arXiv 2508.05137: federated averaging (federated.py) of a U-Net (unet3d.py) on
images whose intensities GIN (gin.py) changes at random, and the arms that it is compared with.
A round is federated_rounds in federated.py, called by train_arm; GIN enters in make_client.batches.

    python fedgin.py --scenario limited                      # phantoms, minutes on a CPU
    python fedgin.py --scenario complete --ct DIR --mri DIR  # scans, best on a GPU
"""

import functools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import data
from evaluate import dice_by_label, score_case
from federated import Client, Weights, federated_rounds, noting, train_locally
from gin import GIN
from scans.cases import PreparedCase, Volumes
from scans.files import DataError
from scans.machine import in_background
from study import console, hospitals
from study.config import Checkpoint, Config, Round, Training, make_parser, to_config
from study.console import Progress, count_steps
from study.hospitals import Hospital
from study.inference import choose_device, copy_to_cpu, mixed_precision, segment
from study.results import RunFolder, TrainingFolder
from study.tables import mean
from unet3d import UNet3D, memory_format, segmentation_loss

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------ arms and scenarios


class Arm(NamedTuple):
    """A way to train; all arms of a seed start from the same weights, and hospitals draw alike."""

    modalities: tuple[str, ...]  # whose hospitals take part
    centralized: bool = False  # all cases in one place, instead of federated averaging
    gin: bool = False  # whether GIN redraws each image with probability p


ARMS = {
    "mri-only": Arm(("mri",)),
    "ct-only": Arm(("ct",)),
    "fl": Arm(("mri", "ct")),
    "fedgin": Arm(("mri", "ct"), gin=True),
    "centralized": Arm(("mri", "ct"), centralized=True),
    "mri-only+gin": Arm(("mri",), gin=True),
    "ct-only+gin": Arm(("ct",), gin=True),
    "centralized+gin": Arm(("mri", "ct"), centralized=True, gin=True),
}
SCENARIOS = {  # the arms that run without --arms
    "limited": ("mri-only", "fl", "fedgin"),
    "complete": ("mri-only", "ct-only", "fl", "fedgin", "centralized+gin"),
}
RATIOS = {"1:1": 1, "1:2": 2, "1:5": 5, "all": math.inf}  # CT training cases for each MRI one


def plan(config: Config) -> list[Training]:
    """The trainings of a run: seeds × arms × ratios (arms with CT) × values of p (arms with GIN).

    Raises DataError for a name that is not in the tables above.
    """
    checks = ((config.scenario,), SCENARIOS), (config.arms, ARMS), (config.ratios or (), RATIOS)
    for names, table in checks:
        unknown = [name for name in names if name not in table]
        if unknown:
            raise DataError(f"{unknown[0]!r} is not one of {', '.join(table)}")
    trainings = []
    for seed in config.seeds:
        for name in config.arms or SCENARIOS[config.scenario]:
            ratios = (config.ratios or ("",)) if "ct" in ARMS[name].modalities else ("",)
            probabilities = config.gin_probability if ARMS[name].gin else (None,)
            trainings += [Training(seed, name, r, p) for r in ratios for p in probabilities]
    return trainings


# ------------------------------------------------------------------------------- who trains on what


def choose_cases(
    config: Config, training: Training, everyone: Sequence[Hospital]
) -> dict[str, list[PreparedCase]]:
    """Who trains on which cases: {hospital: cases}.

    In the limited scenario: at most mri_cases MRI cases, and that number times the ratio of CT.
    """
    limit = {"mri": math.inf, "ct": math.inf}
    if config.scenario == "limited":
        n_mri = sum(len(hospital.train) for hospital in everyone if hospital.modality == "mri")
        limit["mri"] = min(config.mri_cases, n_mri or math.inf)
        limit["ct"] = limit["mri"] * RATIOS.get(training.ratio, math.inf)
    chosen: dict[str, list[PreparedCase]] = {}
    for modality in ARMS[training.arm].modalities:
        holders = [hospital for hospital in everyone if hospital.modality == modality]
        # In turns, so that a few cases still come from every hospital.
        turns = sorted((i, k) for k, h in enumerate(holders) for i in range(len(h.train)))
        for i, k in turns[: int(min(limit[modality], len(turns)))]:
            chosen.setdefault(holders[k].name, []).append(holders[k].train[i])
    return chosen


def make_clients(
    config: Config, training: Training, everyone: Sequence[Hospital], device: torch.device = CPU
) -> dict[str, Client]:
    """Those who take part in federated averaging, by name, which is a key of their random draws.

    A centralized arm has one client, "pooled", with all cases and as many batches as all hospitals.
    """
    chosen, steps = choose_cases(config, training, everyone), config.local_steps
    if ARMS[training.arm].centralized:
        steps *= len(chosen)
        chosen = {"pooled": [case for cases in chosen.values() for case in cases]}
    return {
        k: make_client(config, training, k, cases, steps, device) for k, cases in chosen.items()
    }


def make_client(
    config: Config,
    training: Training,
    name: str,
    cases: Sequence[PreparedCase],
    steps: int,
    device: torch.device,
) -> Client:
    """A client of `steps` batches per round; GIN redraws each image with probability training.p."""

    def batches(round_: int) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor | None]]]:
        """Yield (images, (labels, organs that each case labels or None for all)) on the device."""
        draws = data.generator(training.seed, round_, name, "patches")
        gin_draws = data.generator(training.seed, round_, name, "gin")
        augment = GIN(training.p or 0.0, generator=gin_draws)
        drawn = data.patches(Volumes(cases), config.patch, config.batch_size, steps, draws)
        for images, labels, labelled in data.prefetch(drawn, pin=device.type == "cuda"):
            known = None if labelled.all() else labelled.to(device, non_blocking=True)
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            yield augment(images), (labels, known)  # what FedGIN adds to FL

    # In the cross-entropy a class weighs 1 / √(its voxels here); only ratios count. With equal
    # weights, small organs sometimes vanish from the prediction for good.
    counts = np.sum([case.counts for case in cases], axis=0)
    weight = torch.from_numpy(counts).clamp(min=1).float().rsqrt().to(device)
    loss = functools.partial(segmentation_loss, weight=weight)
    return Client(n_k=len(cases), batches=batches, loss_function=loss)


# ----------------------------------------------------------------------------------------- a round


def train_arm(
    config: Config,
    training: Training,
    clients: Mapping[str, Client],
    held_out: Iterable[PreparedCase],
    device: torch.device = CPU,
    checkpoint: Checkpoint | None = None,
) -> Iterator[Checkpoint]:
    """Train an arm by FedAvg, yielding a checkpoint after each round.

    Continues from `checkpoint` as if never stopped. Raises FloatingPointError if a loss explodes.
    """
    checkpoint = checkpoint or Checkpoint()
    model = make_model(config, training.seed, device, checkpoint.weights)
    train = functools.partial(train_locally, autocast=mixed_precision(device))
    lr = functools.partial(learning_rate, config)
    modalities = ARMS[training.arm].modalities
    began = time.monotonic()
    rounds = federated_rounds(model, clients, config.rounds, lr, checkpoint.round, train)
    for round_, losses in rounds:
        with noting(f"round {round_}"):
            check_losses(config, losses)
        val_dice: dict[str, float] = {}
        if config.is_validated(round_):
            sums, counts = validate(config, model, held_out, modalities)
            val_dice = mean_dice(sums, counts, modalities)
        done = Round(round_, losses, val_dice, seconds=time.monotonic() - began)
        checkpoint = keep_round(checkpoint, model, done)
        yield checkpoint
        began = time.monotonic()


def make_model(
    config: Config, seed: int, device: torch.device = CPU, weights: Weights | None = None
) -> nn.Module:
    """The U-Net with the initial weights that all arms of a seed start from, or those given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet3D(1, len(config.organs) + 1, config.width, config.depth)
    if weights is not None:
        model.load_state_dict(weights)
    return model.to(device, memory_format=memory_format(device))  # type: ignore[call-overload]


def check_losses(config: Config, losses: Mapping[str, float]) -> None:
    """Raise FloatingPointError for a loss ten times that of a guess: log(classes) + Dice loss 1."""
    if max(losses.values()) > 10 * (math.log(len(config.organs) + 1) + 1):
        raise FloatingPointError(f"the loss exploded ({losses}); a lower --lr may help")


def learning_rate(config: Config, round_: int) -> float:
    return config.lr * (1 - (round_ - 1) / config.rounds) ** 0.9


def validate(
    config: Config, model: nn.Module, cases: Iterable[PreparedCase], modalities: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Dice summed over the cases with an organ, and their number: (modalities, organs) each."""
    sums = torch.zeros(len(modalities), len(config.organs), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for case in cases:
        volume, m = case.read_volume(), modalities.index(case.modality)
        prediction = segment(model, volume.image, config.patch, volume.labels.shape)
        found = torch.from_numpy(dice_by_label(prediction, volume.labels, len(config.organs) + 1))
        sums[m] += found.nan_to_num(0.0)
        counts[m] += ~found.isnan()
    return sums, counts


def mean_dice(sums: Tensor, counts: Tensor, modalities: Sequence[str]) -> dict[str, float]:
    """{modality: mean over organs of each organ's mean over cases}, from what validate gives."""
    by_organ = sums / counts  # NaN where no case has the organ
    return {m: mean(row.tolist()) for m, row in zip(modalities, by_organ, strict=True)}


def keep_round(checkpoint: Checkpoint, model: nn.Module, done: Round) -> Checkpoint:
    """What a training has reached with one more round: its weights, the best ones, its history.

    The best weights have the highest validation Dice, the mean over the modalities that can be
    scored; where none can, they are the last ones.
    """
    weights, history = copy_to_cpu(model.state_dict()), (*checkpoint.history, done)
    reached = replace(checkpoint, round=done.round, weights=weights, history=history)
    val_mean = mean(done.val_dice.values())
    if done.val_dice and not val_mean <= checkpoint.best_dice:  # NaN: the last one
        return replace(reached, best_round=done.round, best_dice=val_mean, best_weights=weights)
    return reached


# ----------------------------------------------------------------------------- the test, and a run


def run_test(
    config: Config, model: nn.Module, cases: Iterable[tuple[Hospital, PreparedCase]]
) -> Iterator[tuple[Hospital, PreparedCase, dict[str, dict]]]:
    """Yield the scores by organ of each test case, on the scan's own grid, in order."""

    def segmented() -> Iterator[tuple]:
        for hospital, case in cases:
            target, spacing = case.read_target()
            prediction = segment(model, case.read_volume().image, config.patch, target.shape)
            args = prediction, target, config.organs, spacing, config.nsd_tolerance, case.labelled
            yield (hospital, case), args

    # Scored in the background; segmented on this thread, because cuDNN tunes algorithms per thread.
    for (hospital, case), scores in in_background(score_case, segmented()):
        yield hospital, case, scores


def run_training(
    folder: TrainingFolder, everyone: Sequence[Hospital], device: torch.device, progress: Progress
) -> None:
    """Train and test one arm with one seed, from where it stopped; keep the results."""
    config, training, checkpoint = folder.config, folder.training, folder.checkpoint()
    clients = make_clients(config, training, everyone, device)
    folder.begin({name: client.n_k for name, client in clients.items()}, device)
    if not folder.is_trained():
        modalities = ARMS[training.arm].modalities
        held_out = hospitals.validation_cases(training.seed, everyone, modalities)
        watched = progress.watch_clients(clients, config.rounds), progress.watch(held_out)
        trained = train_arm(config, training, *watched, device, checkpoint)
        for checkpoint in trained:
            folder.keep_round(checkpoint)
            progress.show_round(checkpoint.history[-1])
        progress.show_choice(checkpoint)
        folder.keep_model(checkpoint)
    model = make_model(config, training.seed, device, checkpoint.best_weights)
    cases = [(hospital, case) for hospital in everyone for case in hospital.test]
    cases_left = progress.watch(cases[folder.n_tested() :], "testing")
    for hospital, case, scores in run_test(config, model, cases_left):
        folder.keep_scores(hospital, case, scores)
    folder.finish(checkpoint)


def run(config: Config) -> int:
    """Train and test what is planned and not finished yet, in config.out; 1 if something failed."""
    run_folder, failed = RunFolder(config, plan(config), arms=list(ARMS)), []
    print(run_folder.describe())
    todo = run_folder.unfinished()
    if todo:
        device = choose_device()
        print(console.describe(config, device))
        needed = {modality for training in todo for modality in ARMS[training.arm].modalities}
        by_seed, notes = hospitals.load_hospitals(config, needed)
        run_folder.open(by_seed)
        chosen = {t: choose_cases(config, t, by_seed[t.seed]) for t in todo}
        print(*notes, console.describe_hospitals(by_seed, chosen), sep="\n", flush=True)
        folders = {t: run_folder.folder(t) for t in todo}
        steps = {f.name: count_steps(f, chosen[t], by_seed[t.seed]) for t, f in folders.items()}
        with Progress(steps) as progress:
            for training, folder in folders.items():
                with progress.attempt(folder.name), run_folder.hold(folder) as held:
                    if held:
                        run_training(folder, by_seed[training.seed], device, progress)
        failed = progress.failed
    print("", run_folder.report(), *failed, sep="\n")
    return int(bool(failed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see console.run_command for its exit codes."""
    console.use_any_characters()
    parser = make_parser(__doc__, {"scenario": SCENARIOS, "arms": ARMS, "ratios": RATIOS})
    config = to_config(parser, parser.parse_args(argv))
    return console.run_command("fedgin.py", lambda: run(config), "; repeat the command to continue")


if __name__ == "__main__":
    sys.exit(main())
