"""What the processes that torchrun started say to one another: short messages, and sums of tensors.

    with join("north", timeout=1800) as peers:
        names = peers.exchange("name", "north")  # what each says, by rank
        total = peers.add_up(torch.ones(3))

Who fails or is stopped tells the others why before it ends; who says nothing is named.
"""

import contextlib
import itertools
import json
import multiprocessing.pool
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm import tqdm

from federated import RunningAverage, Weights


class PeerError(ConnectionError):
    """Another rank has failed, or cannot be reached."""


class Peers:
    """The ranks, one a hospital, seen from one of them.

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
        device, timeout = os.environ.get("GLOO_SOCKET_IFNAME"), timedelta(seconds=self.timeout)
        try:
            if device:
                distributed.ProcessGroupGloo.create_device(interface=device)  # is it there?
            self.exchange("device", None)
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

    def average(self, w_k: Weights, n_k: float) -> Weights:
        """Σ_k (n_k / Σ_j n_j) · w_k over all ranks, of which each gives its own; see federated."""
        average = RunningAverage()
        average.add(w_k, n_k)
        own = [pack(average.sums), torch.tensor([average.total], dtype=torch.float64)]
        total = self.add_up(torch.cat(own))
        average.sums, average.total = unpack(total[:-1], like=average.sums), total[-1].item()
        return average.result()

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
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            about = {"message": reason, "extraInfo": {"timestamp": int(time.time())}}
            Path(path).write_text(json.dumps({"message": about}))  # as torch's ErrorHandler does

    def _wait(self, key: str, done: Callable[[], bool], note: str = "") -> None:
        """Wait until done(), and say for whom: the ranks that have not set the key."""
        began, tell_at = time.monotonic(), 1
        while not done():
            waited = time.monotonic() - began
            if waited > self.timeout or (key != "left" and self._ask("check", ["failed"])):
                raise self._in_vain(key)
            silent = self._silent(key) if waited > tell_at else []
            if silent:
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


def pack(weights: Weights) -> Tensor:
    """The tensors of a state dict as one vector, float64, on the CPU."""
    return torch.cat([w.detach().flatten().double().cpu() for w in weights.values()])


def unpack(vector: Tensor, like: Weights) -> dict[str, Tensor]:
    """A vector of pack's as a state dict again."""
    parts = vector.split([w.numel() for w in like.values()])
    return {k: p.view(w.shape).to(w) for (k, w), p in zip(like.items(), parts, strict=True)}
