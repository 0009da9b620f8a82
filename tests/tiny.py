"""Tiny runs of the command, and what of them must be the same."""

import re

import torch

import fedgin

TINY = ["--rounds", "4", "--local-steps", "2", "--batch-size", "2", "--patch", "32"]
TINY += ["--gin-probability", "1"]
TINY += ["--width", "2", "--depth", "2", "--arms", "fl", "fedgin"]


def command(*args):
    return fedgin.main([*TINY, *map(str, args)])


def outcome(out):
    """All that a finished run leaves and that must not depend on how it got there, by file name."""
    files = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.suffix == ".pt":
            files[path.name] = torch.load(path, weights_only=True)
        elif path.name not in ("lock", "config.json"):
            # Rounds do not take the same time twice.
            files[path.name] = re.sub(rb'("seconds": |(?<=,\d,))[\d.]+', b"", path.read_bytes())
    return files


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, content in a.items():
        other = b[name]
        if name.endswith(".pt"):
            assert content["weights"].keys() == other["weights"].keys()
            for key, w in content["weights"].items():
                assert torch.equal(w, other["weights"][key]), f"{name}: {key}"
            content, other = ({**c, "weights": None} for c in (content, other))
        assert content == other, name
