"""FedGIN at separate hospitals: one process each, on a machine of its own, under torchrun.

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.1 \\
        --master-port 29500 -m scripts.multisite --arm fedgin --mri DIR
    torchrun … --node-rank 1 … -m scripts.multisite --arm fedgin --ct DIR  # at the other hospital

Each hospital names only its own folder; docs/several-machines.md says what leaves the hospital. The
parts of a round and of the test are fedgin.py's; the rounds here average over ranks (peers.py).
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record as record_bug

import fedgin
from federated import Client, Weights, noting, train_client, train_locally
from scans import files
from scans.cases import PreparedCase
from scans.files import DataError
from scans.organs import check_organs
from scripts.peers import Peers, join, pack, unpack
from study import console
from study.config import Checkpoint, Config, Round, make_parser, to_config
from study.console import Progress, count_steps
from study.hospitals import Hospital, load_hospitals, validation_cases
from study.inference import choose_device, mixed_precision
from study.results import RunFolder, TrainingFolder, environment

USAGE = "torchrun --nnodes 2 --node-rank N … -m scripts.multisite (--mri | --ct) DIR [options]"
OWN = ("ct", "mri", "test", "layout", "skip_bad", "out", "cache")  # in which ranks may differ
MODALITIES = fedgin.ARMS["fedgin"].modalities
SEVERAL = ("scenario", "arms", "ratios", "mri_cases", "seeds", "sites", "gin_probability")


def run(config: Config, name: str, timeout: int) -> None:
    """Train one model with the other ranks, test it on this hospital's cases, keep both."""
    with join(name, timeout) as peers:
        device = choose_device(int(os.environ["LOCAL_RANK"]))
        print(console.describe(config, device))
        [training] = fedgin.plan(config)
        run_folder = RunFolder(config, [training], arms=list(fedgin.ARMS))
        check_alike(config, name, device, peers)
        by_seed, notes = load_hospitals(config, all_sites_local=False)
        own, *tested = by_seed[training.seed]
        everyone = [own._replace(name=name), *tested]
        shown = console.describe_hospitals({training.seed: everyone}, chosen={})
        print(*notes, shown, sep="\n", flush=True)
        n_cases = check_cases(config, everyone, peers)
        run_folder.open({training.seed: everyone})
        files.claim(run_folder.out / "hospitals.json", n_cases)
        folder = run_folder.folder(training)
        with run_folder.hold(folder) as held:
            if not (held or folder.is_finished()):
                raise DataError(f"{folder.path}: another process is at work on it")
            folder.begin(n_cases, device)
            if not all(peers.exchange(folder.is_finished())):
                steps = count_steps(folder, {name: own.train}, everyone)
                with Progress({folder.name: steps}) as progress:
                    progress.name = f"{name}: {training.label}"
                    run_training(folder, everyone, device, progress, peers)
        print("", run_folder.report(), sep="\n")


def run_training(
    folder: TrainingFolder,
    everyone: Sequence[Hospital],
    device: torch.device,
    progress: Progress,
    peers: Peers,
) -> None:
    """Train and test with the other ranks, from where they stopped; keep the results.

    A rank that has finished gives the others what they lack, and changes nothing of its own.
    """
    config, seed, finished = folder.config, folder.training.seed, folder.is_finished()
    initial = fedgin.make_model(config, seed).state_dict()
    checkpoint = start = share_checkpoint(folder.checkpoint(), initial, peers)
    if finished and start.round < config.rounds:
        raise DataError(f"{folder.path}: its model is gone; delete the folder to train anew")
    clients = fedgin.make_clients(config, folder.training, everyone, device)
    clients = progress.watch_clients(clients, config.rounds)
    held_out = progress.watch(validation_cases(seed, everyone, MODALITIES))
    for checkpoint in train(folder, clients, held_out, device, start, peers):
        folder.keep_round(checkpoint)
        progress.show_round(checkpoint.history[-1])
    if not (finished or folder.is_trained()):
        folder.keep_model(checkpoint)
    model = fedgin.make_model(config, seed, device, checkpoint.best_weights)
    cases = [(hospital, case) for hospital in everyone for case in hospital.test]
    cases_left = progress.watch(cases[folder.n_tested() :], "testing")
    for hospital, case, scores in fedgin.run_test(config, model, cases_left):
        folder.keep_scores(hospital, case, scores)
    ids = {(hospital.name, case.id) for hospital, case in cases}
    own = [score for score in folder.scores() if (score["hospital"], score["case"]) in ids]
    all_scores = share_scores(own, len(config.organs), peers)
    if not finished:
        folder.finish(checkpoint, all_scores)


def train(
    folder: TrainingFolder,
    clients: Mapping[str, Client],
    held_out: Iterable[PreparedCase],
    device: torch.device,
    checkpoint: Checkpoint,
    peers: Peers,
) -> Iterator[Checkpoint]:
    """The rounds of fedgin.train_arm for this rank's only client, while the others train theirs."""
    config, [(name, client)] = folder.config, clients.items()
    model = fedgin.make_model(config, folder.training.seed, device, checkpoint.weights)
    train_mixed = functools.partial(train_locally, autocast=mixed_precision(device))
    for round_ in range(checkpoint.round + 1, config.rounds + 1):
        began, lr = time.monotonic(), fedgin.learning_rate(config, round_)
        with noting(f"round {round_}, hospital {name}"):
            losses = {name: train_client(model, client, round_, lr, train_mixed)}
            fedgin.check_losses(config, losses)
            model.load_state_dict(peers.average(model.state_dict(), client.n_k))
        val_dice: dict[str, float] = {}
        if config.is_validated(round_):
            own = fedgin.validate(config, model, held_out, MODALITIES)
            sums, counts = peers.add_up(torch.stack(own))
            val_dice = fedgin.mean_dice(sums, counts, MODALITIES)
        done = Round(round_, losses, val_dice, seconds=time.monotonic() - began)
        checkpoint = fedgin.keep_round(checkpoint, model, done)
        yield checkpoint


def check_alike(config: Config, name: str, device: torch.device, peers: Peers) -> None:
    """Raise DataError unless all ranks have the same settings and program, and their own names."""
    here = environment(device)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OWN}
    settings |= {"version of FedGIN": here["version"], "code of FedGIN": here["modules"]}
    replies = peers.exchange([name, settings, here["torch"]])
    names, all_settings, versions = zip(*replies, strict=True)
    values = {key: [str(each.get(key)) for each in all_settings] for key in settings}
    differ = [f"{key}: {' / '.join(v)}" for key, v in values.items() if len(set(v)) > 1]
    if differ:
        raise DataError(f"the ranks were started with different {'; '.join(differ)}")
    if len(set(names)) < len(names):
        raise DataError(f"hospitals {', '.join(names)}: two have one name; give one a --name")
    if len(set(versions)) > 1:
        print(f"NOTE: the ranks have different versions of PyTorch: {', '.join(versions)}")


def check_cases(config: Config, everyone: Sequence[Hospital], peers: Peers) -> dict[str, int]:
    """The training cases of each rank's hospital; everyone: this one's, and its --test folders.

    Raises DataError unless this rank has some, and all together label each organ.
    """
    own, *tested = everyone
    if not own.train:
        raise DataError(f"{own.name} has no training case")
    if own.name in [other.name for other in tested]:
        raise DataError(f"{own.name}: a --test folder has the same name; give another --name")
    labelled = itertools.compress(config.organs, own.train[0].labelled[1:].tolist())
    replies = peers.exchange([own.name, len(own.train), list(labelled)])
    by_name = {name: organs for name, _, organs in replies}
    check_organs(by_name, config.organs, config.partial_labels)
    return {name: n_k for name, n_k, _ in replies}


def share_checkpoint(own: Checkpoint, initial: Weights, peers: Peers) -> Checkpoint:
    """The furthest rank's checkpoint, with own history; this rank may have lost its folder."""
    replies = peers.exchange([own.round, own.best_round, own.best_dice])
    source = max(range(peers.size), key=lambda rank: replies[rank][0])
    numbers = torch.cat([pack(w or initial) for w in (own.weights, own.best_weights)])
    parts = peers.add_up(numbers * (peers.rank == source)).chunk(2)
    weights, best_weights = (unpack(part, like=initial) for part in parts)
    round_, best_round, best_dice = replies[source]
    return Checkpoint(round_, weights, best_round, best_dice, best_weights, own.history)


def share_scores(own: list[dict[str, Any]], n_organs: int, peers: Peers) -> list[dict[str, Any]]:
    """The test scores of all ranks; a case's id stays with its rank, and others get a number."""
    sent = [{**score, "case": f"case {peers.rank}-{n // n_organs}"} for n, score in enumerate(own)]
    by_rank = peers.exchange(sent)
    by_rank[peers.rank] = own
    return list(itertools.chain(*by_rank))


def refuse(message: str) -> NoReturn:
    """End a rank that was started with wrong flags, and tell the others."""
    with contextlib.suppress(DataError, ConnectionError), join("its flags", timeout=60):
        raise DataError(message)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see console.run_command for its exit codes."""
    console.use_any_characters()
    own = dict.fromkeys(MODALITIES, "this hospital's folder: one in all, with --ct or --mri")
    own["out"] = "folder for the results (default: runs/ARM-NAME)"
    parser = make_parser(__doc__, leave_out=SEVERAL, texts=own)
    parser.usage = USAGE
    if distributed.is_torchelastic_launched():
        parser.error = refuse  # type: ignore[method-assign]
    add = parser.add_argument_group("federation").add_argument
    add("--arm", default="fedgin", choices=("fl", "fedgin"), help="fl: no GIN (default: fedgin)")
    reason = "0.25, which gains on MRI and costs little on CT; the paper uses 1"
    text = f"probability p that GIN is applied to a training image (default: {reason})"
    add("--gin-probability", type=float, default=0.25, metavar="X", help=text)
    add("--seed", type=int, default=42, metavar="N", help="seed of all draws (default: 42)")
    add("--name", help="this hospital's name (default: its folder's)")
    text = "seconds to wait for another rank (default: 1800)"
    add("--timeout", type=int, default=1800, metavar="S", help=text)
    args = parser.parse_args(argv)
    folders = [*(args.mri or ()), *(args.ct or ())]
    if len(folders) != 1:
        parser.error("name this hospital's folder, and no other, with --mri or --ct")
    name = os.path.basename(os.path.abspath(folders[0])) if args.name is None else args.name
    if not re.fullmatch(r"[^./\\\0-\x1f][^/\\\0-\x1f]{0,99}", name):  # the default --out has it
        parser.error(f"{name!r} cannot be used in file names; give another --name")
    if args.timeout < 1:
        parser.error(f"--timeout must be a positive number of seconds, not {args.timeout}")
    if not distributed.is_torchelastic_launched():
        parser.error("must be started by torchrun; see docs/several-machines.md")
    args.arms, args.seeds, args.gin_probability = [args.arm], [args.seed], [args.gin_probability]
    out = args.out or f"runs/{args.arm}-{name}"
    config = to_config(parser, args, scenario="complete", out=out)
    title = f"multisite (rank {os.environ['RANK']}, {name})"
    hint = "; repeat the commands to continue"
    return console.run_command(title, lambda: run(config, name, args.timeout), hint)


if __name__ == "__main__":
    code = record_bug(main)()  # for torchrun's summary
    sys.stdout.flush()
    os._exit(code or 0)  # gloo's threads may abort an interpreter that shuts down (pytorch#179291)
