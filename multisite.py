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
import multiprocessing.pool
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.elastic.multiprocessing.errors import record as record_bug
from tqdm import tqdm

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
SEVERAL = ("scenario", "arms", "ratios", "mri_cases", "seeds", "sites", "gin_probability")


class PeerError(ConnectionError):
    """Another rank has failed, or cannot be reached."""


class Peers:
    """The processes that torchrun started, one a hospital: what they say, and their sums.

    Short messages (JSON) pass through torchrun's store, sums through PyTorch's gloo and the CPU, so
    that machines with and without a GPU work together. Raises PeerError once another rank has left
    its reason to fail in the store, closed its links, or let this one wait for `timeout` seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.timeout, self.sums, self.lost = timeout, 0, list[str]()
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.labels = [f"rank {rank}" for rank in range(self.size)]
        self.labels[self.rank] += f" ({name})" if name else ""
        self.thread = multiprocessing.pool.ThreadPool(1)
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # After a restart the store still holds what was said before it.
        self.store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)

    def exchange(self, key: str, value: Any) -> list:
        """What each rank says under a key, by rank: anything that JSON can hold."""
        self._ask("set", f"{key}/{self.rank}", json.dumps(value))
        self._wait(key, lambda: not self._silent(key))
        return [json.loads(self._ask("get", f"{key}/{rank}")) for rank in range(self.size)]

    def connect(self) -> None:
        """Open the links for sums, once every rank has its data."""
        try:
            if device := os.environ.get("GLOO_SOCKET_IFNAME"):
                distributed.ProcessGroupGloo.create_device(interface=device)  # is it there?
            self.exchange("device", None)
            timeout = timedelta(seconds=self.timeout)
            distributed.init_process_group(
                "gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=timeout
            )
        except RuntimeError as error:
            raise ConnectionError(f"no links to the other ranks: {error}") from error

    def add_up(self, numbers: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks, in place."""
        self.sums += 1
        key = f"sum {self.sums}"
        self._ask("set", f"{key}/{self.rank}", "")
        try:
            work = distributed.all_reduce(numbers, async_op=True)
            self._wait(key, work.is_completed)
            work.wait()
        except RuntimeError as error:  # gloo's, of a link that is closed or silent
            raise self._in_vain(key) from error
        return numbers

    def average(self, pairs: Iterable[tuple[State, float]]) -> State:
        """w ← Σ_k (n_k / Σ_j n_j) · w_k over all ranks; pairs: this rank's one (w_k, n_k)."""
        [(state, n_k)] = pairs
        w_k = weighted_average([(state, n_k)])  # itself, once checked
        numbers = torch.cat([pack(w_k) * n_k, torch.tensor([n_k], dtype=torch.float64)])
        total = self.add_up(numbers)
        return unpack(total[:-1] / total[-1], like=state)

    def leave(self, error: BaseException) -> None:
        """Tell why this rank ends, unless another has failed first; torchrun says so at the end."""
        reason = f"{self.labels[self.rank]}: {str(error) or 'was stopped'}"
        if isinstance(error, PeerError):
            reason, error.__notes__ = str(error), []  # which blame this rank's round
        with contextlib.suppress(PeerError):
            mine = json.dumps([reason, self.lost])
            reason, self.lost = json.loads(self._ask("compare_set", "failed", "", mine))
            self._ask("set", f"left/{self.rank}", "")
            # Until all know: the store ends with the torchrun of rank 0.
            self._wait("left", lambda: not self._silent("left"), f"{reason}; ")
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            about = {"message": reason, "extraInfo": {"timestamp": int(time.time())}}
            Path(path).write_text(json.dumps({"message": about}))  # as torch's ErrorHandler does

    def _wait(self, key: str, done: Callable[[], bool], note: str = "") -> None:
        """Wait until done(), and say for whom: the ranks that have not set the key."""
        began, tell_at = time.monotonic(), 1
        while not done():
            waited = time.monotonic() - began
            if waited > self.timeout or (key != "left" and self._ask("check", ["failed"])):
                raise self._in_vain(key)
            if waited > tell_at and (silent := self._silent(key)):
                who = f"{note}{self.labels[self.rank]}"
                tqdm.write(f"{who} waits for {', '.join(silent)}", file=sys.stderr)
                tell_at += 60
            time.sleep(min(0.001 + waited / 10, 0.2))

    def _in_vain(self, key: str) -> PeerError:
        """What to raise where others are waited for in vain: their reason, or who is silent."""
        if self._ask("check", ["failed"]):
            return PeerError(json.loads(self._ask("get", "failed"))[0])
        silent = self._silent(key)
        self.lost = silent or self.labels  # nobody waits for these to leave
        who, limit = " or ".join(silent) or "another rank", f"--timeout {self.timeout:g}"
        return PeerError(f"{who} was killed, is cut off or takes longer than {limit}")

    def _silent(self, key: str) -> list[str]:
        """The ranks that have not set a key."""
        missing = [not self._ask("check", [f"{key}/{rank}"]) for rank in range(self.size)]
        return [who for who in itertools.compress(self.labels, missing) if who not in self.lost]

    def _ask(self, call: str, *args: Any) -> Any:
        """Call the store, but no longer than a minute: TCP would try for many if a link is cut."""
        try:
            answer = self.thread.apply_async(getattr(self.store, call), args)
            return answer.get(min(self.timeout, 60))
        except (multiprocessing.TimeoutError, RuntimeError) as error:
            what = str(error) or "no answer"
            raise PeerError(f"rank 0's machine, which keeps the store, is gone ({what})") from error


@contextlib.contextmanager
def join(name: str, timeout: float) -> Iterator[Peers]:
    """Be one of the ranks; what ends it early is told to the others and to torchrun."""
    peers = Peers(name, timeout)
    try:
        yield peers
        peers.exchange("end", None)
    except BaseException as error:
        peers.leave(error)
        raise
    if os.environ["GROUP_RANK"] == "0":
        time.sleep(1)  # or the others' torchrun may miss the store, and say so at length


def pack(state: State) -> Tensor:
    """The weights of a state dict as one vector, float64, on the CPU."""
    return torch.cat([w.detach().flatten().double().cpu() for w in state.values()])


def unpack(vector: Tensor, like: State) -> dict[str, Tensor]:
    """A vector of pack's as a state dict again."""
    parts = vector.split([w.numel() for w in like.values()])
    return {k: p.view(w.shape).to(w) for (k, w), p in zip(like.items(), parts, strict=True)}


# ------------------------------------------------------------------------------- what a rank does


def run(config: Config, name: str, timeout: float) -> None:
    """Train one model with the other ranks, test it on this hospital's cases, keep both."""
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    print(describe(config, device))
    [seed], [arm] = config.seeds, arms.label_arms(config)
    with join(name, timeout) as peers:
        results.check_out(config)
        check_alike(config, name, peers)
        by_seed, notes = load_hospitals(config, alone=False)
        hospitals = [by_seed[seed][0]._replace(name=name), *by_seed[seed][1:]]
        shares = arms.describe_shares(config, hospitals)
        print(*notes, shares, sep="\n")
        check_cases(config, hospitals, peers)
        with results.open_run(config, record({seed: hospitals}, config.organs)) as folder:
            if not all(peers.exchange("finished", folder.is_finished(seed, arm))):
                peers.connect()
                model = fedgin.make_model(config, seed, device)
                state = share_state(
                    folder.checkpoint(seed, arm) or fedgin.new_state(seed, arm), model, peers
                )
                rest = hospitals, device, folder
                with Progress(count_steps(config, state, hospitals)) as progress:
                    progress.name = f"{name}: {arm}"
                    state, scores = fedgin.run_training(
                        config, state, *rest, progress, average=peers.average, add_up=peers.add_up
                    )
                found = share_scores(scores, peers)
                if not folder.is_finished(seed, arm):
                    folder.finish(state, found)
            peers.exchange("kept", None)
            print(f"\n{folder.report(shares)}\n\nEverything is in {config.out}{os.sep}")


def check_alike(config: Config, name: str, peers: Peers) -> None:
    """Raise DataError unless all ranks have the same settings, and names of their own."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in OWN}
    all_ranks = peers.exchange("settings", {"name": name, "settings": settings})
    names = [other["name"] for other in all_ranks]
    peers.labels = [f"rank {rank} ({other})" for rank, other in enumerate(names)]
    for rank, other in enumerate(all_ranks):
        differ = [k for k, v in all_ranks[0]["settings"].items() if other["settings"].get(k) != v]
        if differ:
            raise DataError(f"ranks 0 and {rank} were started with different {', '.join(differ)}")
    if len(set(names)) < len(names):
        raise DataError(f"hospitals {', '.join(names)}: two have one name; give one a --name")


def check_cases(config: Config, hospitals: Sequence[Hospital], peers: Peers) -> None:
    """Raise DataError unless this rank has training cases, and all together label each organ."""
    name = hospitals[0].name
    if not hospitals[0].train:
        raise DataError(f"{name} has no training case")
    if name in [other.name for other in hospitals[1:]]:
        raise DataError(f"{name}: so is a --test folder called too; give another --name")
    labelled = itertools.compress(config.organs, hospitals[0].train[0].labelled[1:])
    organs = dict(peers.exchange("organs", [name, list(labelled)]))
    check_organs({k: set(v) for k, v in organs.items()}, config.organs, config.partial_labels)


def share_state(state: dict, model: nn.Module, peers: Peers) -> dict:
    """Rank 0's state of the training, at every rank; each keeps its own history."""
    weights, best = model.state_dict(), state["best"]
    told = {**state, "weights": None, "best": {**best, "weights": None}, "history": []}
    first = peers.exchange("state", told)[0]
    own = torch.cat([pack(w or weights) for w in (state["weights"], best["weights"])])
    last, top = (unpack(w, weights) for w in peers.add_up(own * (peers.rank == 0)).chunk(2))
    first |= {"weights": last, "best": {**first["best"], "weights": top}}
    return first | {"history": [r for r in state["history"] if r["round"] <= first["round"]]}


def share_scores(scores: list[dict], peers: Peers) -> list[dict]:
    """The test scores of all ranks; a case's id stays with its rank, which others number."""
    parts = peers.exchange("scores", [{**score, "case": None} for score in scores])
    parts[peers.rank] = scores
    numbered = [pair for part in parts for pair in enumerate(part)]
    return [score if score["case"] else {**score, "case": f"case {n}"} for n, score in numbered]


def refuse(message: str) -> NoReturn:
    """End a rank that was started with wrong flags, and let the others hear of it."""
    print(f"multisite.py (rank {os.environ['RANK']}): {message}", file=sys.stderr)
    Peers("", timeout=60).leave(DataError(message))
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see run_command for its exit codes."""
    parser = make_parser(__doc__, leave_out=SEVERAL)
    if distributed.is_torchelastic_launched():
        parser.error = refuse  # type: ignore[method-assign]
    add = parser.add_argument_group("federation").add_argument
    add("--arm", default="fedgin", choices=("fl", "fedgin"), help="without or with GIN")
    text = "share of the images that GIN transforms (default: 1, the paper's)"
    add("--gin-probability", type=float, default=1.0, metavar="X", help=text)
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
    if not distributed.is_torchelastic_launched():
        parser.error("must be started by torchrun; see docs/several-machines.md")
    name = args.name or os.path.basename(os.path.abspath(folders[0]))
    fixed = {"scenario": "complete", "arms": (args.arm,), "seeds": (args.seed,)}
    config = to_config(parser, args, **fixed, out=args.out or f"runs/{args.arm}-{name}")
    title = f"multisite.py (rank {os.environ['RANK']}, {name})"
    return run_command(title, lambda: run(config, name, args.timeout), lambda: how_to_go_on(config))


if __name__ == "__main__":
    sys.exit(record_bug(main)())  # for torchrun's summary
