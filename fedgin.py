"""FedGIN: train one 3D organ segmentation model at hospitals that hold CT or MRI and share neither.

The experiment of arXiv 2508.05137: federated averaging (federated.py) of a U-Net (unet3d.py) that
trains on scans redrawn by GIN (gin.py), beside the arms that it is compared with.

    python fedgin.py --scenario limited                      # phantoms, a few minutes on a CPU
    python fedgin.py --scenario complete --ct DIR --mri DIR  # scans, best on a GPU
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import data
import evaluate
import phantom
from data import DataError, Volume
from federated import RankError, Ranks, federated_rounds, train_locally
from gin import GIN
from unet3d import UNet3D


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
PHANTOMS = {"train": range(12), "val": range(12, 16), "test": range(16, 24)}  # of each modality
FORMAT = 1  # of checkpoints and config.json
OWN_TO_A_START = ("out", "cache", "no_cache", "resume", "timeout", "versions")  # may change
STOP = threading.Event()  # set by Ctrl-C and SIGTERM, seen between batches
SCANS = {"rounds": 100, "local_steps": 50, "patch": 96, "width": 32, "depth": 5, "lr": 1e-3}


def flag(default: Any, text: str, **more: Any) -> Any:
    """A field of Config that is a flag too; `more` goes to argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run depends on. Each field is a flag; SCANS overrides the defaults for scans."""

    scenario: str = flag(
        "limited",
        "limited: few MRI training cases, CT added by --ratios; complete: all there is",
        choices=SCENARIOS,
    )
    arms: tuple = flag(
        (), f"of {', '.join(ARMS)} (default: the scenario's own)", choices=ARMS, metavar="ARM"
    )
    ratios: tuple = flag(("1:5",), "MRI : CT training cases, if limited", choices=RATIOS)
    mri_cases: int = flag(2, "MRI training cases, if limited")
    seeds: tuple = flag((42,), "a repetition each: mean ± deviation", type=int, metavar="N")
    ct: tuple = flag((), "folders of CT scans, each a hospital", metavar="DIR")
    mri: tuple = flag((), "folders of MRI scans, each a hospital", metavar="DIR")
    test: tuple = flag((), "folders to test on, never trained on", metavar="DIR")
    sites: int = flag(1, "hospitals into which each folder to train on, or the phantoms, is split")
    organs: tuple = flag(data.ORGANS, "what to segment", choices=data.ORGANS, metavar="ORGAN")
    partial_labels: bool = flag(False, "let a hospital lack some organs, and train on those it has")
    layout: str = flag("", "of the folders, where one looks like two", choices=data.LAYOUTS)
    skip_bad: bool = flag(False, "leave out, and list, cases that cannot be used")
    cache: str = flag("", "for preprocessed scans (default: cache, beside --out)", metavar="DIR")
    no_cache: bool = flag(False, "keep preprocessed scans in memory instead")
    spacing: float = flag(2.0, "voxel size, mm, to which scans are resampled")
    rounds: int = flag(20, "federated rounds")
    local_steps: int = flag(20, "batches that a hospital trains each round, whatever its size")
    batch_size: int = flag(2, "patches a batch")
    patch: int = flag(32, "width of a patch, voxels")
    width: int = flag(8, "channels at the U-Net's first level")
    depth: int = flag(4, "levels of the U-Net; 2^(depth − 1) must divide --patch")
    lr: float = flag(4e-3, "first learning rate; round t of T has (1 − (t − 1) / T)^0.9 of it")
    gin_probability: float = flag(1.0, "share of images that GIN redraws, in arms that use it")
    nsd_tolerance: float = flag(2.0, "mm within which a surface voxel counts as right")
    timeout: float = flag(600.0, "seconds that ranks wait for one another, under torchrun")
    out: str = flag("", "folder for the results (default: runs/SCENARIO)", metavar="DIR")
    resume: bool = flag(False, "go on with the run in --out where it stopped, if there is one")


# --------------------------------------------------------------------------------------- who trains


class Hospital(NamedTuple):
    name: str
    modality: str
    train: Sequence  # of volumes, as val and test
    val: Sequence
    test: Sequence
    here: bool = True  # False: another rank's; train has the length that is known, and no volume


Hospitals = dict[int, list[Hospital]]  # by seed


class Client(NamedTuple):
    """Who trains: a hospital with the cases that the scenario gives it, or all hospitals pooled."""

    cases: list[Volume]
    steps: int  # batches a round
    here: bool = True


class Training(NamedTuple):
    """One model to train."""

    seed: int
    label: str  # the arm and, behind a space, the ratio if the run has several
    clients: dict[str, Client]

    @property
    def arm(self) -> Arm:
        return ARMS[self.label.split()[0]]


def choose_clients(config: Config, label: str, hospitals: Sequence[Hospital]) -> dict[str, Client]:
    """Who trains in an arm, and on which cases; label: the arm and, behind a space, its ratio.

    In the limited scenario few MRI cases take part, and as many CT cases as the ratio says. Raises
    DataError if one of the arm's modalities has no training case, or if cases to be pooled lie with
    several ranks.
    """
    name, _, ratio = label.partition(" ")
    arm, limit = ARMS[name], {"mri": math.inf, "ct": math.inf}
    if config.scenario == "limited":
        there = sum(len(h.train) for h in hospitals if h.modality == "mri")
        limit["mri"] = min(config.mri_cases, there or math.inf)
        limit["ct"] = limit["mri"] * RATIOS[ratio or config.ratios[0]]
    clients: dict[str, Client] = {}
    for modality in arm.modalities:
        holders = [h for h in hospitals if h.modality == modality]
        # In turns, so that a small share of the cases still comes from every hospital.
        turns = sorted((i, k) for k, h in enumerate(holders) for i in range(len(h.train)))
        if not turns:
            raise DataError(
                f"arm {name} needs {modality.upper()} training cases and there are none; give "
                f"folders with --{modality} or choose other --arms"
            )
        for i, k in turns[: int(min(limit[modality], len(turns)))]:
            h = holders[k]
            if h.name not in clients:
                clients[h.name] = Client([], config.local_steps, h.here)
            clients[h.name].cases.append(h.train[i])
    if not arm.pooled:
        return clients
    if not all(client.here for client in clients.values()):
        raise DataError(
            f"arm {name} pools the scans of all hospitals in one place, and these lie with several "
            "ranks; choose other --arms, or run it in one process"
        )
    pool = [case for client in clients.values() for case in client.cases]
    return {"pooled": Client(pool, config.local_steps * len(clients))}


# -------------------------------------------------------------------------------- training an arm


def train_arm(
    config: Config, training: Training, model: nn.Module, start: int, ranks: Ranks
) -> Iterator[tuple[int, float]]:
    """Train a model in place by FedAvg, yielding (round, mean loss) after each round."""
    device = next(model.parameters()).device
    ours = {name: client for name, client in training.clients.items() if client.here}
    losses = {name: segmentation_loss(c.cases, config, device) for name, c in ours.items()}

    def train(name: str, round_: int) -> float:
        loss = train_locally(
            model,
            batches(config, training.arm, ours[name], (training.seed, round_, name), device),
            losses[name],
            lr=config.lr * (1 - (round_ - 1) / config.rounds) ** 0.9,
            autocast=evaluate.mixed_precision(device),
        )
        guessing = math.log(len(config.organs) + 1) + 1  # the loss of equal probabilities
        if loss > 10 * guessing:
            raise ValueError(f"the loss has exploded to {loss:.3g}; a lower --lr may help")
        return loss

    n_k = {name: len(client.cases) for name, client in ours.items()}
    average = functools.partial(ranks.average, like=model.state_dict())
    for round_, loss in federated_rounds(model, n_k, train, config.rounds, start, average):
        total = torch.tensor(sum(loss.values()), dtype=torch.float64)
        yield round_, ranks.add_up(total).item() / len(training.clients)


def batches(
    config: Config, arm: Arm, client: Client, key: tuple, device: torch.device
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Yield what a hospital trains on in a round: (images, (labels, labelled)), on the device."""
    augment: nn.Module = nn.Identity()
    if arm.gin:
        augment = GIN(config.gin_probability, generator=generator(*key, "gin"))
    draws = generator(*key, "patches")
    drawn = data.patches(client.cases, config.patch, config.batch_size, client.steps, draws)
    for batch in data.ahead(drawn, pin=device.type == "cuda"):
        stop_if_asked()
        images, labels, labelled = (part.to(device, non_blocking=True) for part in batch)
        yield augment(images), (labels, labelled)


def generator(*key: Any) -> torch.Generator:
    """Random numbers that depend on nothing but the key: seed, round, hospital and purpose."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def make_model(config: Config, seed: int, device: torch.device) -> nn.Module:
    """The U-Net with the initial weights that all arms of a seed start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet3D(1, len(config.organs) + 1, config.width, config.depth)
    model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return model


def segmentation_loss(
    cases: Sequence[Volume], config: Config, device: torch.device
) -> Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]:
    """Cross-entropy + soft Dice over the organs: (logits, (labels, labelled)) → scalar.

    labelled, (B, classes), says which organs an image's hospital labels. Where it labels no spleen,
    say, a spleen voxel is background by its labels; so the probabilities of unlabelled organs are
    added to the background's first (the marginal loss, Shi et al. 2021, arXiv 2007.03868).

    The cross-entropy weights a class by 1 / √(its share of the client's training voxels): with
    equal weights small organs now and then vanish from the prediction for good.
    """
    classes = len(config.organs) + 1
    counts = sum(np.bincount(case.labels.ravel(), minlength=classes) for case in cases)
    weight = torch.from_numpy(counts).clamp(min=1).float().rsqrt().to(device)
    partial = not all(case.labelled.all() for case in cases)

    def loss(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, labelled = targets
        known = labelled[:, :, None, None, None]  # (B, classes, 1, 1, 1)
        log_p = logits.log_softmax(dim=1)  # (B, classes, D, H, W)
        if partial:
            unknown = log_p.masked_fill(known, -torch.inf)[:, 1:]
            background = torch.cat([log_p[:, :1], unknown], dim=1).logsumexp(dim=1, keepdim=True)
            log_p = torch.cat([background, log_p[:, 1:]], dim=1)
        p, truth = log_p.exp() * known, F.one_hot(labels, classes).movedim(-1, 1)
        overlap = (p * truth).sum((0, 2, 3, 4))
        size = p.sum((0, 2, 3, 4)) + truth.sum((0, 2, 3, 4))
        dice = ((2 * overlap + 1) / (size + 1))[1:]
        there = labelled.any(dim=0)[1:]
        return F.nll_loss(log_p, labels, weight) + 1 - (dice * there).sum() / there.sum()

    return loss


# --------------------------------------------------------------------------- validation and tests


def validate(
    config: Config,
    model: nn.Module,
    hospitals: Sequence[Hospital],
    modalities: Sequence[str],
    ranks: Ranks,
) -> dict[str, float]:
    """{modality: mean Dice of all hospitals' validation cases}, on the model's grid.

    Training cases stand in at a hospital that has no validation case.
    """
    sums = torch.zeros(2, len(modalities), len(config.organs), dtype=torch.float64)
    total, cases = sums
    for hospital in hospitals:
        if not hospital.here or hospital.modality not in modalities:
            continue
        row = modalities.index(hospital.modality)
        for case in hospital.val or hospital.train:
            stop_if_asked()
            truth = case.labels
            pred = evaluate.segment(model, case.image, config.patch, truth.shape)
            for n in range(1, len(config.organs) + 1):
                dice = evaluate.dice(pred == n, truth == n) if case.labelled[n] else math.nan
                if not math.isnan(dice):
                    total[row, n - 1] += dice
                    cases[row, n - 1] += 1
    total, cases = ranks.add_up(sums)
    by_organ = total / cases  # NaN where no case has the organ
    return {m: evaluate.mean(row.tolist()) for m, row in zip(modalities, by_organ, strict=True)}


def test(config: Config, model: nn.Module, hospitals: Sequence[Hospital]) -> list[dict]:
    """Scores by organ of every test case, on the scan's own grid."""
    results = []
    for hospital in hospitals:
        for case in hospital.test:
            stop_if_asked()
            truth, modality = case.labels, hospital.modality
            spacing: tuple[float, ...] = (phantom.SPACING,) * 3
            if case.case:
                scan, truth = data.read_usable(case.case, config.organs)
                spacing, modality = scan.spacing, case.case.modality
            pred = evaluate.segment(model, case.image, config.patch, truth.shape)
            scores = evaluate.score_case(
                pred, truth, config.organs, spacing, config.nsd_tolerance, case.labelled
            )
            where = {"hospital": hospital.name, "modality": modality, "case": case.id}
            results.append({**where, "scores": scores})
    return results


# ------------------------------------------------------------------------------------ a whole run


def run(config: Config) -> None:
    """Train and test every arm with every seed, and write the results to config.out.

    Under torchrun each rank does so for its own hospitals, and rank 0 alone prints and writes.
    """
    out, names = Path(config.out), hospital_names(config)
    if len(set(names)) < len(names):
        raise DataError(f"two hospitals would have the same name ({', '.join(names)})")
    with Ranks(names, config.timeout) as ranks:
        check_alike(config, ranks)
        if (out / "config.json").exists() and not config.resume:
            raise DataError(
                f"{out}: already holds a run; --resume continues it, --out makes another"
            )
        device = choose_device()
        show = print if ranks.rank == 0 else lambda *_: None
        show(describe(config, device, ranks))
        hospitals = load_hospitals(config, ranks)
        plan = [
            Training(seed, label, choose_clients(config, label, hospitals[seed]))
            for seed in config.seeds
            for label in run_labels(config)
        ]
        for _, label, clients in plan[: len(plan) // len(config.seeds)]:
            shares = (f"{name} {len(client.cases)}" for name, client in clients.items())
            show(f"{label + ':':20} training cases: {', '.join(shares)}")
        with locked(out, ranks), stopping_between_batches():
            done = go_through(plan, config, hospitals, device, ranks)
            if ranks.rank == 0:
                report = write_report(config, done)
                show(f"\n{report}\n\nEverything is in {out}{os.sep}")


def go_through(
    plan: list[Training], config: Config, hospitals: Hospitals, device: torch.device, ranks: Ranks
) -> dict:
    """Train and test what the run in config.out has not yet; return what results.json holds."""
    done, state = open_run(config, hospitals, ranks)
    finished = ranks.gather(done["finished"])[0]
    for training in plan:
        seed, label, _ = training
        if [seed, label] in finished:
            continue
        try:
            model = make_model(config, seed, device)
            fit(model, config, training, hospitals[seed], state, ranks)
            save_best(model, config, training, state["best"], ranks)
            scores = everyones(test(config, model, hospitals[seed]), ranks)
            done["results"] += [{"seed": seed, "arm": label, **score} for score in scores]
            done["finished"].append([seed, label])
            if ranks.rank == 0:
                write(Path(config.out) / "results.json", json.dumps(done, indent=1).encode())
        except (DataError, RuntimeError, OSError, MemoryError) as error:
            raise RuntimeError(f"seed {seed}, arm {label}: {error}") from error
    return done


def fit(
    model: nn.Module,
    config: Config,
    training: Training,
    hospitals: Sequence[Hospital],
    state: dict,
    ranks: Ranks,
) -> None:
    """Train an arm behind a progress bar, and choose its weights by the mean validation Dice.

    state is what the last checkpoint held. It is brought up to date and saved after every round, so
    that an arm goes on in the round in which it stopped.
    """
    out, (seed, label, _) = Path(config.out), training
    if (state.get("seed"), state.get("arm")) == (seed, label):
        model.load_state_dict(state["weights"])
    else:
        state |= {"seed": seed, "arm": label, "round": 0, "best": {"val_dice": -math.inf}}
    model.load_state_dict(ranks.first(model.state_dict()))
    start = ranks.gather(state["round"])[0]
    looks = {"desc": f"{label}, seed {seed}", "unit": "round", "disable": ranks.rank > 0}
    with tqdm(total=config.rounds, initial=start, **looks) as bar:
        for round_, loss in train_arm(config, training, model, start, ranks):
            dice = validate(config, model, hospitals, training.arm.modalities, ranks)
            mean = sum(dice.values()) / len(dice)
            mean = -1.0 if math.isnan(mean) else mean  # no organ in any validation case
            weights = {key: w.cpu().clone() for key, w in model.state_dict().items()}
            if mean > state["best"]["val_dice"] or round_ == 1:
                state["best"] = {"val_dice": mean, "round": round_, "weights": weights}
            row = [seed, label, round_, loss, dice.get("mri", ""), dice.get("ct", "")]
            state |= {"round": round_, "weights": weights, "history": [*state["history"], row]}
            if ranks.rank == 0:
                save(out / "checkpoint.pt", state)
                write_history(out / "history.csv", state["history"])
            shown = {f"val_{m}": f"{d:.3f}" for m, d in dice.items()}
            bar.set_postfix(loss=f"{loss:.3f}", **shown, refresh=False)
            bar.update()


def save_best(
    model: nn.Module, config: Config, training: Training, best: dict, ranks: Ranks
) -> None:
    """Give the model its best weights; save them with what evaluate.py must know to use them."""
    model.load_state_dict(ranks.first(best.get("weights", model.state_dict())))
    spacing = phantom.SPACING if on_phantoms(config) else config.spacing
    needs = {"organs": config.organs, "spacing": spacing, "normalization": data.NORMALIZATION}
    needs |= {key: getattr(config, key) for key in ("patch", "width", "depth")}
    seed, arm, _ = training
    about = {"format": FORMAT, "arm": arm, "seed": seed, "model": needs}
    if ranks.rank == 0:
        save(checkpoint_path(config, arm, seed), {**best, **about})


def everyones(scores: list[dict], ranks: Ranks) -> list[dict]:
    """The test scores of all ranks; where there are several, a case's name stays with its rank."""
    if ranks.size == 1:
        return scores
    nameless = [{**score, "case": None} for score in scores]
    everyone = [score for part in ranks.gather(nameless) for score in part]
    return [{**score, "case": f"case {n}"} for n, score in enumerate(everyone)]


def choose_device() -> torch.device:
    """The GPU of this process, of which torchrun may start several on a machine; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def checkpoint_path(config: Config, label: str, seed: int) -> Path:
    """Where the trained model of an arm is kept."""
    name = label.replace(":", "-").replace(" ", "-") + f"-seed{seed}" * (len(config.seeds) > 1)
    return Path(config.out) / f"{name}.pt"


def run_labels(config: Config) -> list[str]:
    """The arms to run; the ratio stands behind those that differ by it, if there are several."""
    if config.scenario == "complete" or len(config.ratios) == 1:
        return list(config.arms)
    return [
        f"{name} {ratio}".strip()
        for name in config.arms
        for ratio in (config.ratios if "ct" in ARMS[name].modalities else [""])
    ]


def write_report(config: Config, done: dict) -> str:
    """Write the tables to results.md and remove what only an unfinished run needs."""
    out = Path(config.out)
    summary = evaluate.summarize(done["results"], config.organs)
    tables = evaluate.table(summary, config.organs)
    report = "\n\n".join([title(config), tables, in_words(summary)])
    write(out / "results.md", f"{report}\n".encode())
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return report


# -------------------------------------------------------------------------------------- hospitals


class Place(NamedTuple):
    """What --ct, --mri or --test names: a folder, or on phantoms a modality."""

    folder: str
    modality: str  # "" for --test, where a folder may hold both
    hospitals: tuple[str, ...]  # their names: one, or as many as --sites says if it is trained on


def places(config: Config) -> list[Place]:
    """MRI first, --test last. Ranks divide the hospitals by this order."""
    found = [(folder, m) for m in ("mri", "ct") for folder in getattr(config, m)]
    found = [(m, m) for m in ("mri", "ct")] if on_phantoms(config) else found
    found += [(folder, "") for folder in config.test]
    names = [os.path.basename(os.path.abspath(folder)) for folder, _ in found]
    names = [n if names.count(n) == 1 else f"{n}-{i}" for i, n in enumerate(names, start=1)]
    sites = [f"-{i + 1}" for i in range(config.sites)] if config.sites > 1 else [""]
    return [
        Place(folder, modality, tuple(name + site for site in (sites if modality else [""])))
        for name, (folder, modality) in zip(names, found, strict=True)
    ]


def hospital_names(config: Config) -> list[str]:
    return [name for place in places(config) for name in place.hospitals]


def on_phantoms(config: Config) -> bool:
    return not (config.ct or config.mri)


def load_hospitals(config: Config, ranks: Ranks) -> Hospitals:
    """All hospitals, by seed; of those that other ranks work for, only how many cases they have."""
    everywhere, hospitals = places(config), {}
    ours = [place for place in everywhere if set(place.hospitals) & set(ranks.ours())]
    parts = phantom_cases(config) if on_phantoms(config) else scan_cases(config, ours, ranks)
    for seed in config.seeds:
        there = {h.name: h for place in ours for h in deal_out(parts(place, seed), place)}
        mine = {name: len(there[name].train) for name in ranks.ours()}
        counts = {name: n for part in ranks.gather(mine) for name, n in part.items()}
        hospitals[seed] = [
            there[name]
            if name in mine
            else Hospital(name, place.modality, range(counts[name]), (), (), here=False)
            for place in everywhere
            for name in place.hospitals
        ]
    return hospitals


def deal_out(parts: dict[str, list], place: Place) -> list[Hospital]:
    """Divide the cases of a place among its hospitals."""
    sites, (train, val, test) = len(place.hospitals), (parts[part] for part in PHANTOMS)
    if sites > 1 and len(train) < sites:
        raise DataError(f"--sites {sites}: {place.folder} has {len(train)} training cases, too few")
    return [
        Hospital(name, place.modality, train[i::sites], val[i::sites], test[i::sites])
        for i, name in enumerate(place.hospitals)
    ]


def phantom_cases(config: Config) -> Callable[[Place, int], dict]:
    """A function (place, seed) → {"train": volumes, "val": …, "test": …}."""
    organs = config.organs
    everything = np.ones(len(organs) + 1, dtype=bool)
    label = [0] + [organs.index(o) + 1 if o in organs else 0 for o in phantom.ORGANS]
    new_label = np.array(label, dtype=np.uint8)

    def volume(seed: int, modality: str, index: int) -> Volume:
        image, labels = phantom.phantom(seed, modality, index)
        image, labels = data.normalize(image, modality), new_label[labels]
        return data.make_volume(f"phantom{index:02d}", image, labels, everything)

    return lambda place, seed: {
        part: [volume(seed, place.modality, index) for index in indices]
        for part, indices in PHANTOMS.items()
    }


def scan_cases(config: Config, ours: list[Place], ranks: Ranks) -> Callable[[Place, int], dict]:
    """The same for folders, whose scans are all read here, once."""
    layout = config.layout or None
    cases = {p: data.find_cases(p.folder, p.modality or None, layout) for p in ours}
    masks = {p.folder: sorted(set().union(*(c.masks for c in group))) for p, group in cases.items()}
    labelled = {f: set(organs) for part in ranks.gather(masks) for f, organs in part.items()}
    data.check_organs(labelled, config.organs, config.partial_labels)
    everything = [case for group in cases.values() for case in group]
    for scan, n in Counter(case.image.resolve() for case in everything).items():
        if n > 1:
            raise DataError(f"{scan}: is in two of the folders given; a scan has one role only")
    cache = None if config.no_cache else Path(config.cache)
    volumes, left_out = data.load_cases(
        everything, config.organs, config.spacing, cache, config.skip_bad
    )
    for trouble in left_out:
        print(f"left out: {trouble}")

    def parts(place: Place, seed: int) -> dict[str, list]:
        usable = [case for case in cases[place] if case.image in volumes]
        split = {"train": [], "val": [], "test": usable}
        if place.modality:
            split = data.split_cases(usable, seed, test_elsewhere=bool(config.test))
        return {part: [volumes[case.image] for case in group] for part, group in split.items()}

    return parts


# ------------------------------------------------------------------------------- what keeps a run


def check_alike(config: Config, ranks: Ranks) -> None:
    """Raise DataError if a rank was started with other settings than rank 0."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OWN_TO_A_START}
    first, *others = ranks.gather(settings)
    differ = [key for key in first if any(other.get(key) != first[key] for other in others)]
    if differ:
        raise DataError(
            f"ranks were started with different {', '.join(differ)}; only --out, --cache and "
            "--timeout may differ"
        )


def open_run(config: Config, hospitals: Hospitals, ranks: Ranks) -> tuple[dict, dict]:
    """What the run in config.out has done, and its last checkpoint; both empty for a new run.

    Raises DataError for a damaged file, and with the fields that differ if that run had other
    settings or other data. Rank 0 keeps the run, each rank what concerns its own hospitals.
    """
    out, differ = Path(config.out), []
    about = {
        out / f"hospitals/{n}.json": about_hospital(n, hospitals, config) for n in ranks.ours()
    }
    if ranks.rank == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        settings = {"format": FORMAT, **dataclasses.asdict(config), "versions": versions}
        about[out / "config.json"] = settings
    texts = {path: json.dumps(content, indent=1) for path, content in about.items()}
    for path, text in texts.items():
        ours = json.loads(text)
        theirs = read(path, missing=ours)
        differ += [k for k in ours if ours[k] != theirs.get(k) and k not in OWN_TO_A_START]
    differ = [field for part in ranks.gather(differ) for field in part]
    if differ:
        fields = ", ".join(dict.fromkeys(differ))
        raise DataError(f"{out}: holds a run with other {fields}; choose another --out")
    (out / "hospitals").mkdir(exist_ok=True)
    for path, text in texts.items():
        if not path.exists():
            write(path, text.encode())
    done: dict = {"finished": [], "results": []}
    state: dict = {"history": []}
    if ranks.rank > 0:
        return done, state
    return read(out / "results.json", done), read(out / "checkpoint.pt", state)


def about_hospital(name: str, hospitals: Hospitals, config: Config) -> dict:
    """Which case went where, by seed, and what the files of each case were."""
    splits, files = {}, {}
    for seed, group in hospitals.items():
        [hospital] = [h for h in group if h.name == name]
        parts = {part: getattr(hospital, part) for part in PHANTOMS}
        splits[seed] = {part: [case.id for case in cases] for part, cases in parts.items()}
        for case in itertools.chain(*parts.values()):
            if case.case and case.id not in files:
                stamps = data.fingerprint(case.case, config.organs)
                files[case.id] = [stamp[1:] for stamp in stamps]
    return {"splits": splits, "files": files}


@contextlib.contextmanager
def stopping_between_batches() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the batch; a second one does not wait.

    An exception from a signal handler can get lost, in an import inside PyTorch for one.
    """

    def note(number: int, frame: Any) -> None:
        if STOP.is_set():
            raise KeyboardInterrupt
        STOP.set()

    STOP.clear()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    if STOP.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make a folder and keep every other run out of it; the system frees it if we die."""
    out.mkdir(parents=True, exist_ok=True)
    if ranks.rank > 0:
        yield
        return
    with open(out / "lock", "a", encoding="utf-8") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{out}: another process is at work on this run") from error
        yield


def write_history(path: Path, rows: list[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["seed", "arm", "round", "loss", "val_dice_mri", "val_dice_ct"])
    writer.writerows(rows)
    write(path, text.getvalue().encode())


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def read(path: Path, missing: dict) -> dict:
    """What a JSON file or a checkpoint holds, or `missing` if it is not there yet."""
    if not path.exists():
        return missing
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch has many for a file that is not its own
        what = f"cannot be read ({type(error).__name__})"
        raise DataError(f"{path}: {what}; choose another --out") from error


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, on the disk when this returns."""
    temporary = path.with_name(f"tmp-{path.name}")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# ------------------------------------------------------------------------------------- the report


def title(config: Config) -> str:
    ratios = f", MRI : CT {' '.join(config.ratios)}" if config.scenario == "limited" else ""
    source = "PHANTOMS (synthetic volumes, not patients)" if on_phantoms(config) else "scans"
    seeds = " ".join(map(str, config.seeds))
    return f"## Test scores, {config.scenario} scenario{ratios}, seeds {seeds}: {source}"


def in_words(summary: dict) -> str:
    """FedGIN against FL, the best local arm and centralized+gin: the paper's three comparisons."""
    local = [arm for arm in summary if arm.startswith(("mri-only", "ct-only"))]
    lines = []
    for ours in (arm for arm in summary if arm.startswith("fedgin")):
        ratio = ours.removeprefix("fedgin")
        rivals = {"FL": [f"fl{ratio}"], "the best local arm": local}
        rivals["centralized+gin"] = [f"centralized+gin{ratio}"]
        for name, arms in rivals.items():
            words = []
            for m in ("mri", "ct"):
                dice = {arm: summary[arm]["dice", m][0] for arm in (*arms, ours) if arm in summary}
                a = dice.pop(ours)
                if dice and not math.isnan(a):
                    theirs, b = max(dice.items(), key=lambda item: item[1])
                    change = f" ({a / b - 1:+.0%})" if b > 0 else ""
                    words.append(f"{m.upper()} Dice {a:.3f} to {theirs}'s {b:.3f}{change}")
            lines += [f"- {ours} against {name}: {', '.join(words)}"] if words else []
    return "\n".join(lines)


def describe(config: Config, device: torch.device, ranks: Ranks) -> str:
    """What this run is, for the reader's eyes: its data first, then every setting."""
    first = "FedGIN on scans"
    if on_phantoms(config):
        first = (
            "FedGIN on PHANTOMS: without --ct and --mri it trains on synthetic volumes, whose "
            "figures say nothing about patients"
        )
    settings = [
        f"  {key:16} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in dataclasses.asdict(config).items()
        if value != ()
    ]
    settings.append(f"  {'device':16} {device}, torch {torch.__version__}")
    if ranks.size > 1:
        settings += [f"  {f'rank {r}':16} {', '.join(ranks.ours(r))}" for r in range(ranks.size)]
    return "\n".join([first, *settings])


# ------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see python fedgin.py --help")


def parse(argv: Sequence[str] | None) -> Config:
    """Make a Config of the command line; raises DataError for values that cannot work."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        more = {"default": argparse.SUPPRESS, **field.metadata}
        if isinstance(field.default, bool):
            more["action"] = "store_true"
        elif isinstance(field.default, tuple):
            more["nargs"] = "+"
        else:
            more["type"] = type(field.default)
            more.setdefault("metavar", {int: "N", float: "X"}.get(more["type"]))
        more["help"] += describe_default(field)
        parser.add_argument("--" + field.name.replace("_", "-"), **more)
    given = vars(parser.parse_args(argv))
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    config = Config(**((SCANS if given.get("ct") or given.get("mri") else {}) | given))
    out = Path(config.out or f"runs/{config.scenario}")
    config = dataclasses.replace(
        config,
        arms=config.arms or SCENARIOS[config.scenario],
        out=str(out),
        cache=config.cache or str(out.parent / "cache"),
    )
    check(config)
    return config


def describe_default(field: dataclasses.Field) -> str:
    if field.default in ((), "", False):
        return ""
    shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    scans = f"; on scans {SCANS[field.name]}" if field.name in SCANS else ""
    return f" (default: {shown}{scans})"


def check(config: Config) -> None:
    """Raise DataError, naming the flag, for a value that cannot work."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise DataError(f"{name} names something twice: {' '.join(map(str, value))}")
        if field.name == "gin_probability":
            if not 0 <= value <= 1:
                raise DataError(f"{name} must lie between 0 and 1, not {value}")
        elif type(value) in (int, float) and not (value > 0 and math.isfinite(value)):
            raise DataError(f"{name} must be a positive number, not {value}")
    divisor = 2 ** (config.depth - 1)
    if config.patch % divisor or config.patch == divisor:
        raise DataError(
            f"--patch {config.patch} does not fit --depth {config.depth}: it must be a multiple of "
            f"{divisor}, and larger"
        )
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise DataError(f"--out {config.out} is a file; it must be a folder, or a new name")
    if config.test and on_phantoms(config):
        raise DataError("--test needs folders to train on; give --ct and --mri too")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 for a run that failed, 2 for bad input, 130 for a stop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    me = f"fedgin.py (rank {os.environ['RANK']})" if "RANK" in os.environ else "fedgin.py"
    try:
        run(parse(argv))
    except DataError as error:
        print(f"{me}: {error}", file=sys.stderr)
        return 2
    except (RankError, RuntimeError, OSError, MemoryError) as error:
        print(f"{me}: the run failed: {error}", file=sys.stderr)
        print("Finished rounds are kept; the same command with --resume goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{me}: stopped; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
