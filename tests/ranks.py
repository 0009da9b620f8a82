"""Ranks in threads of one process, which hear one another through a dict."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

from scripts.peers import Peers


class Together(Peers):
    """A rank in a thread of its own."""

    def __init__(self, rank, told, meeting):
        self.rank, self.size, self.told, self.meeting = rank, meeting.parties, told, meeting

    def exchange(self, key, value):
        self.told[key, self.rank] = json.dumps(value)
        self.meeting.wait(60)
        return [json.loads(self.told[key, rank]) for rank in range(self.size)]

    def add_up(self, numbers):
        self.told["numbers", self.rank] = numbers
        self.meeting.wait(60)
        total = sum(self.told["numbers", rank] for rank in range(self.size))
        self.meeting.wait(60)  # or the next numbers might come before all have read these
        return total


def together(size, function):
    """function(peers) of each rank; raises what the first one raised."""
    told, meeting = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: function(Together(rank, told, meeting)), range(size)))


def alone(told):
    """The only rank, which leaves in `told` what others would hear of it."""
    return Together(0, told, threading.Barrier(1))
