"""FedAvg against numbers worked by hand, exact sums, centralized training, the pooled gradient."""

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from federated import (
    Client,
    RunningAverage,
    federated_rounds,
    noting,
    train_client,
    train_locally,
)


def weighted_average(pairs):
    """The average of (weights, n_k)."""
    average = RunningAverage()
    for w_k, n_k in pairs:
        average.add(w_k, n_k)
    return average.result()


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
            "up": torch.tensor(int(value > 1)),
            "flag": torch.tensor(value > 1),
            "rare": torch.tensor(value < 2),
            "complex": torch.tensor(value * 1j),
        }

    mean = weighted_average([(state(1.0), 1), (state(4.0), 3)])
    assert {k: v.dtype for k, v in mean.items()} == {k: v.dtype for k, v in state(1.0).items()}
    assert mean["half"] == mean["double"] == 3.25
    assert mean["count"] == 3
    assert mean["up"] == 1  # of 0.75
    assert mean["flag"]
    assert not mean["rare"]  # 0.25
    assert mean["complex"] == 3.25j


def test_accumulates_in_float64():
    """2^24 + 1 is no float32, so a float32 sum of these loses the small ones."""
    pairs = [({"w": torch.tensor([2.0**24])}, 1)] + [({"w": torch.tensor([1.0])}, 1)] * 15
    assert weighted_average(pairs)["w"].item() == torch.tensor((2.0**24 + 15) / 16).item()
    many = weighted_average([({"w": torch.tensor([0.1])}, 0.7)] * 10000)["w"]
    assert many.item() == torch.tensor(0.1).item()


def test_keeps_no_state_and_leaves_it_untouched():
    state, average = {"w": torch.zeros(3)}, RunningAverage()
    for value in (1.0, 2.0, 6.0):
        state["w"].fill_(value)  # the same tensor each time
        average.add(state, 1)
        assert state["w"].tolist() == [value] * 3
    mean = average.result()
    assert mean["w"].tolist() == [3.0] * 3
    assert state["w"].tolist() == [6.0] * 3
    mean["w"].fill_(0)
    assert state["w"].tolist() == [6.0] * 3
    assert average.result()["w"].tolist() == [3.0] * 3


def test_more_can_be_added_after_a_result():
    average = RunningAverage()
    found = []
    for value, n_k in ((1.0, 1), (5.0, 3), (9.0, 4)):
        average.add({"w": torch.tensor(value), "n": torch.tensor(int(value))}, n_k)
        found.append([w.item() for w in average.result().values()])
    assert found == [[1.0, 1], [4.0, 4], [6.5, 6]]  # 6.5 is rounded to even


def test_memory_does_not_grow_with_the_states():
    """Of a state nothing is kept, and there are as many sums after the third as after one."""
    average, states = RunningAverage(), []
    for _ in range(3):
        state = {"w": torch.ones(4)}
        average.add(state, 1)
        states.append(weakref.ref(state["w"]))
        del state
        assert [(w.shape, w.dtype) for w in average.sums.values()] == [((4,), torch.float64)]
    assert [state() for state in states] == [None] * 3


def test_parameters_may_be_averaged_as_they_are():
    mean = weighted_average((dict(small_model().named_parameters()), n) for n in (1, 2))
    assert not any(w.requires_grad for w in mean.values())


@pytest.mark.parametrize("n_k", [0, -1, math.nan, math.inf])
def test_bad_n_k_is_refused(n_k):
    average = RunningAverage()
    average.add({"w": torch.ones(1)}, 1)
    with pytest.raises(ValueError, match=f"^n_k must be positive and finite, not {n_k}$"):
        average.add({"w": torch.full((1,), 5.0)}, n_k)
    assert average.result()["w"].item() == 1  # as if nothing had been added
    with pytest.raises(ValueError, match="n_k must be positive"):
        RunningAverage().add({"w": torch.ones(1)}, n_k)


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ({}, ValueError, "^weights have other keys than those before: w$"),
        ({k: torch.ones(2) for k in "wcba"}, ValueError, "keys than those before: a, b, c$"),
        ({"w": torch.ones(3)}, ValueError, r"^w has shape \(3,\), before it \(2,\)$"),
        ({"w": torch.tensor([1.0, math.nan])}, FloatingPointError, "^w has weights that are NaN"),
        ({"w": torch.tensor([1.0, -math.inf])}, FloatingPointError, "^w has .* NaN or infinite$"),
    ],
)
def test_states_that_do_not_fit_are_refused(second, error, message):
    average = RunningAverage()
    average.add({"w": torch.ones(2)}, 1)
    with pytest.raises(error, match=message):
        average.add(second, 1)
    assert average.result()["w"].tolist() == [1, 1]  # as if nothing had been added


def test_the_first_state_must_be_finite_too():
    with pytest.raises(FloatingPointError, match="^w has weights that are NaN"):
        RunningAverage().add({"w": torch.tensor([math.nan])}, 1)


@pytest.mark.parametrize("pairs", [[], [({}, 1)]])
def test_nothing_to_average_is_refused(pairs):
    with pytest.raises(ValueError, match="nothing to average"):
        weighted_average(pairs)


# ------------------------------------------------- what must hold of an average for any clients

finite = st.floats(-1e6, 1e6, width=32)
n_k = st.integers(1, 10**6)
clients = st.lists(st.tuples(st.tuples(finite, finite, finite), n_k), min_size=1, max_size=20)


def states(pairs):
    """State dicts of a float32 matrix, a float64 scalar, a half and an integer, with their n_k."""
    return [
        (
            {
                "a.weight": torch.tensor([[a, b]], dtype=torch.float32),
                "a.scale": torch.tensor(c, dtype=torch.float64),
                "b.half": torch.tensor([c / 100], dtype=torch.float16),
                "b.count": torch.tensor(int(a), dtype=torch.int64),
            },
            n,
        )
        for (a, b, c), n in pairs
    ]


def assert_states_close(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key].double(), b[key].double(), rtol=1e-6, atol=1e-2)


@given(clients, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_clients_does_not_matter(pairs, draw):
    shuffled = list(pairs)
    draw.shuffle(shuffled)
    assert_states_close(weighted_average(states(pairs)), weighted_average(states(shuffled)))


@given(clients, st.integers(1, 1000))
@settings(max_examples=50, deadline=None)
def test_only_the_ratios_of_n_k_matter(pairs, factor):
    scaled = [(values, n * factor) for values, n in pairs]
    assert_states_close(weighted_average(states(pairs)), weighted_average(states(scaled)))


@given(st.tuples(finite, finite, finite), st.lists(n_k, min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_identical_states_come_back_exactly(values, weights):
    state = states([(values, 1)])[0][0]
    mean = weighted_average((state, n) for n in weights)
    assert all(torch.equal(mean[key], state[key]) for key in state if key != "a.scale")
    torch.testing.assert_close(mean["a.scale"], state["a.scale"], rtol=1e-14, atol=0)


@given(clients)
@settings(max_examples=50, deadline=None)
def test_it_is_the_exact_mean_rounded_once(pairs):
    """Against exact sums (math.fsum) of each number, within one rounding of its dtype."""
    mean, total = weighted_average(states(pairs)), sum(n for _, n in pairs)
    exact = [math.fsum(v[i] * n for v, n in pairs) / total for i in range(3)]
    scale = max(abs(x) for v, _ in pairs for x in v) + 1e-30
    for value, expected in zip(mean["a.weight"][0].tolist(), exact[:2], strict=True):
        assert abs(value - expected) <= 2**-24 * abs(expected) + 1e-12 * scale
    assert abs(mean["a.scale"].item() - exact[2]) <= 1e-12 * scale
    low, high = min(int(v[0]) for v, _ in pairs), max(int(v[0]) for v, _ in pairs)
    assert low <= mean["b.count"].item() <= high


@given(st.tuples(finite, finite, finite), n_k)
@settings(max_examples=30, deadline=None)
def test_one_client_is_left_as_it_is(values, n):
    [(state, _)] = states([(values, n)])
    mean = weighted_average([(state, n)])
    assert all(torch.equal(mean[key], state[key]) for key in state if key != "a.scale")
    torch.testing.assert_close(mean["a.scale"], state["a.scale"], rtol=1e-14, atol=0)


def test_a_thousand_clients():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, 5, generator=generator)
    sizes = torch.randint(1, 100, (1000,), generator=generator)
    mean = weighted_average(({"w": w}, n.item()) for w, n in zip(weights, sizes, strict=True))["w"]
    exact = (weights.double() * sizes[:, None]).sum(0) / sizes.sum()
    torch.testing.assert_close(mean, exact.float(), rtol=1e-7, atol=0)


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


def scalar(value=1.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def rates(round_):
    return 0.1 / round_


def test_one_client_is_centralized_training_exactly():
    federated, central = small_model(), small_model()
    batches = {round_: some_batches(4, seed=round_) for round_ in (1, 2, 3)}
    only = {"only": Client(7, batches.get, F.mse_loss)}
    losses = [loss["only"] for _, loss in federated_rounds(federated, only, 3, rates)]
    expected = [
        train_locally(central, batches[round_], F.mse_loss, lr=rates(round_))
        for round_ in (1, 2, 3)
    ]
    assert losses == expected
    for a, b in zip(federated.parameters(), central.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_hospitals_with_one_sgd_step_equal_the_pooled_gradient():
    """w − lr Σ_k (n_k / n) ∇L_k: one full batch each, weighted by unequal n_k."""
    federated, pooled = small_model().double(), small_model().double()
    batches = {"a": some_batches(1, 1, size=5)[0], "b": some_batches(1, 2, size=15)[0]}
    batches = {name: (x.double(), y.double()) for name, (x, y) in batches.items()}

    def train(model, batches, loss_function, lr):
        x, y = batches
        loss = loss_function(model(x), y)
        model.zero_grad()
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=lr).step()
        return loss.item()

    clients = {
        "a": Client(5, lambda _: batches["a"], F.mse_loss),
        "b": Client(15, lambda _: batches["b"], F.mse_loss),
    }
    ((_, losses),) = federated_rounds(federated, clients, 1, rates, train=train)
    x, y = (torch.cat(parts) for parts in zip(*batches.values(), strict=True))
    loss = train(pooled, (x, y), F.mse_loss, lr=0.1)
    for a, b in zip(federated.parameters(), pooled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert (5 * losses["a"] + 15 * losses["b"]) / 20 == pytest.approx(loss)


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
    assert seen == [
        ("a", 1, 0.1, 1.0),
        ("b", 1, 0.1, 1.0),
        ("a", 2, 0.05, 3.0),
        ("b", 2, 0.05, 3.0),
    ]
    assert model.weight.item() == 5.0


def test_a_model_goes_on_after_the_rounds_that_it_went_through():
    """4 rounds in a row, and 4 of which the last two come later, in another model: the same."""
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


def add(model, batches, loss_function, lr):
    with torch.no_grad():
        model.weight += batches[0]
    return 0.5


def test_weights_are_counted_n_k_times_and_clients_may_spoil_their_model():
    """What a hospital does to the model after it was added, and before, reaches nobody else."""
    model, begun = scalar(), []

    def train(model, batches, loss_function, lr):
        begun.append(model.weight.item())
        with torch.no_grad():
            model.weight.fill_(batches[0])
        return 0.5

    clients = {"a": client(2, 1.0), "b": client(5, 8.0)}
    for _ in federated_rounds(model, clients, 2, rates, train=train):
        pass
    assert begun == [1.0, 1.0, 6.0, 6.0]
    assert model.weight.item() == 6.0  # (2 · 1 + 5 · 8) / 7


def test_training_a_client_is_training_on_its_batches_of_the_round():
    model, seen = scalar(), []

    def train(model, batches, loss_function, *, lr):
        seen.append((model, batches, loss_function, lr))
        return 0.25

    assert train_client(model, client(3, "a"), 7, 0.125, train) == 0.25
    assert seen == [(model, ("a", 7), F.mse_loss, 0.125)]
    for loss in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match=f"^the loss is {loss}; a lower learning rate"):
            train_client(model, client(3, "a"), 7, 0.125, constant(loss))
    by_default, by_hand = small_model(), small_model()
    of_round = Client(1, lambda round_: some_batches(2, round_), F.mse_loss)
    loss = train_client(by_default, of_round, 5, 0.01)
    assert loss == train_locally(by_hand, some_batches(2, 5), F.mse_loss, lr=0.01)
    assert all(map(torch.equal, by_default.parameters(), by_hand.parameters()))


def test_a_place_is_noted_on_whatever_is_raised():
    with pytest.raises(KeyError) as caught, noting("round 1"), noting("hospital a"):
        raise KeyError("w")
    assert caught.value.__notes__ == ["hospital a", "round 1"]
    with pytest.raises(KeyboardInterrupt) as stopped, noting("round 1"):
        raise KeyboardInterrupt
    assert not hasattr(stopped.value, "__notes__")


def constant(loss):
    return lambda model, batches, loss_function, lr: loss


def failure(clients, train, error, match):
    """The notes of what the rounds raise."""
    with pytest.raises(error, match=match) as caught:
        list(federated_rounds(scalar(), clients, 3, rates, train=train))
    assert type(caught.value) is error
    return getattr(caught.value, "__notes__", [])


def test_a_failure_keeps_its_type_and_notes_round_and_hospital():
    compass = {name: client(1, name) for name in ("north", "south", "west")}

    def poison(model, batches, loss_function, lr):
        if batches == ("south", 2):
            nn.init.constant_(model.weight, math.nan)
        return 0.1

    def stumble(model, batches, loss_function, lr):
        if batches == ("west", 3):
            raise ConnectionResetError("the disk is gone")
        return 0.1

    notes = failure(compass, poison, FloatingPointError, "weight has weights that are NaN")
    assert notes == ["round 2, hospital south"]
    notes = failure(compass, stumble, ConnectionResetError, "the disk is gone")
    assert notes == ["round 3, hospital west"]
    for loss in (math.nan, math.inf):
        notes = failure(compass, constant(loss), FloatingPointError, f"the loss is {loss}")
        assert notes == ["round 1, hospital north"]
    notes = failure(
        {"north": client(0, "north")}, constant(0.1), ValueError, "^n_k must be positive"
    )
    assert notes == ["round 1, hospital north"]
    notes = failure({}, constant(0.1), ValueError, "nothing to average")
    assert notes == []  # there is none who could be named


def test_weights_that_cannot_be_added_name_their_hospital(monkeypatch):
    def refuse(self, w_k, n_k):
        if n_k == 2:
            raise KeyError("weight")

    monkeypatch.setattr(RunningAverage, "add", refuse)
    compass = {"north": client(1, "north"), "south": client(2, "south")}
    notes = failure(compass, constant(0.1), KeyError, "weight")
    assert notes == ["round 1, hospital south"]


def test_a_failure_of_the_batches_is_noted_too():
    def broken(round_):
        yield from some_batches(1, 0)
        raise OSError(f"cannot be read in round {round_}")

    clients = {"a": Client(1, lambda _: some_batches(1, 0), F.mse_loss)}
    clients["b"] = Client(1, broken, F.mse_loss)
    with pytest.raises(OSError, match="cannot be read in round 1") as caught:
        list(federated_rounds(small_model(), clients, 3, rates))
    assert caught.value.__notes__ == ["round 1, hospital b"]


# ------------------------------------------------------------------------------- local training


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "max_norm": 0.3}])
def test_local_training_is_adamw_with_clipping(more):
    """By hand, with gradients long and short: Adam alone would not notice that all are scaled."""

    def loss(logits, targets):
        y, scale = targets
        return scale * F.mse_loss(logits, y)

    decay, max_norm = more.get("weight_decay", 1e-4), more.get("max_norm", 1.0)
    model = small_model().double()
    (x, y), (x2, y2) = some_batches(2, 3)
    batches = [(x.double(), (y.double(), 100)), (x2.double(), (y2.double(), 0.1))]
    by_hand = [w.detach().clone() for w in model.parameters()]
    moments, losses, norms, lr = [(0, 0) for _ in by_hand], [], [], 0.01
    for step, (x, targets) in enumerate(batches, start=1):
        reference = copy.deepcopy(model)
        for w, value in zip(reference.parameters(), by_hand, strict=True):
            w.data = value
        losses.append(loss(reference(x).float(), targets))
        gradients = torch.autograd.grad(losses[-1], list(reference.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        for n, g in enumerate(gradients):
            g = g * min(1, max_norm / (norms[-1] + 1e-6))
            first, second = moments[n]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            moments[n] = first, second
            move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            by_hand[n] = by_hand[n] - lr * decay * by_hand[n] - lr * move
    assert norms[0] > max_norm > norms[1]
    returned = train_locally(model, batches, loss, lr=lr, **more)
    assert type(returned) is float
    assert returned == pytest.approx(sum(losses).item() / 2)
    for w, expected in zip(model.parameters(), by_hand, strict=True):
        torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-8)


def test_local_training_learns():
    model, batches = small_model(), some_batches(1, 5) * 300
    first = train_locally(model, batches[:1], F.mse_loss, lr=0.01)
    train_locally(model, batches, F.mse_loss, lr=0.01)
    assert train_locally(model, batches[:1], F.mse_loss, lr=0.01) < 0.1 * first


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        train_locally(small_model(), [], F.mse_loss, lr=0.01)


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
