"""FedAvg against numbers worked by hand, exact sums, centralized training, the pooled gradient."""

import math
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from federated import Client, RunningAverage, federated_rounds, train_locally

NAN, INF = math.nan, math.inf


def weighted_average(pairs):
    """The average of (weights, n_k)."""
    average = RunningAverage()
    for w_k, n_k in pairs:
        average.add(w_k, n_k)
    return average.result()


def test_unequal_n_k_by_hand():
    """After each hospital, because more can be added after a result."""
    average, found = RunningAverage(), []
    for n_k, w, b in ((1, [1.0, 2.0], 10), (3, [5.0, 0.0], 2), (4, [0.0, 3.5], 5)):
        average.add({"w": torch.tensor(w), "b": torch.tensor(b)}, n_k)
        found.append({key: w.tolist() for key, w in average.result().items()})
    assert found == [
        {"w": [1.0, 2.0], "b": 10},
        {"w": [4.0, 0.5], "b": 4},  # (1·1 + 3·5) / 4, (1·2 + 3·0) / 4, (1·10 + 3·2) / 4
        {"w": [2.0, 2.0], "b": 4},  # 16 / 8, 16 / 8, 36 / 8 = 4.5, which is rounded to even
    ]


@pytest.mark.parametrize(
    ("of_one", "of_three", "mean"),
    [
        (torch.tensor(1.0).half(), torch.tensor(4.0).half(), 3.25),
        (torch.tensor(1.0).double(), torch.tensor(4.0).double(), 3.25),
        (torch.tensor(1j), torch.tensor(4j), 3.25j),
        (torch.tensor(1), torch.tensor(4), 3),
        (torch.tensor(0), torch.tensor(1), 1),  # of 0.75
        (torch.tensor(False), torch.tensor(True), True),
        (torch.tensor(True), torch.tensor(False), False),  # 0.25
    ],
)
def test_dtypes_are_kept_and_integers_rounded(of_one, of_three, mean):
    found = weighted_average([({"w": of_one}, 1), ({"w": of_three}, 3)])["w"]
    assert found.dtype == of_one.dtype
    assert found == mean


def test_accumulates_in_float64():
    """2^24 + 1 is not a float32, so a float32 sum of these loses the small ones."""
    pairs = [({"w": torch.tensor([2.0**24])}, 1)] + [({"w": torch.tensor([1.0])}, 1)] * 15
    assert weighted_average(pairs)["w"].item() == torch.tensor((2.0**24 + 15) / 16).item()


def test_keeps_no_state_and_leaves_it_untouched():
    """There are as many sums after the third state as after one."""
    average, states = RunningAverage(), []
    for value in (1.0, 2.0, 6.0):
        state = {"w": nn.Parameter(torch.full((3,), value))}  # as it is, with its gradient
        average.add(state, 1)
        assert state["w"].tolist() == [value] * 3
        assert [(w.shape, w.dtype) for w in average.sums.values()] == [((3,), torch.float64)]
        states.append(weakref.ref(state["w"]))
        state["w"].data.fill_(99)
        del state
    assert [state() for state in states] == [None] * 3
    assert not average.result()["w"].requires_grad
    average.result()["w"].fill_(0)
    assert average.result()["w"].tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("second", "n_k", "error", "message"),
    [
        *((torch.ones(2), n, ValueError, f"^n_k must be .* not {n}$") for n in (0, -1, NAN, INF)),
        (None, 1, ValueError, "^weights have other keys than those before: a, b, c, w$"),
        (torch.ones(3), 1, ValueError, r"^w has shape \(3,\), not \(2,\)$"),
        (torch.tensor([1.0, NAN]), 1, FloatingPointError, "^w has weights that are NaN"),
        (torch.tensor([1.0, -INF]), 1, FloatingPointError, "^w has .* NaN or infinite$"),
    ],
)
def test_what_does_not_fit_is_refused(second, n_k, error, message):
    state = dict.fromkeys("bca", torch.ones(2)) if second is None else {"w": second}
    average = RunningAverage()
    average.add({"w": torch.ones(2)}, 1)
    with pytest.raises(error, match=message):
        average.add(state, n_k)
    assert average.result()["w"].tolist() == [1, 1]  # as if nothing had been added


@pytest.mark.parametrize("pairs", [[], [({}, 1)]])
def test_nothing_to_average_is_refused(pairs):
    with pytest.raises(ValueError, match="nothing to average"):
        weighted_average(pairs)


finite = st.floats(-1e6, 1e6, width=32)
n_k = st.integers(1, 10**6)
clients = st.lists(st.tuples(st.tuples(finite, finite, finite), n_k), min_size=1, max_size=20)


def state(a, b, c):
    """A float32 matrix, a float64 scalar, a half and an integer."""
    return {
        "matrix": torch.tensor([[a, b]], dtype=torch.float32),
        "scale": torch.tensor(c, dtype=torch.float64),
        "half": torch.tensor([c / 100], dtype=torch.float16),
        "count": torch.tensor(int(a), dtype=torch.int64),
    }


@given(st.tuples(finite, finite, finite), st.lists(n_k, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_identical_states_come_back_exactly(values, sizes):
    w = state(*values)
    mean = weighted_average((w, n) for n in sizes)
    torch.testing.assert_close(mean.pop("scale"), w.pop("scale"), rtol=1e-14, atol=0)
    assert all(torch.equal(mean[key], w[key]) for key in w)


@given(clients)
@settings(max_examples=50, deadline=None)
def test_it_is_the_exact_mean_rounded_once(pairs):
    """Against exact sums (math.fsum) of each number, within one rounding of its dtype."""
    mean = weighted_average((state(*values), n) for values, n in pairs)
    total = sum(n for _, n in pairs)
    exact = [math.fsum(v[i] * n for v, n in pairs) / total for i in range(3)]
    scale = max(abs(x) for v, _ in pairs for x in v) + 1e-30
    for value, expected in zip(mean["matrix"][0].tolist(), exact[:2], strict=True):
        assert abs(value - expected) <= 2**-24 * abs(expected) + 1e-12 * scale
    assert abs(mean["scale"].item() - exact[2]) <= 1e-12 * scale
    low, high = min(int(v[0]) for v, _ in pairs), max(int(v[0]) for v, _ in pairs)
    assert low <= mean["count"].item() <= high


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


def client(n_k, name):
    """A client whose batches are its name and the round, for a `train` that makes use of those."""
    return Client(n_k, lambda round_: (name, round_), F.mse_loss)


def scalar():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def rates(round_):
    return 0.1 / round_


def test_one_client_is_centralized_training_exactly():
    federated, central, rounds = small_model(), small_model(), (1, 2, 3)
    batches = {round_: some_batches(4, seed=round_) for round_ in rounds}
    only = {"only": Client(7, batches.get, F.mse_loss)}
    losses = [loss["only"] for _, loss in federated_rounds(federated, only, 3, rates)]
    assert losses == [train_locally(central, batches[n], F.mse_loss, lr=rates(n)) for n in rounds]
    assert all(map(torch.equal, federated.parameters(), central.parameters()))


def test_two_hospitals_with_one_sgd_step_equal_the_pooled_gradient():
    """w − lr Σ_k (n_k / n) ∇L_k: one full batch each, weighted by unequal n_k."""
    federated, pooled = small_model().double(), small_model().double()
    pairs = {n: some_batches(1, seed=n, size=n)[0] for n in (5, 15)}
    pairs = {n: (x.double(), y.double()) for n, (x, y) in pairs.items()}

    def train(model, batches, loss_function, lr):
        x, y = batches
        loss = loss_function(model(x), y)
        model.zero_grad()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=lr).step()
        return loss.item()

    clients = {n: Client(n, lambda _, n=n: pairs[n], F.mse_loss) for n in pairs}
    ((_, losses),) = federated_rounds(federated, clients, 1, rates, train=train)
    loss = train(pooled, map(torch.cat, zip(*pairs.values(), strict=True)), F.mse_loss, lr=0.1)
    for a, b in zip(federated.parameters(), pooled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert (5 * losses[5] + 15 * losses[15]) / 20 == pytest.approx(loss)


def test_each_hospital_starts_from_the_global_weights_in_order():
    model, seen = scalar(), []

    def train(model, batches, loss_function, lr):
        seen.append((*batches, lr, model.weight.item()))
        with torch.no_grad():
            model.weight += {"a": 1.0, "b": 4.0}[batches[0]]
        return 0.5

    clients = {"a": client(2, "a"), "b": client(1, "b")}
    rounds = list(federated_rounds(model, clients, 2, rates, train=train))
    assert rounds == [(1, {"a": 0.5, "b": 0.5}), (2, {"a": 0.5, "b": 0.5})]
    # (2 · 2 + 1 · 5) / 3 = 3 after the first round, (2 · 4 + 1 · 7) / 3 = 5 after the second
    assert seen == [(k, n, 0.1 / n, w) for n, w in ((1, 1.0), (2, 3.0)) for k in "ab"]
    assert model.weight.item() == 5.0


def test_a_model_goes_on_after_the_rounds_that_it_went_through():
    """4 rounds in a row equal 2 rounds and 2 later ones in another model."""
    through, first, later = small_model(), small_model(), small_model()
    clients = {
        k: Client(n, lambda round_, n=n: some_batches(2, seed=10 * round_ + n), F.mse_loss)
        for k, n in (("a", 1), ("b", 3))
    }
    whole = list(federated_rounds(through, clients, 4, rates))
    list(federated_rounds(first, clients, 2, rates))
    later.load_state_dict(first.state_dict())
    assert list(federated_rounds(later, clients, 4, rates, start=2)) == whole[2:]
    assert all(map(torch.equal, later.parameters(), through.parameters()))
    assert list(federated_rounds(later, clients, 4, rates, start=4)) == []


def constant(loss):
    return lambda model, batches, loss_function, lr: loss


def poison(model, batches, loss_function, lr):
    if batches == ("a", 2):
        nn.init.constant_(model.weight, NAN)
    return 0.1


def stumble(model, batches, loss_function, lr):
    if batches == ("c", 3):
        raise ConnectionResetError("the disk is gone")
    return 0.1


def broken(round_):
    yield from ()
    raise OSError(f"cannot be read in round {round_}")


ABC = {name: client(1, name) for name in "abc"}
LOSS = "^the loss is {}; a lower learning rate may help$"


@pytest.mark.parametrize(
    ("clients", "train", "error", "match", "place"),
    [
        (ABC, poison, FloatingPointError, "^weight has weights that are NaN", (2, "a")),
        (ABC, stumble, ConnectionResetError, "^the disk is gone", (3, "c")),
        (ABC, constant(NAN), FloatingPointError, LOSS.format("nan"), (1, "a")),
        (ABC, constant(INF), FloatingPointError, LOSS.format("inf"), (1, "a")),
        (ABC, constant(-INF), FloatingPointError, LOSS.format("-inf"), (1, "a")),
        ({"a": client(0, "a")}, constant(0.1), ValueError, "^n_k must be positive", (1, "a")),
        ({"a": Client(1, broken, None)}, train_locally, OSError, "read in round 1", (1, "a")),
        ({"a": Client(1, lambda _: [], None)}, train_locally, ValueError, "no batch", (1, "a")),
        ({}, constant(0.1), ValueError, "^nothing to average", ()),  # nobody could be named
    ],
)
def test_a_failure_keeps_its_type_and_notes_round_and_hospital(clients, train, error, match, place):
    with pytest.raises(error) as caught:
        list(federated_rounds(scalar(), clients, 3, rates, train=train))
    assert type(caught.value) is error
    assert re.search(match, str(caught.value))
    notes = ["round {}, hospital {}".format(*place)] if place else []
    assert getattr(caught.value, "__notes__", []) == notes


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "max_norm": 0.3}])
def test_local_training_is_adamw_with_clipping(more):
    """By hand, with gradients long and short: Adam alone would not notice that all are scaled."""

    def loss(logits, targets):
        y, scale = targets
        return scale * F.mse_loss(logits, y)

    decay, max_norm, lr = more.get("weight_decay", 1e-4), more.get("max_norm", 1.0), 0.01
    model = small_model().double()
    (x, y), (x2, y2) = some_batches(2, 3)
    batches = [(x.double(), (y.double(), 100)), (x2.double(), (y2.double(), 0.1))]
    by_hand = {key: w.detach().clone() for key, w in model.named_parameters()}
    moments, losses, norms = dict.fromkeys(by_hand, (0, 0)), [], []
    for step, (x, targets) in enumerate(batches, start=1):
        weights = {key: w.clone().requires_grad_() for key, w in by_hand.items()}
        losses.append(loss(functional_call(model, weights, x).float(), targets))
        gradients = torch.autograd.grad(losses[-1], list(weights.values()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        for (key, w), g in zip(by_hand.items(), gradients, strict=True):
            g = g * min(1, max_norm / (norms[-1] + 1e-6))
            first, second = moments[key]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            moments[key] = first, second
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            by_hand[key] = w - lr * decay * w - lr * move
    assert norms[0] > max_norm > norms[1]
    returned = train_locally(model, batches, loss, lr=lr, **more)
    assert type(returned) is float
    assert returned == pytest.approx(sum(losses).item() / 2)
    torch.testing.assert_close(dict(model.state_dict()), by_hand, rtol=0, atol=1e-8)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_mixed_precision_is_the_networks_alone(autocast):
    """And the network is in training mode, whatever it was in before."""
    dtypes = []

    class Network(nn.Linear):
        def forward(self, x):
            assert self.training
            dtypes.append(super().forward(x).dtype)
            return super().forward(x)

    def loss(logits, targets):
        dtypes.append(logits.dtype)
        return F.mse_loss(logits, targets)

    train_locally(Network(3, 2).eval(), some_batches(1, 0), loss, lr=0.01, autocast=autocast)
    assert dtypes == [autocast or torch.float32, torch.float32]
