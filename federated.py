"""Federated averaging: hospitals train one model together, and only its weights travel.

FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629, algorithm 1): every round each of K
hospitals starts from the global weights w, trains locally and returns its w_k, and

    w ← Σ_k (n_k / Σ_j n_j) · w_k,   n_k the number of training cases at hospital k.

One process simulates all hospitals, in turn. Any model and any data will do; it needs only torch.
With 8 cases at one hospital, 40 at another and a model that learns to double a number:

    import torch
    from federated import Client, federated_rounds
    north, south = torch.rand(8, 1), torch.rand(40, 1)
    model, loss = torch.nn.Linear(1, 1), torch.nn.MSELoss()
    clients = {"north": Client(8, lambda round_: [(north, 2 * north)], loss),
               "south": Client(40, lambda round_: [(south, 2 * south)], loss)}
    for round_, losses in federated_rounds(model, clients, rounds=50, lr=lambda round_: 0.1):
        print(round_, losses)
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]  # a state dict


class Client(NamedTuple):
    """A hospital in this simulation: how much its weights count, and what it trains on."""

    n_k: float  # number of training cases
    batches: Callable[[int], Iterable[tuple[Tensor, Any]]]  # round → its (inputs, targets)
    loss_function: Callable[[Tensor, Any], Tensor]  # (float32 logits, targets) → scalar


class RunningAverage:
    """Σ_k (n_k / Σ_j n_j) · w_k over the (w_k, n_k) added so far, without keeping any.

    Sums are float64 (complex128 for complex tensors), on the devices of the first weights.
    """

    def __init__(self) -> None:
        self.total = 0.0  # Σ_j n_j
        self.sums: dict[str, Tensor] = {}  # Σ_k n_k · w_k
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, w_k: Weights, n_k: float) -> None:
        """Add the weights w_k of a hospital, weighted by its n_k.

        Raises ValueError for an n_k that is not positive and finite and for keys or shapes that
        differ from those before, FloatingPointError for weights that are NaN or infinite.
        """
        if not (n_k > 0 and math.isfinite(n_k)):
            raise ValueError(f"n_k must be positive and finite, not {n_k}")
        if not self.sums:
            for key, w in w_k.items():
                wide = torch.promote_types(w.dtype, torch.float64)
                self.sums[key], self.dtypes[key] = torch.zeros_like(w, dtype=wide), w.dtype
        self._check(w_k)
        self.total += n_k
        for key, w in w_k.items():
            self.sums[key].add_(w.detach().to(self.sums[key]), alpha=n_k)

    def result(self) -> dict[str, Tensor]:
        """The average, in the dtypes of the weights; that of integers and booleans is rounded.

        Raises ValueError if nothing has been added.
        """
        if not self.sums:
            raise ValueError("nothing to average: no weights were added, or they are empty")
        average = {}
        for key, weighted_sum in self.sums.items():
            dtype, mean = self.dtypes[key], weighted_sum / self.total
            inexact = dtype.is_floating_point or dtype.is_complex
            average[key] = mean.to(dtype) if inexact else mean.round().to(dtype)
        return average

    def _check(self, w_k: Weights) -> None:
        if w_k.keys() != self.sums.keys():
            odd = ", ".join(sorted(w_k.keys() ^ self.sums.keys()))
            raise ValueError(f"weights have other keys than those before: {odd}")
        for key, w in w_k.items():
            expected = self.sums[key].shape
            if w.shape != expected:
                raise ValueError(f"{key} has shape {tuple(w.shape)}, not {tuple(expected)}")
            if not torch.isfinite(w).all():
                raise FloatingPointError(f"{key} has weights that are NaN or infinite")


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
    """Take one training step per (inputs, targets) batch; return the mean loss.

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


def federated_rounds(
    model: nn.Module,
    clients: Mapping[str, Client],
    rounds: int,
    lr: Callable[[int], float],
    start: int = 0,
    train: Callable[..., float] = train_locally,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Run FedAvg; yield (round, {hospital: mean training loss}), `model` then holding the average.

    Rounds count from 1, lr(round) is the learning rate, and hospitals train in the order of
    `clients`, by `train`. A hospital keeps nothing from round to round; to resume, give the model
    as it was after round `start`. Raises FloatingPointError for a loss or weight that is not finite
    and ValueError without clients; a note on any error says in which round and at which hospital.
    """
    for round_ in range(start + 1, rounds + 1):
        w = {key: value.clone() for key, value in model.state_dict().items()}
        average, losses = RunningAverage(), {}
        for hospital, client in clients.items():
            with noting(f"round {round_}, hospital {hospital}"):
                model.load_state_dict(w)  # broadcast w
                losses[hospital] = train_client(model, client, round_, lr(round_), train)
                average.add(model.state_dict(), client.n_k)  # w_k, n_k
        model.load_state_dict(average.result())  # w ← Σ_k (n_k / Σ_j n_j) · w_k
        yield round_, losses


def train_client(
    model: nn.Module,
    client: Client,
    round_: int,
    lr: float,
    train: Callable[..., float] = train_locally,
) -> float:
    """One hospital's part of a round, w → w_k (several machines call it too); return the loss.

    Raises FloatingPointError for a loss that is not finite.
    """
    loss = train(model, client.batches(round_), client.loss_function, lr=lr)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; a lower learning rate may help")
    return loss


@contextlib.contextmanager
def noting(place: str) -> Iterator[None]:
    """Add a note that says where it was to any error inside."""
    try:
        yield
    except Exception as error:
        error.add_note(place)
        raise
