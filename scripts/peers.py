"""What the processes that torchrun started say to one another: short messages, and sums of tensors.

    with join("north", timeout=1800) as peers:
        names = peers.exchange("name", "north")  # what each says, by rank
        total = peers.add_up(torch.ones(3))

A rank that fails leaves its reason for the others, which end with it.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from federated import RunningAverage, Weights


class Peers:
    """The ranks, one a hospital, seen from one of them.

    Short messages (JSON) pass through torchrun's store, sums through PyTorch's gloo and the CPU, so
    that machines with and without a GPU work together. Raises ConnectionError once another rank has
    failed, has closed its links, or has let this one wait for `timeout` seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timedelta(seconds=timeout)
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with linked():
            store, _, _ = next(distributed.rendezvous("env://", timeout=self.timeout))
            # After a restart the store still holds what was said before it.
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            self.store = distributed.PrefixStore(attempt, store)

    def exchange(self, key: str, value: Any) -> list:
        """What each rank says under a key, by rank: anything that JSON can hold."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        with linked():
            self.store.set(keys[self.rank], json.dumps(value))
            self._wait(lambda: self.store.check(keys))
            return [json.loads(self.store.get(each)) for each in keys]

    def connect(self) -> None:
        """Open the links for sums, once every rank has its data."""
        device = os.environ.get("GLOO_SOCKET_IFNAME")
        with linked():
            if device:  # is it there?
                distributed.ProcessGroupGloo.create_device(interface=device)
            self.exchange("device", None)
            distributed.init_process_group(
                "gloo",
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def add_up(self, numbers: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks, in place."""
        with linked():
            work = distributed.all_reduce(numbers, async_op=True)
            self._wait(work.is_completed)
            try:
                work.wait()
            except RuntimeError:  # a rank that failed has closed its links, and left its reason
                self._check()
                raise
        return numbers

    def average(self, w_k: Weights, n_k: float) -> Weights:
        """Σ_k (n_k / Σ_j n_j) · w_k over all ranks, of which each gives its own; see federated."""
        average = RunningAverage()
        average.add(w_k, n_k)
        own = [pack(average.sums), torch.tensor([average.total], dtype=torch.float64)]
        total = self.add_up(torch.cat(own))
        average.sums, average.total = unpack(total[:-1], like=average.sums), total[-1].item()
        return average.result()

    def fail(self, error: BaseException) -> None:
        """Tell the others, and torchrun's summary, why this rank ends."""
        reason = f"rank {self.rank} ({self.name}): {str(error) or 'was stopped'}"
        if isinstance(error, ConnectionError):
            reason = str(error)  # another rank's, as a rule
            error.__notes__ = []  # which blame this rank's round
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failed", "", reason)
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            message = {"message": reason, "extraInfo": {"timestamp": int(time.time())}}
            Path(path).write_text(json.dumps({"message": message}))  # as torch's ErrorHandler does
        time.sleep(1)  # until the others have heard it: the store ends with rank 0's torchrun

    def _wait(self, done: Callable[[], bool]) -> None:
        """Wait until done() or until another rank has failed."""
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            self._check()
            if waited > self.timeout.total_seconds():
                limit = f"--timeout {self.timeout.total_seconds():g}"
                raise ConnectionError(f"another rank is cut off or takes longer than {limit}")
            time.sleep(min(0.001 + waited / 10, 0.2))

    def _check(self) -> None:
        if self.store.check(["failed"]):
            raise ConnectionError(self.store.get("failed").decode())


@contextlib.contextmanager
def linked() -> Iterator[None]:
    """Raise what PyTorch says of a closed or silent link as a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"another rank is gone: {error}") from error


@contextlib.contextmanager
def join(name: str, timeout: float) -> Iterator[Peers]:
    """Be one of the ranks; what ends it early is told to the others and to torchrun."""
    peers = Peers(name, timeout)
    try:
        yield peers
        peers.exchange("end", None)
    except BaseException as error:
        peers.fail(error)
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
