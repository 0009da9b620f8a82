"""Each module alone: importing it does nothing, and its own snippet runs where nothing else is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import monai.transforms
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
ALONE = {  # what they may import, beside the standard library
    "gin": {"torch"},
    "unet3d": {"torch"},
    "federated": {"torch"},
    "loss": {"torch"},
    "phantom": {"numpy", "scipy"},
    "evaluate": {"torch", "numpy", "scipy"},
}

CHECK = """
import random, pathlib
import numpy, torch
states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = sorted(pathlib.Path().rglob("*"))
import {modules}
assert states[:2] == (random.getstate(), numpy.random.get_state()[1].tolist())
assert states[2] == torch.get_rng_state().tolist()
assert before == sorted(pathlib.Path().rglob("*"))
"""


def python(code, cwd, path=ROOT):
    environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    args = [sys.executable, "-c", code]
    return subprocess.run(args, cwd=cwd, env=environment, capture_output=True, text=True)


def test_imports_print_write_and_draw_nothing(tmp_path):
    done = python(CHECK.format(modules=", ".join(MODULES)), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", MODULES)
def test_it_has_tests_of_its_own(module):
    assert (ROOT / f"tests/test_{module}.py").is_file()


@pytest.mark.parametrize("module", ALONE)
def test_imports_no_sibling_and_no_package_but_its_own_few(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == ALONE[module]


@pytest.mark.parametrize("module", ALONE)
def test_its_snippet_runs_in_an_empty_folder(module, tmp_path):
    text = (ROOT / f"{module}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    [snippet] = re.findall(r"\n\n((?:    import|    from) .*\n(?:    .*\n)+)", docstring)
    assert len(snippet.splitlines()) <= 5
    (tmp_path / f"{module}.py").write_text(text)
    done = python("\n".join(line[4:] for line in snippet.splitlines()), tmp_path, path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_readmes_snippet_trains_an_arm_and_writes_nothing(tmp_path):
    snippet, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    quick = snippet.replace("local_steps=2", "local_steps=1, width=2, depth=2")
    check = "print(len(state['history']), model.training, sorted(hospitals))"
    done = python(f"{quick}\n{check}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    history, last = done.stdout.splitlines()
    rounds = ast.literal_eval(history)
    assert [row["round"] for row in rounds] == [1, 2]
    assert all(row["loss mri"] > 0 < row["val_dice_ct"] for row in rounds)
    assert last == "2 True [42]"
    assert list(tmp_path.iterdir()) == []


def test_readmes_snippets_for_monai_and_a_data_loader():
    readme = (ROOT / "README.md").read_text()
    _, for_monai, for_loader = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for snippet in (for_monai, for_loader):
        assert len([line for line in snippet.splitlines() if line]) <= 3
    names: dict = {"load": monai.transforms.Identityd("image")}
    exec(for_monai, names)
    image = torch.randn(1, 8, 8, 8)
    redrawn = names["transform"]({"image": image, "label": image > 0})
    assert redrawn["image"].shape == image.shape
    assert not torch.allclose(redrawn["image"], image)
    assert torch.equal(redrawn["label"], image > 0)
    torch.testing.assert_close(redrawn["image"].norm(), image.norm(), rtol=1e-3, atol=0)
    seen = []
    loader = DataLoader(TensorDataset(torch.randn(4, 1, 8, 8, 8), torch.zeros(4)), batch_size=2)
    exec(for_loader, {"loader": loader, "step": lambda images, labels: seen.append(images)})
    assert [tuple(images.shape) for images in seen] == [(2, 1, 8, 8, 8)] * 2
    assert not any(torch.allclose(a, b[0]) for a, b in zip(seen, loader, strict=True))
