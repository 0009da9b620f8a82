"""Federated averaging: hospitals train one model together, and only its weights travel.

FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1): every round each of K
hospitals starts from the global weights w, trains locally and returns its w_k, and

    w ← Σ_k (n_k / Σ_j n_j) · w_k,   n_k the number of training cases at hospital k.

Any model and any data will do; this file needs torch alone. With 8 cases at one hospital, 40 at
another and a model that learns to double a number:

    import torch, federated
    model, x = torch.nn.Linear(1, 1), {"north": torch.rand(8, 1), "south": torch.rand(40, 1)}
    batches = {name: [(x[name], 2 * x[name])] * 20 for name in x}  # (inputs, targets)
    train = lambda k, _: federated.train_locally(model, batches[k], torch.nn.MSELoss(), lr=0.1)
    print(*federated.federated_rounds(model, {"north": 8, "south": 40}, train, rounds=5))

The hospitals share this process, or lie on machines of their own: then `Ranks` adds up what the
processes that torchrun started have each summed over their own hospitals.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

State = Mapping[str, Tensor]
Train = Callable[[str, int], float]  # (hospital, round) → mean loss


def weighted_average(
    pairs: Iterable[tuple[State, float]],
    like: State | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Average state dicts by their n_k: Σ_k (n_k / Σ_j n_j) · w_k, FedAvg's server step.

    `pairs` yields (state dict, n_k) and is read once; only a running sum is kept, so it may train
    each client just before it yields the client's state, all of them in one model. Sums are float64
    (complex128 for complex tensors); results have the clients' dtypes and devices and share no
    memory with them. Integer and boolean entries are averaged like all others and then rounded.

    Over several processes each passes its own pairs, maybe none, and `add_up`, which adds a vector
    up over all of them; each gets the average of all pairs. `like` is any state dict of the model.

    Raises ValueError for no pairs, n_k that are not positive and finite, keys or shapes that differ
    from the first state's, and weights that are NaN or infinite; it counts the states from 0.
    """
    total, sums, dtypes = 0.0, *_zeros(like or {})
    for index, (state, n_k) in enumerate(pairs):
        if not (n_k > 0 and math.isfinite(n_k)):
            raise ValueError(f"state {index}: n_k must be positive and finite, not {n_k}")
        if not sums:
            sums, dtypes = _zeros(state)
        _check_state(state, sums, index)
        total += n_k
        for key, w in state.items():
            sums[key].add_(w.detach().to(sums[key]), alpha=n_k)  # on the first state's device
    if add_up:
        total = _add_up(total, sums, add_up)
    if not (sums and total):
        raise ValueError("nothing to average: there are no states, or they are empty")
    return {key: _cast(s.div_(total), dtypes[key]) for key, s in sums.items()}


def federated_rounds(
    model: nn.Module,
    n_cases: Mapping[str, float],
    train: Train,
    rounds: int,
    start: int = 0,
    average: Callable[[Iterable[tuple[State, float]]], State] = weighted_average,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run FedAvg on `model`, yielding (round, loss by hospital) while it holds the new weights.

    n_cases: hospital → n_k, in the order of training; rounds count from 1. train(hospital, round)
    trains `model` in place on that hospital's cases and returns its mean loss. A hospital keeps
    nothing from round to round, so a model that went through `start` rounds before goes on as if
    it had never stopped. Over several processes each runs this with its own hospitals and an
    `average` over all. Raises RuntimeError, with round and hospital, when a loss or a weight is not
    finite and when train fails.
    """
    for round_ in range(start + 1, rounds + 1):
        losses: dict[str, float] = {}
        try:
            updates = _updates(model, n_cases, train, round_, losses)
            model.load_state_dict(average(updates))  # w ← Σ_k (n_k / Σ_j n_j) · w_k
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            hospital = next(reversed(losses), "none")
            raise RuntimeError(f"round {round_}, hospital {hospital}: {error}") from error
        yield round_, losses


def _updates(
    model: nn.Module,
    n_cases: Mapping[str, float],
    train: Train,
    round_: int,
    losses: dict[str, float],
) -> Iterator[tuple[State, float]]:
    """Broadcast to each hospital and train there, the one model standing in for all of theirs."""
    global_weights = {key: w.clone() for key, w in model.state_dict().items()}
    for hospital, n_k in n_cases.items():
        losses[hospital] = math.nan  # the hospital at work, should it fail
        model.load_state_dict(global_weights)
        losses[hospital] = train(hospital, round_)
        if not math.isfinite(losses[hospital]):
            raise ValueError(f"the loss is {losses[hospital]}; a lower learning rate may help")
        yield model.state_dict(), n_k


def train_locally(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    loss_function: Callable[[Tensor, Any], Tensor],
    *,
    lr: float,
    weight_decay: float = 1e-4,
    max_norm: float = 1.0,
    autocast: torch.dtype | None = None,
) -> float:
    """Train `model` for one optimizer step per (inputs, targets) batch; return the mean loss.

    The optimizer is a fresh AdamW, gradients are clipped to max_norm. Batches lie on the model's
    device already; targets may be anything that loss_function(float32 logits, targets) takes.
    `autocast` is the dtype for mixed precision, None for none. Raises ValueError without a batch.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    losses = []
    model.train()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(inputs)
        loss = loss_function(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.detach())  # .item() here would make the accelerator wait at each step
    if not losses:
        raise ValueError("train_locally got no batch")
    return torch.stack(losses).mean().item()


def _zeros(state: State) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """Sums of float64 for the tensors of a state dict, and the dtypes that those have."""
    sums = {
        key: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float64))
        for key, w in state.items()
    }
    return sums, {key: w.dtype for key, w in state.items()}


def _add_up(total: float, sums: dict[str, Tensor], add_up: Callable[[Tensor], Tensor]) -> float:
    """Add Σ n_k and Σ n_k · w_k up over all processes, as one vector; return the first."""
    flat = [torch.tensor([total], dtype=torch.float64), *(s.flatten().cpu() for s in sums.values())]
    parts = add_up(torch.cat(flat)).split([len(part) for part in flat])
    for s, part in zip(sums.values(), parts[1:], strict=True):
        s.copy_(part.view_as(s))
    return parts[0].item()


def _check_state(state: State, sums: State, index: int) -> None:
    """Raise ValueError unless `state` can be added to `sums`."""
    if state.keys() != sums.keys():
        odd = sorted(state.keys() ^ sums.keys())
        raise ValueError(f"state {index}: keys differ from state 0's: {', '.join(odd)}")
    for key, w in state.items():
        if w.shape != sums[key].shape:
            shapes = f"{tuple(w.shape)}, not {tuple(sums[key].shape)}"
            raise ValueError(f"state {index}: {key} has shape {shapes} as in state 0")
        if not torch.isfinite(w).all():
            raise ValueError(f"state {index}: {key} has weights that are NaN or infinite")


def _cast(mean: Tensor, dtype: torch.dtype) -> Tensor:
    return mean.to(dtype) if dtype.is_floating_point or dtype.is_complex else mean.round().to(dtype)


# ------------------------------------------------------------------------------- several processes

STOPPED = "was stopped"
LETTER = 1000  # bytes


class RankError(Exception):
    """Another rank is in trouble, or gone. No RuntimeError, as no work of this rank failed."""


class Ranks:
    """The processes that work on a run: those that torchrun started, or this one alone.

    Rank r of W works for the hospitals r, r + W, … of `hospitals`, which are names. Sums of tensors
    and JSON pass between ranks, by PyTorch's gloo and through the CPU, so that they may share a GPU
    or have none. A rank that fails inside `with Ranks(…) as ranks:` tells the others why, and one
    that keeps the others waiting for `timeout` seconds ends the run.
    """

    def __init__(self, hospitals: Sequence[str], timeout: float) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.hospitals, self.timeout = hospitals, timeout
        if self.size > 1:
            self._find_one_another(timedelta(seconds=timeout))

    def ours(self, rank: int | None = None) -> Sequence[str]:
        """The hospitals that this rank, or another one, works for."""
        return self.hospitals[self.rank if rank is None else rank :: self.size]

    def add_up(self, numbers: Tensor) -> Tensor:
        """Add a CPU tensor up over all ranks, in place; RankError if another rank fails."""
        if self.size > 1:
            self._meet()
            try:
                distributed.all_reduce(numbers)
            except RuntimeError as error:
                raise RankError(f"the link to the other ranks broke: {error}") from error
        return numbers

    def gather(self, value: Any) -> list:
        """What each rank passes, by rank: anything that JSON can hold."""
        letters = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(letters)
        places = self.add_up(lengths).tolist()
        paper = torch.zeros(sum(places), dtype=torch.uint8)
        paper.split(places)[self.rank].copy_(letters)  # each rank writes in a place of its own
        return [json.loads(bytes(text.tolist())) for text in self.add_up(paper).split(places)]

    def average(self, pairs: Iterable[tuple[State, float]], like: State) -> State:
        """weighted_average over the pairs of all ranks; like: any state dict of the model."""
        return weighted_average(pairs, like, self.add_up if self.size > 1 else None)

    def first(self, state: State) -> State:
        """Rank 0's state dict, at every rank; state: that of this rank's model."""
        return self.average([(state, 1)] if self.rank == 0 else [], like=state)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.size > 1:
            if error is not None and not isinstance(error, RankError):
                self._meet(str(error) or STOPPED)
            distributed.destroy_process_group()

    def _find_one_another(self, patience: timedelta) -> None:
        # After a restart torchrun's store still holds the addresses of dead ranks: hence a prefix.
        prefix = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        try:
            store, rank, size = next(distributed.rendezvous("env://", timeout=patience))
            store = distributed.PrefixStore(prefix, store)
            settings = {"store": store, "rank": rank, "world_size": size, "timeout": patience}
            distributed.init_process_group("gloo", **settings)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"the ranks have not found one another: {error}") from error

    def _meet(self, trouble: str = "") -> None:
        """Wait for all ranks and hear how they are; RankError if another one is in trouble.

        Every sum begins with it, so that a rank in trouble finds the others listening. Rank 0 asks
        them one by one and tells all what it heard. It waits half as long as they wait for it, so
        that it can still tell them who is silent.
        """
        news, began = trouble and self._name(self.rank) + trouble, time.monotonic()
        if self.rank > 0:
            self._send(0, news)
            verdict = self._receive(0, self.timeout, began)
        else:
            others = range(1, self.size)
            heard = [news, *(self._receive(rank, self.timeout / 2) for rank in others)]
            verdict = min(filter(None, heard), key=lambda text: text.endswith(STOPPED), default="")
            for rank in others:
                self._send(rank, verdict)
        own = trouble and (trouble != STOPPED or verdict.endswith(STOPPED))
        if verdict and not own:
            raise RankError(verdict)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({', '.join(self.ours(rank))}): "

    def _send(self, rank: int, text: str) -> None:
        letter = torch.zeros(LETTER, dtype=torch.uint8)
        content = text.encode()[:LETTER]
        letter[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # whoever is gone is missed when it has to answer
            work = distributed.isend(letter, rank)
            work.wait(timedelta(seconds=self.timeout))  # type: ignore[union-attr]

    def _receive(self, rank: int, seconds: float, began: float | None = None) -> str:
        """The trouble that another rank writes of, if any, or that it does not write."""
        letter, began = torch.zeros(LETTER, dtype=torch.uint8), began or time.monotonic()
        try:
            work = distributed.irecv(letter, rank)
            work.wait(timedelta(seconds=seconds))  # type: ignore[union-attr]
        except RuntimeError:
            if time.monotonic() - began < 0.9 * seconds:
                return self._name(rank) + "is gone: it died or was killed"
            return f"{self._name(rank)}no answer for {seconds:g} s: it hangs, or the network is cut"
        return bytes(letter.tolist()).rstrip(b"\0").decode(errors="replace")
