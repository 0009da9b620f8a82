"""FedGIN at hospitals that are apart: one process each, on a machine of its own, under torchrun.

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.1 \\
        --master-port 29500 multisite.py --arm fedgin --mri DIR
    torchrun … --node-rank 1 … multisite.py --arm fedgin --ct DIR  # at the other hospital

Each names its own folder only; docs/several-machines.md says what leaves it. The rounds, the
training, the loss, validation and test are fedgin.py's; here are an average over processes, and
what to do when one of them fails.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed, nn

import arms
import fedgin
import results
from config import NOT_COMPARED, Config, describe, how_to_go_on, make_parser, run_command, to_config
from datasets import DataError, check_organs
from evaluate import choose_device
from federated import State, weighted_average
from hospitals import Hospital, load_hospitals, record
from progress import Progress, count_steps

OWN = ("ct", "mri", "test", "layout", "skip_bad", *NOT_COMPARED)  # settings of one hospital alone
SEVERAL = ("scenario", "arms", "ratios", "mri_cases", "seeds", "sites")  # fedgin.py's


class Peers:
    """The processes that torchrun started, one a hospital: what they say, and their sums.

    Short messages (JSON) pass through torchrun's store, sums through PyTorch's gloo and the CPU, so
    that machines with and without a GPU work together. A rank that fails inside `with Peers(…)`
    leaves its reason in the store, where the others find it; one that is silent for `timeout`
    seconds ends the run. Raises ConnectionError for the failure of another rank.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout, self.sums = name, timedelta(seconds=timeout), 0
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(distributed.rendezvous("env://", timeout=self.timeout))
        # After a restart the store still holds what was said before it.
        self.store = distributed.PrefixStore(
            os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store
        )

    def exchange(self, key: str, value: Any) -> list:
        """What each rank says under a key, by rank: anything that JSON can hold."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        began, told = time.monotonic(), 0.0
        self._ask("set", keys[self.rank], json.dumps(value))
        while silent := self._silent(key):
            if reason := self._reason():
                raise ConnectionError(reason)
            waited = time.monotonic() - began
            if waited > self.timeout.total_seconds():
                raise ConnectionError(f"nothing heard of rank {silent[0]} for {waited:.0f} s")
            if waited > told + 1:
                print(f"rank {self.rank} ({self.name}) waits for rank {silent[0]}", flush=True)
                told = waited + 59
            time.sleep(0.1)
        return [json.loads(self._ask("get", text)) for text in keys]

    def connect(self) -> None:
        """Open the links for sums, once every rank has its data."""
        try:
            if device := os.environ.get("GLOO_SOCKET_IFNAME"):
                distributed.ProcessGroupGloo.create_device(interface=device)  # is it there?
            self.exchange("device", None)
            distributed.init_process_group(
                "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )
        except RuntimeError as error:
            raise ConnectionError(self._reason() or str(error)) from error

    def add_up(self, numbers: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks, in place."""
        self.sums += 1
        self._ask("set", f"sum {self.sums}/{self.rank}", "")
        began = time.monotonic()
        try:
            distributed.monitored_barrier(timeout=self.timeout)
            if reason := self._reason():
                raise ConnectionError(reason)
            distributed.all_reduce(numbers)
        except RuntimeError as error:
            reason = self._reason()
            silent = ", ".join(map(str, self._silent(f"sum {self.sums}"))) or "another"
            waited = time.monotonic() - began
            reason = (
                reason
                or f"rank {silent} is silent for {waited:.0f} s: it died, hangs or is cut off"
            )
            raise ConnectionError(reason) from error
        return numbers

    def _silent(self, key: str) -> list[int]:
        return [r for r in range(self.size) if not self._ask("check", [f"{key}/{r}"])]

    def _ask(self, what: str, *args: Any) -> Any:
        """A call of the store, which would block for as long as TCP tries if the link is cut."""
        answer: queue.SimpleQueue = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put((getattr(self.store, what)(*args), None))
            except RuntimeError as error:
                answer.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            value, error = answer.get(timeout=min(self.timeout.total_seconds(), 60))
        except queue.Empty:
            raise ConnectionError(
                "rank 0's machine, which keeps the store, does not answer"
            ) from None
        if error:
            raise ConnectionError(f"rank 0's machine, which keeps the store, is gone ({error})")
        return value

    def average(self, pairs: Iterable[tuple[State, float]]) -> State:
        """w ← Σ_k (n_k / Σ_j n_j) · w_k over all ranks; pairs: this rank's one (w_k, n_k)."""
        [(state, n_k)] = pairs
        w_k = weighted_average([(state, n_k)])  # itself, once checked
        numbers = torch.cat([pack(w_k) * n_k, torch.tensor([n_k], dtype=torch.float64)])
        total = self.add_up(numbers)
        return unpack(total[:-1] / total[-1], like=state)

    def first(self, numbers: Tensor) -> Tensor:
        """Rank 0's numbers, at every rank."""
        return self.add_up(numbers if self.rank == 0 else torch.zeros_like(numbers))

    def __enter__(self) -> "Peers":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error:
            self._leave(error)
        elif os.environ.get("GROUP_RANK") == "0":
            self.exchange("end", None)  # the store lives in this machine's torchrun
        else:
            self._ask("set", f"end/{self.rank}", "null")

    def _reason(self) -> str:
        """Why another rank has failed, as far as it could say."""
        return self._ask("get", "failed").decode() if self._ask("check", ["failed"]) else ""

    def _leave(self, error: BaseException) -> None:
        """Leave a reason for the others, and let them read it before torchrun ends them."""
        reason = ""
        with contextlib.suppress(ConnectionError):
            reason = self._reason()
            if not reason:
                what = str(error) or "was stopped"
                self._ask("set", "failed", f"rank {self.rank} ({self.name}): {what}")
            self._ask("add", "leaving", 1)
            if not isinstance(error, ConnectionError):
                said = str(error) or "stopped"
                print(f"\n{self.name}: {said}; the others are told", file=sys.stderr, flush=True)
                if distributed.is_initialized():
                    with contextlib.suppress(RuntimeError):
                        distributed.monitored_barrier(timeout=self.timeout)  # the others' next sum
                deadline = time.monotonic() + self.timeout.total_seconds()
                while self._ask("add", "leaving", 0) < self.size and time.monotonic() < deadline:
                    time.sleep(0.1)
            elif os.environ.get("GROUP_RANK") == "0":
                time.sleep(1)
        if reason and isinstance(error, KeyboardInterrupt):  # torchrun ends all after the first
            raise ConnectionError(reason) from error


def pack(state: State) -> Tensor:
    """The weights of a state dict as one vector, float64, on the CPU."""
    return torch.cat([w.detach().flatten().double().cpu() for w in state.values()])


def unpack(vector: Tensor, like: State) -> dict[str, Tensor]:
    """A vector of pack's as a state dict again."""
    parts = vector.split([w.numel() for w in like.values()])
    return {
        key: part.view(w.shape).to(w) for (key, w), part in zip(like.items(), parts, strict=True)
    }


# ------------------------------------------------------------------------------- what a rank does


def run(config: Config, name: str, timeout: float) -> None:
    """Train one model with the other ranks, test it on this hospital's cases, keep both."""
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    print(describe(config, device))
    [seed], [arm] = config.seeds, arms.label_arms(config)
    with Peers(name, timeout) as peers:
        results.check_out(config)
        by_seed, notes = load_hospitals(config, alone=False)
        hospitals = [by_seed[seed][0]._replace(name=name), *by_seed[seed][1:]]
        shares = arms.describe_shares(config, hospitals)
        print(*notes, shares, sep="\n")
        check_alike(config, hospitals[0], peers)
        with results.open_run(config, record({seed: hospitals}, config.organs)) as folder:
            if not all(peers.exchange("finished", folder.is_finished(seed, arm))):
                peers.connect()
                model = fedgin.make_model(config, seed, device)
                state = share_state(
                    folder.checkpoint(seed, arm) or fedgin.new_state(seed, arm), model, peers
                )
                rest = hospitals, device, folder
                with Progress(count_steps(config, seed, arm, hospitals, folder)) as progress:
                    progress.name = f"{name}: {arm}"
                    state, scores = fedgin.run_training(
                        config, state, *rest, progress, average=peers.average, add_up=peers.add_up
                    )
                found = share_scores(scores, peers)
                if not folder.is_finished(seed, arm):
                    folder.finish(state, found)
            peers.exchange("kept", None)
            print(f"\n{folder.report(shares)}\n\nEverything is in {config.out}{os.sep}")


def check_alike(config: Config, hospital: Hospital, peers: Peers) -> None:
    """Raise DataError unless all ranks want the same, and can have it.

    Settings must be the same, names differ, each rank have training cases and each organ a label.
    """
    if not hospital.train:
        raise DataError(f"{hospital.name} has no training case")
    labelled = itertools.compress(config.organs, hospital.train[0].labelled[1:])
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OWN}
    own = {"name": hospital.name, "organs": list(labelled), "settings": settings}
    all_ranks = peers.exchange("settings", own)
    for rank, other in enumerate(all_ranks):
        differ = [k for k, v in all_ranks[0]["settings"].items() if other["settings"].get(k) != v]
        if differ:
            raise DataError(f"ranks 0 and {rank} were started with different {', '.join(differ)}")
    names = [other["name"] for other in all_ranks]
    if len(set(names)) < len(names):
        raise DataError(f"hospitals {', '.join(names)}: two have one name; give one a --name")
    organs = {other["name"]: set(other["organs"]) for other in all_ranks}
    check_organs(organs, config.organs, config.partial_labels)


def share_state(state: dict, model: nn.Module, peers: Peers) -> dict:
    """Rank 0's state of the training, at every rank."""
    weights = model.state_dict()
    best, n = state["best"], len(pack(weights))
    numbers = torch.tensor([state["round"], best["round"], best["val_dice"]], dtype=torch.float64)
    own = [numbers, *(pack(w or weights) for w in (state["weights"], best["weights"]))]
    numbers, last, top = peers.first(torch.cat(own)).split([3, n, n])
    round_, best_round, val_dice = numbers.tolist()
    best = {"val_dice": val_dice, "round": int(best_round), "weights": unpack(top, weights)}
    history = [row for row in state["history"] if row["round"] <= round_]  # this hospital's own
    shared = {"round": int(round_), "weights": unpack(last, weights), "best": best}
    return state | shared | {"history": history}


def share_scores(scores: list[dict], peers: Peers) -> list[dict]:
    """The test scores of all ranks; a case's id stays with its rank, which others number."""
    found = []
    nameless = [{**score, "case": None} for score in scores]
    for rank, part in enumerate(peers.exchange("scores", nameless)):
        for n, score in enumerate(scores if rank == peers.rank else part):
            found.append(score if score["case"] else {**score, "case": f"case {n}"})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for its exit codes."""
    parser = make_parser(__doc__, leave_out=SEVERAL)
    add = parser.add_argument_group("federation").add_argument
    add("--arm", default="fedgin", choices=("fl", "fedgin"), help="without or with GIN")
    add("--seed", type=int, default=42, metavar="N", help="of all draws (default: 42)")
    add("--name", help="of this hospital (default: its folder's)")
    text = "seconds for which ranks wait for one another (default: 1800)"
    add("--timeout", type=float, default=1800.0, metavar="S", help=text)
    args = parser.parse_args(argv)
    folders = [*(args.mri or ()), *(args.ct or ())]
    if len(folders) != 1:
        parser.error("name this hospital's folder, and no other, with --mri or --ct")
    if not 0 < args.timeout < float("inf"):
        parser.error(f"--timeout must be a positive number of seconds, not {args.timeout}")
    if "RANK" not in os.environ:
        parser.error("must be started by torchrun; see docs/several-machines.md")
    name = args.name or os.path.basename(os.path.abspath(folders[0]))
    if args.gin_probability and len(args.gin_probability) > 1:
        parser.error("--gin-probability: one value, as one model is trained")
    fixed = {"scenario": "complete", "arms": (args.arm,), "seeds": (args.seed,)}
    config = to_config(parser, args, **fixed, out=args.out or f"runs/{args.arm}-{name}")
    command = f"multisite.py (rank {os.environ['RANK']}, {name})"
    return run_command(
        command, lambda: run(config, name, args.timeout), lambda: how_to_go_on(config)
    )


if __name__ == "__main__":
    sys.exit(main())
