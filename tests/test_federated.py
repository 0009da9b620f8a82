"""FedAvg against numbers worked by hand, centralized training, and the pooled gradient."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from federated import federated_rounds, train_locally, weighted_average


def test_unequal_n_k_by_hand():
    pairs = [
        ({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(10.0)}, 1),
        ({"w": torch.tensor([5.0, 0.0]), "b": torch.tensor(2.0)}, 3),
    ]
    mean = weighted_average(pairs)
    assert mean["w"].tolist() == [4.0, 0.5]  # (1·1 + 3·5) / 4, (1·2 + 3·0) / 4
    assert mean["b"].item() == 4.0  # (1·10 + 3·2) / 4
    thirds = weighted_average(
        [({"w": torch.tensor(v)}, n) for v, n in ((3.0, 2), (6.0, 4), (0.0, 3))]
    )
    assert thirds["w"].item() == pytest.approx(30 / 9)


def test_dtypes_are_kept_and_integers_rounded():
    def state(value):
        return {
            "half": torch.tensor(value, dtype=torch.float16),
            "double": torch.tensor(value, dtype=torch.float64),
            "count": torch.tensor(int(value)),
            "flag": torch.tensor(value > 1),
            "complex": torch.tensor(value * 1j),
        }

    mean = weighted_average([(state(1.0), 1), (state(4.0), 3)])
    assert {k: v.dtype for k, v in mean.items()} == {k: v.dtype for k, v in state(1.0).items()}
    assert mean["half"] == mean["double"] == 3.25
    assert mean["count"] == 3
    assert mean["flag"]
    assert mean["complex"] == 3.25j


def test_accumulates_in_float64():
    """2^24 + 1 is no float32, so a float32 sum of these loses the small ones."""
    pairs = [({"w": torch.tensor([2.0**24])}, 1)] + [({"w": torch.tensor([1.0])}, 1)] * 15
    assert weighted_average(pairs)["w"].item() == torch.tensor((2.0**24 + 15) / 16).item()
    many = weighted_average([({"w": torch.tensor([0.1])}, 0.7)] * 10000)["w"]
    assert many.item() == torch.tensor(0.1).item()


def test_reads_once_keeps_one_state_and_leaves_it_untouched():
    state = {"w": torch.zeros(3)}

    def clients():
        for value in (1.0, 2.0, 6.0):
            state["w"].fill_(value)  # the same tensor each time, as in the round loop
            yield state, 1

    mean = weighted_average(clients())
    assert mean["w"].tolist() == [3.0] * 3
    assert state["w"].tolist() == [6.0] * 3
    mean["w"].fill_(0)
    assert state["w"].tolist() == [6.0] * 3


@pytest.mark.parametrize("n_k", [0, -1, math.nan, math.inf])
def test_bad_n_k_is_refused(n_k):
    with pytest.raises(ValueError, match="state 1: n_k"):
        weighted_average([({"w": torch.ones(1)}, 1), ({"w": torch.ones(1)}, n_k)])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, "state 1: keys differ .* w"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, "state 1: keys differ .* v"),
        ({"w": torch.ones(3)}, r"state 1: w has shape \(3,\), not \(2,\)"),
        ({"w": torch.tensor([1.0, math.nan])}, "state 1: w .* NaN or infinite"),
        ({"w": torch.tensor([1.0, -math.inf])}, "state 1: w .* NaN or infinite"),
    ],
)
def test_states_that_do_not_fit_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        weighted_average([({"w": torch.ones(2)}, 1), (second, 1)])


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        weighted_average([])


# ------------------------------------------------------------------------------- the round loop


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def some_batches(n, seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator))
        for _ in range(n)
    ]


def test_one_client_is_centralized_training_exactly():
    federated, central = small_model(), small_model()
    batches = {round_: some_batches(4, seed=round_) for round_ in (1, 2, 3)}
    for _ in federated_rounds(
        federated,
        {"only": 7},
        lambda _, r: train_locally(federated, batches[r], F.mse_loss, lr=0.01),
        3,
    ):
        pass
    for round_ in (1, 2, 3):
        train_locally(central, batches[round_], F.mse_loss, lr=0.01)
    for ours, theirs in zip(federated.parameters(), central.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_two_hospitals_with_one_sgd_step_equal_the_pooled_gradient():
    """w − lr Σ_k (n_k / n) ∇L_k: one full batch each, weighted by unequal n_k."""
    federated, pooled = small_model().double(), small_model().double()
    batches = {"a": some_batches(1, 1, size=5)[0], "b": some_batches(1, 2, size=15)[0]}
    batches = {name: (x.double(), y.double()) for name, (x, y) in batches.items()}

    def train(name, round_):
        x, y = batches[name]
        loss = F.mse_loss(federated(x), y)
        federated.zero_grad()
        loss.backward()
        torch.optim.SGD(federated.parameters(), lr=0.1).step()
        return loss.item()

    ((_, losses),) = federated_rounds(federated, {"a": 5, "b": 15}, train, rounds=1)
    x, y = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))
    loss = F.mse_loss(pooled(x), y)
    loss.backward()
    torch.optim.SGD(pooled.parameters(), lr=0.1).step()
    for ours, theirs in zip(federated.parameters(), pooled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert (5 * losses["a"] + 15 * losses["b"]) / 20 == pytest.approx(loss.item())


def test_each_hospital_starts_from_the_global_weights_in_order():
    model, seen = nn.Linear(1, 1, bias=False), []
    nn.init.constant_(model.weight, 1.0)

    def train(name, round_):
        seen.append((round_, name, model.weight.item()))
        with torch.no_grad():
            model.weight += {"a": 1.0, "b": 4.0}[name]
        return 0.5

    rounds = list(federated_rounds(model, {"a": 2, "b": 1}, train, rounds=2))
    assert rounds == [(1, {"a": 0.5, "b": 0.5}), (2, {"a": 0.5, "b": 0.5})]
    # (2 · 2 + 1 · 5) / 3 = 3 after the first round, (2 · 4 + 1 · 7) / 3 = 5 after the second
    assert seen == [(1, "a", 1.0), (1, "b", 1.0), (2, "a", 3.0), (2, "b", 3.0)]
    assert model.weight.item() == 5.0


def test_a_failure_names_round_and_hospital():
    model = nn.Linear(1, 1)

    def poison(name, round_):
        if (name, round_) == ("south", 2):
            nn.init.constant_(model.weight, math.nan)
        return 0.1

    with pytest.raises(
        RuntimeError, match="round 2, hospital south: .*weight has weights that are NaN"
    ):
        list(federated_rounds(model, {"north": 1, "south": 1, "west": 1}, poison, 3))
    with pytest.raises(RuntimeError, match="round 1, hospital north: the loss is nan"):
        list(federated_rounds(nn.Linear(1, 1), {"north": 1}, lambda *_: math.nan, 3))
    with pytest.raises(RuntimeError, match="round 1, hospital north: state 0: n_k"):
        list(federated_rounds(nn.Linear(1, 1), {"north": 0}, lambda *_: 0.1, 3))


# ------------------------------------------------------------------------------- local training


def test_local_training_is_adamw_with_clipping():
    """One step by hand: a fresh AdamW's first step is lr · sign(gradient), after weight decay."""
    model = small_model()
    x, y = some_batches(1, 3)[0]
    reference = copy.deepcopy(model)
    loss = F.mse_loss(reference(x), 100 * y)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
    assert norm > 1
    returned = train_locally(model, [(x, 100 * y)], F.mse_loss, lr=0.01, weight_decay=0.1)
    assert returned == pytest.approx(loss.item())
    for ours, start in zip(model.parameters(), reference.parameters(), strict=True):
        gradient = start.grad / (norm + 1e-6)
        expected = start * (1 - 0.01 * 0.1) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours, expected)


def test_local_training_learns():
    model, batches = small_model(), some_batches(1, 5) * 300
    first = train_locally(model, batches[:1], F.mse_loss, lr=0.01)
    train_locally(model, batches, F.mse_loss, lr=0.01)
    assert train_locally(model, batches[:1], F.mse_loss, lr=0.01) < 0.1 * first


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        train_locally(small_model(), [], F.mse_loss, lr=0.01)


def test_mixed_precision_gives_the_loss_float32_logits():
    dtypes = []

    def loss(logits, targets):
        dtypes.append(logits.dtype)
        return F.mse_loss(logits, targets)

    train_locally(small_model(), some_batches(1, 0), loss, lr=0.01, autocast=torch.bfloat16)
    assert dtypes == [torch.float32]
