"""Each module alone: importing it does nothing, and needs no more than it says."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
ALLOWED = {"gin": "torch", "unet3d": "torch", "federated": "torch", "phantom": "numpy scipy"}

CHECK = """
import random, sys, pathlib
import numpy, torch
states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = sorted(pathlib.Path().rglob("*"))
import {module}
assert states[:2] == (random.getstate(), numpy.random.get_state()[1].tolist())
assert states[2] == torch.get_rng_state().tolist()
assert before == sorted(pathlib.Path().rglob("*"))
"""


def python(code, cwd, path=ROOT):
    environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    words = [sys.executable, "-c", code]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("module", MODULES)
def test_import_prints_writes_and_draws_nothing(module, tmp_path):
    done = python(CHECK.format(module=module), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ALLOWED)
def test_stands_alone(module, tmp_path):
    """In a folder of its own it imports with no package but its own few."""
    (tmp_path / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
    forbidden = {"torch", "numpy", "scipy", "nibabel", "tqdm", "data"} - set(
        ALLOWED[module].split()
    )
    code = f"""
import sys
import {module}
direct = open({str(tmp_path / (module + ".py"))!r}).read()
for name in {sorted(forbidden)}:
    assert f"import {{name}}" not in direct and f"from {{name}}" not in direct, name
"""
    done = python(code, tmp_path, path=tmp_path)
    assert done.returncode == 0, done.stderr
