"""What the processes under torchrun send one another: short messages, and sums of tensors.

    with join("north", timeout=1800) as peers:
        names = peers.exchange("north")  # what each rank says, by rank
        total = peers.add_up(torch.ones(3))

All ranks make the same calls in the same order. A rank that fails says why in place of its next
call, and there the others end with its reason.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from federated import RunningAverage, Weights
from scans.machine import is_out_of_memory


class Peers:
    """The ranks, one per hospital, seen from one of them.

    Everything passes through PyTorch's gloo and the CPU, so that machines with and without a GPU
    work together; messages are JSON. A call raises ConnectionError if another rank has failed, has
    closed its links, or lets this one wait for more than `timeout` seconds.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.label, self.timeout = f"rank {self.rank} ({name})", timedelta(seconds=timeout)
        self.in_step = False  # True between two calls

    def connect(self) -> None:
        """Link all ranks, unless one of them was given a network device that it does not have."""
        devices, problem = os.environ.get("GLOO_SOCKET_IFNAME", ""), ""
        try:
            for device in filter(None, devices.split(",")):
                distributed.ProcessGroupGloo.create_device(interface=device)
        except RuntimeError as error:
            problem = f"{self.label}: GLOO_SOCKET_IFNAME={devices}: {error}"
        with self._call():
            store, _, _ = next(distributed.rendezvous("env://", timeout=self.timeout))
            # After a restart the store still holds what was said before it.
            store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            store.set(str(self.rank), problem)
            try:
                problem = max(store.get(str(rank)).decode() for rank in range(self.size))
            except RuntimeError:  # the others may have ended with this rank's problem
                if not problem:
                    raise
            if problem:
                raise ConnectionError(problem)
            distributed.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.size, timeout=self.timeout
            )

    def exchange(self, message: Any, failure: str = "") -> list:
        """Send what JSON can hold, return all ranks' messages; failure: why this rank ends."""
        own = json.dumps([failure, message]).encode()
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        with self._call():
            distributed.all_reduce(sizes)
            texts = torch.zeros(self.size, int(sizes.max()), dtype=torch.uint8)
            texts[self.rank, : len(own)] = torch.tensor(list(own))
            distributed.all_reduce(texts)
            replies = [json.loads(bytes(text.tolist()).rstrip(b"\0")) for text in texts]
            for reason, _ in replies:
                if reason:
                    raise ConnectionError(reason)
        return [reply for _, reply in replies]

    def add_up(self, numbers: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks, in place."""
        self.exchange(None)  # a rank that failed says so here
        with self._call():
            distributed.all_reduce(numbers)
        return numbers

    def average(self, w_k: Weights, n_k: float) -> Weights:
        """Σ_k (n_k / Σ_j n_j) · w_k over all ranks, each of which gives its own (federated.py)."""
        average = RunningAverage()
        average.add(w_k, n_k)
        own = [pack(average.sums), torch.tensor([average.total], dtype=torch.float64)]
        total = self.add_up(torch.cat(own))
        average.sums, average.total = unpack(total[:-1], like=average.sums), total[-1].item()
        return average.result()

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Raise ConnectionError if gloo or the store reports a link that is closed or silent."""
        self.in_step = False
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            limit = f"--timeout {self.timeout.total_seconds():g}"
            what = f"another rank was stopped, is cut off or takes longer than {limit}"
            raise ConnectionError(f"{what} ({str(error).split('. ')[0]})") from error
        self.in_step = True


@contextlib.contextmanager
def join(name: str, timeout: float) -> Iterator[Peers]:
    """Be one of the ranks; if it ends early, tell the others why, and torchrun's summary."""
    peers = Peers(name, timeout)
    try:
        peers.connect()
        yield peers
        peers.exchange("end")
    except BaseException as error:
        reason = f"{peers.label}: {str(error) or 'was stopped'}"
        if type(error) is ConnectionError:  # another rank's reason
            reason, error.__notes__ = str(error), []  # without notes that blame this rank's round
        elif peers.in_step:
            print(f"{reason}; telling the other ranks", file=sys.stderr, flush=True)
            with contextlib.suppress(ConnectionError):
                peers.exchange(None, failure=reason)
        summary = {"message": {"message": reason, "extraInfo": {"timestamp": int(time.time())}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(summary))
        raise
    finally:
        if distributed.is_initialized():  # else gloo's threads may abort the exit: pytorch#179291
            distributed.destroy_process_group()
        if os.environ["GROUP_RANK"] == "0":
            time.sleep(1)  # torchrun's store ends with this rank, and others may still read it


def pack(weights: Weights) -> Tensor:
    """The tensors of a state dict as one vector, float64, on the CPU."""
    return torch.cat([w.detach().flatten().double().cpu() for w in weights.values()])


def unpack(vector: Tensor, like: Weights) -> dict[str, Tensor]:
    """A vector of pack's as a state dict again."""
    parts = vector.split([w.numel() for w in like.values()])
    return {k: p.view(w.shape).to(w) for (k, w), p in zip(like.items(), parts, strict=True)}
