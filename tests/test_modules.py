"""The house: who imports whom, how long all is, and what runs where nothing else is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("scans", "study", "scripts")
GROUND = ("gin", "unet3d", "federated", "data", "evaluate")
SIX = ("fedgin", *GROUND)
BELOW = {  # what the modules of a room may import, beside those of their own room
    "": (),
    "scans": GROUND,
    "study": (*GROUND, "scans"),
    "fedgin": (*GROUND, "scans", "study"),
    "scripts": (*GROUND, "scans", "study", "fedgin"),
}
ALONE = {  # what they may import, beside the standard library
    "gin": {"torch"},
    "unet3d": {"torch"},
    "federated": {"torch"},
    "data": {"torch", "numpy"},
    "evaluate": {"torch", "numpy", "scipy"},
    "scans.phantom": {"numpy", "scipy"},
}
# Lines at most, blank ones and docstrings included.
LINES_OF_THE_SIX = 1250
LINES_OF_THE_PACKAGES = 3696
LINES_OF_A_FILE = 280
LINES_OF_THE_EXPERIMENT = 330  # fedgin.py
LINES_OF_A_FUNCTION = 40
LINES_OF_A_SNIPPET = 8


def find_modules():
    """{dotted name: path} of all modules except the packages' own __init__.py."""
    paths = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name: path for name, path in sorted(names.items()) if path.name != "__init__.py"}


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(name):
    """Names of modules that a module imports, wherever in it, as far as each is a module."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.add(below if below in MODULES else node.module)
    return found


GRAPH = {name: imported(name) & MODULES.keys() for name in MODULES}


def test_the_root_has_six_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {f"{name}.py" for name in SIX}


def room_of(name):
    return "" if name in GROUND else name.split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards_only(name):
    room = room_of(name)
    for other in GRAPH[name]:
        own = room in ROOMS and room_of(other) == room
        assert own or other in BELOW[room] or room_of(other) in BELOW[room], other


def test_no_import_leads_back():
    left = dict(GRAPH)
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"a cycle in {sorted(left)}"
        left = {name: others for name, others in left.items() if name not in free}


@pytest.mark.parametrize("name", MODULES)
def test_imports_stand_at_the_top(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert inner == [], f"line {node.lineno}"
    called = {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    assert not called & {"__import__", "importlib", "exec", "eval"}


def test_each_module_has_a_name_and_tests_of_its_own():
    names = [name.split(".")[-1] for name in MODULES]
    assert len(set(names)) == len(names)
    assert [name for name in names if not (ROOT / f"tests/test_{name}.py").is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_package_is_a_docstring(room):
    [statement] = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value.value, str)
    assert not [path for path in (ROOT / room).iterdir() if path.is_dir() and "__" not in path.name]


def count(path):
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_can_be_read_at_a_sitting(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LINES_OF_A_FUNCTION, node.name
    limit = LINES_OF_THE_EXPERIMENT if name == "fedgin" else LINES_OF_A_FILE
    assert count(MODULES[name]) <= limit


def test_the_method_stays_small():
    assert sum(count(MODULES[name]) for name in SIX) <= LINES_OF_THE_SIX


def test_what_surrounds_the_method_stays_small():
    files = [path for room in ROOMS for path in ROOT.glob(f"{room}/*.py")]
    assert sum(map(count, files)) <= LINES_OF_THE_PACKAGES


IMPORTS = """
import random, pathlib, sys
import numpy, torch
states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
before = sorted(pathlib.Path().rglob("*"))
import {modules}
assert states[:2] == (random.getstate(), numpy.random.get_state()[1].tolist())
assert states[2] == torch.get_rng_state().tolist()
assert before == sorted(pathlib.Path().rglob("*"))
assert "matplotlib" not in sys.modules
"""


def test_imports_print_write_and_draw_nothing(tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}
    args = [sys.executable, "-c", IMPORTS.format(modules=", ".join(MODULES))]
    done = subprocess.run(args, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ALONE)
def test_imports_no_sibling_and_no_package_but_its_own_few(name):
    names = imported(name)
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == ALONE[name]


@pytest.mark.parametrize("name", ALONE)
def test_its_snippet_runs_where_nothing_else_is(name, tmp_path, monkeypatch, capfd):
    """From a copy in an empty folder; a tuple in a comment behind an assignment is a shape."""
    docstring = ast.get_docstring(TREES[name], clean=False)
    [snippet] = re.findall(r"\n\n((?:    import|    from) .*\n(?:    .*\n)+)", docstring)
    lines = [line[4:].replace("scans.phantom", "phantom") for line in snippet.splitlines()]
    assert len(lines) <= LINES_OF_A_SNIPPET
    alone, code = name.split(".")[-1], []
    assert any(line.startswith(f"from {alone} import ") for line in lines)
    for line in lines:
        code.append(line)
        if shape := re.fullmatch(r"(\w+)(?:, \w+)? = .*  # (\([\d, ]+\)).*", line):
            code.append(f"assert tuple({shape[1]}.shape) == {shape[2]}, {shape[1]}.shape")
    shapes = {"gin": 1, "unet3d": 1, "evaluate": 1, "scans.phantom": 1}.get(name, 0)
    assert len(code) - len(lines) == shapes
    (tmp_path / f"{alone}.py").write_text(MODULES[name].read_text())
    for module in (*MODULES, *ROOMS, alone):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises an ImportError
    del sys.modules[alone]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    exec("\n".join(code), {})
    assert sys.modules[alone].__file__ == str(tmp_path / f"{alone}.py")
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"{alone}.py"]
