"""What ranks say to one another, in threads: messages, sums, and the reason of one that fails."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import alone, together
from torch import distributed

from scans.files import DataError
from scripts.peers import PeerError, Peers, pack, unpack


@pytest.fixture
def ranks_in_threads(monkeypatch, tmp_path):
    """A function: what each rank does with its peers → their errors, and what torchrun would say.

    All hear of one another through a store in memory.
    """

    def start(*actions, timeout=10.0):
        store, ranks = distributed.HashStore(), []
        monkeypatch.setenv("WORLD_SIZE", str(len(actions)))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
        for rank in range(len(actions)):
            monkeypatch.setenv("RANK", str(rank))
            ranks.append(Peers("abc"[rank], timeout))

        def act(peers):
            try:
                return actions[peers.rank](peers)
            except Exception as error:
                peers.leave(error)
                return error

        with ThreadPoolExecutor(len(actions)) as pool:
            return list(pool.map(act, ranks))

    return start


def test_all_ranks_end_with_the_reason_of_the_first_that_failed(ranks_in_threads, capsys):
    def fail(peers):
        time.sleep(1.5)
        raise DataError("no scan")

    def listen(peers):
        try:
            return peers.exchange("settings", 1)
        except PeerError as error:
            error.add_note("round 2, hospital a")
            raise

    def fail_later(peers):
        time.sleep(4)
        raise OSError("no disk")

    first, heard, own = ranks_in_threads(fail, listen, fail_later)
    assert (type(first), type(own), str(own)) == (DataError, OSError, "no disk")
    assert (type(heard), str(heard), heard.__notes__) == (PeerError, "rank 0 (a): no scan", [])
    waits = [line for line in capsys.readouterr().err.splitlines() if " waits for " in line]
    assert sorted(waits) == [
        "rank 0 (a): no scan; rank 0 (a) waits for rank 2",
        "rank 0 (a): no scan; rank 1 (b) waits for rank 2",
        "rank 1 (b) waits for rank 0, rank 2",
    ]


def test_a_rank_that_says_nothing_is_named_and_not_waited_for_again(ranks_in_threads):
    began = time.monotonic()
    a, _, c = ranks_in_threads(
        lambda peers: peers.exchange("x", 0),
        lambda peers: None,
        lambda peers: peers.exchange("x", 2),
        timeout=2,
    )
    for error in (a, c):
        assert str(error) == "rank 1 was killed, is cut off or takes longer than --timeout 2"
    assert time.monotonic() - began < 3.5


def test_what_ranks_exchange_comes_back_by_rank(ranks_in_threads):
    values = [{"liver": 0.5}, [1, None], "ü"]
    found = ranks_in_threads(*(lambda peers: peers.exchange("x", values[peers.rank]),) * 3)
    assert found == [values] * 3


def states(n):
    generator = torch.Generator().manual_seed(n)
    return {
        "conv": torch.randn(3, 2, generator=generator),
        "norm": torch.randn(4, generator=generator).double() * 1e3,
        "scale": torch.randn((), generator=generator),
    }


def test_the_average_over_ranks_is_the_weighted_average():
    pairs = [(states(1), 8), (states(2), 1), (states(3), 40)]
    for found in together(3, lambda peers: peers.average(*pairs[peers.rank])):
        for key, w in states(1).items():
            expected = sum(n / 49 * weights[key].double() for weights, n in pairs)
            assert found[key].dtype == w.dtype
            torch.testing.assert_close(found[key], expected.to(w), rtol=1e-7, atol=1e-10)


def test_the_average_over_ranks_rounds_integers():
    counts = [torch.tensor([0, 10]), torch.tensor([3, 20])]

    def average(peers):
        return peers.average({"n": counts[peers.rank]}, 1 + peers.rank)["n"]

    for found in together(2, average):
        assert found.dtype == torch.int64
        assert found.tolist() == [2, 17]  # of 2 and 16.67


def test_unpack_gives_back_what_pack_took():
    weights = states(1)
    found = unpack(pack(weights), like=weights)
    assert found.keys() == weights.keys()
    for key, w in weights.items():
        assert found[key].dtype == w.dtype
        assert torch.equal(found[key], w)


@pytest.mark.parametrize(
    ("state", "n_k", "error"),
    [
        ({"w": torch.tensor([1.0, math.nan])}, 1, FloatingPointError),
        ({"w": torch.ones(2)}, 0, ValueError),
    ],
)
def test_a_rank_sends_no_weights_that_are_not_finite(state, n_k, error):
    told = {}
    with pytest.raises(error):
        alone(told).average(state, n_k)
    assert told == {}
