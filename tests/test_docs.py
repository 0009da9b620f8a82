"""The pages keep their word, and the pictures show what they say."""

import ast
import contextlib
import dataclasses
import io
import re
import shutil
import textwrap
from pathlib import Path

import monai.transforms
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader, TensorDataset

import figures
import gin
import method_figures
from data import Volume, normalize
from fedgin import ARMS
from scans.cases import PreparedCase
from scans.phantom import make_phantom
from study.config import VERSION, Best, Checkpoint, Config, Round, Training
from study.hospitals import Hospital
from study.results import RunFolder
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
QUOTE = re.compile(
    r"From\s`([\w.]+)`\sin\s\[(\w+\.py)\]\(\.\./\2\):\n\n```python\n(.*?)```", re.DOTALL
)


def source_of(file, function):
    """The lines of a function or method of a file."""
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for name in function.split("."):
        [node] = [child for child in node.body if getattr(child, "name", None) == name]
    return (ROOT / file).read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno]


@pytest.mark.parametrize(("function", "file", "quote"), QUOTE.findall(METHOD))
def test_quoted_lines_stand_in_their_function(function, file, quote):
    quote, lines = quote.splitlines(), source_of(file, function)
    passages = (lines[i : i + len(quote)] for i in range(len(lines) - len(quote) + 1))
    assert quote in [textwrap.dedent("\n".join(p)).splitlines() for p in passages]


def test_every_example_of_the_method_prints_what_it_says():
    examples = re.findall(r"```python\n(.*?)```", QUOTE.sub("", METHOD), re.DOTALL)
    assert len(QUOTE.findall(METHOD)) + len(examples) == METHOD.count("```python")
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(example, {})
        assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", example)
        assert printed.getvalue()


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them of headings that differ."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.strip().lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_one_version_is_named_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    [(version, date)] = re.findall(r"^version: (.+)\ndate-released: (.+)$", citation, re.M)
    latest, *_ = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert version == VERSION
    assert latest == f"{version} ({date})"


def test_readmes_snippets_are_short():
    for snippet, limit in zip(SNIPPETS, (8 + 3, 3, 3), strict=True):  # three imports
        assert len([line for line in snippet.splitlines() if line]) <= limit


def test_readmes_snippet_trains_an_arm_and_writes_nothing(tmp_path, monkeypatch, capfd):
    quick, names = SNIPPETS[0].replace("local_steps=2", "local_steps=1, width=2, depth=2"), {}
    assert quick != SNIPPETS[0]
    monkeypatch.chdir(tmp_path)
    exec(quick, names)
    printed, errors = capfd.readouterr()
    rounds = re.findall(r"^(\d) {'mri': [\d.e-]+, 'ct': ([\d.e-]+)}$", printed, re.M)
    assert [n for n, _ in rounds] == ["1", "2"]
    assert all(float(dice) > 0 for _, dice in rounds)
    assert len(names["checkpoint"].history) == len(printed.splitlines()) == 2
    assert names["checkpoint"].best.weights is not None
    assert sorted(names["clients"]) == ["ct", "mri"]
    assert (errors, list(tmp_path.iterdir())) == ("", [])


def test_readmes_snippets_for_monai_and_a_data_loader():
    names = {"load": monai.transforms.Identityd("image")}
    exec(SNIPPETS[1], names)
    case = {"image": torch.randn(1, 8, 8, 8), "label": torch.ones(1, 8, 8, 8)}
    redrawn = names["transform"](case)
    assert not torch.allclose(redrawn["image"], case["image"])
    assert redrawn["label"] is case["label"]
    loader = DataLoader(TensorDataset(torch.randn(4, 1, 8, 8, 8), torch.zeros(4)), batch_size=2)
    seen = []
    exec(SNIPPETS[2], {"loader": loader, "step": lambda images, labels: seen.append(images)})
    for images, (before, _) in zip(seen, loader, strict=True):
        assert images.shape == before.shape
        assert not torch.allclose(images, before)


def test_a_slice_is_seen_from_the_feet():
    """Its indices run to the patient's right and front: right is on the left, the front is up."""
    axis, image = plt.figure().subplots(), np.arange(12.0).reshape(3, 4)
    method_figures.show(axis, image, (0, 1))
    rows = axis.images[0].get_array()
    assert (rows[0, 0], rows[0, -1], rows[-1, 0]) == (image[-1, -1], image[0, -1], image[-1, 0])
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert left < right and top < bottom  # columns run right, and rows down
    places = {"R": (0.05, 0.5), "L": (0.95, 0.5)}
    assert {text.get_text(): text.get_position() for text in axis.texts} == places
    assert all(text.get_transform() == axis.transAxes for text in axis.texts)


def test_blend_is_gin_for_the_alpha_that_gin_draws():
    x = torch.from_numpy(normalize(make_phantom(1, "ct", 0)[0], "ct"))[None, None]
    draws = torch.Generator().manual_seed(5)
    alpha = float(gin._draw_all(x, [1, 2, 2, 2, 1], (1, 3), draws)[-1])
    expected = gin.gin(x, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(method_figures.blend(x, alpha, (1, 3), 5), expected)


def test_pictures_of_the_method(tmp_path):
    figures.draw([], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "gin.png", "gin-steps.png", "round.png", "arms.png"
    }  # fmt: skip
    for path in tmp_path.iterdir():
        assert plt.imread(path).shape[1] == 1350
        assert (ROOT / "docs" / path.name).is_file()


# ------------------------------------------------------------------------------- pictures of a run

CONFIG = Config(width=2, depth=2, rounds=2, mri_cases=2)
LABELS = (
    ("mri-only",), ("fl", "1:1"), ("fl", "1:5"), ("fedgin", "1:1", 1.0), ("fedgin", "1:1", 0.5),
    ("fedgin", "1:5", 1.0), ("fedgin", "1:5", 0.5), ("ct-only", "1:1"),
)  # fmt: skip
DICE = {Training(s, *label): n / 10 + s / 100 for s in (1, 3) for n, label in enumerate(LABELS, 1)}


def keep(folder, config, dice):
    """Let a training end with this Dice on MRI of the own scanner, and others elsewhere."""
    modalities = ARMS[folder.training.arm].modalities
    found = {"mri": dice, "ct": dice + 0.005}
    folder.begin(dict.fromkeys(modalities, 2), torch.device("cpu"))
    rounds = [Round(n, {"mri": 2.5}, {m: found[m] / n for m in modalities}, 1.5) for n in (1, 2)]
    weights = UNet3D(1, 6, config.width, config.depth).state_dict()
    checkpoint = Checkpoint(2, weights, Best(0.5, 1, weights), tuple(rounds))
    folder.keep_round(checkpoint)
    folder.keep_model(checkpoint)
    for scanner, factor in (("own", 1.0), ("other", 0.5)):
        for modality, value in found.items():
            score = {"outcome": "scored", "dice": value * factor, "hd95": 1.0, "nsd": 1.0}
            hospital = Hospital(scanner, modality if scanner == "own" else "", (), (), ())
            case = PreparedCase(Volume("phantom16", modality, *[np.zeros(0)] * 4), None, [])
            folder.keep_scores(hospital, case, dict.fromkeys(config.organs, score))
    folder.finish(checkpoint)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run with two seeds, two ratios and two shares of GIN leaves."""
    config = dataclasses.replace(CONFIG, out=str(tmp_path_factory.mktemp("docs") / "run"))
    run_folder = RunFolder(config, list(ARMS))
    run_folder.open([])
    for training, dice in DICE.items():
        keep(run_folder.folder(training), config, dice)
    return Path(config.out)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_validation_shows_means_over_seeds_by_ratio(run):
    figure = figures.validation(figures.read_run(run))
    panels = {axis.get_title(): axis for axis in figure.axes}
    shown = {title: {line.get_label(): line for line in a.lines} for title, a in panels.items()}
    assert list(shown) == [f"{m}, at MRI : CT {r}" for r in ("1:1", "1:5") for m in ("MRI", "CT")]
    assert list(shown["CT, at MRI : CT 1:1"]) == ["ct-only", "fl", "fedgin p=1", "fedgin p=0.5"]
    assert list(shown["CT, at MRI : CT 1:5"]) == ["fl", "fedgin p=1", "fedgin p=0.5"]
    assert list(shown["MRI, at MRI : CT 1:5"]) == ["mri-only", "fl", "fedgin p=1", "fedgin p=0.5"]
    lines = shown["MRI, at MRI : CT 1:5"]
    assert list(lines["fl"].get_xdata()) == [1, 2]
    assert list(lines["fl"].get_ydata()) == pytest.approx([0.32, 0.16])  # 0.31 and 0.33; halves
    a, b = lines["fedgin p=1"], lines["fedgin p=0.5"]
    assert a.get_color() == b.get_color() != lines["fl"].get_color()
    assert a.get_linestyle() != b.get_linestyle()


def test_ratios_shows_means_and_deviations(run):
    figure = figures.ratios(figures.read_run(run))
    bars = {c.get_label(): c for c in figure.axes[0].containers}
    assert list(bars) == ["mri-only", "ct-only", "fl", "fedgin p=1", "fedgin p=0.5"]
    line, _, [spread] = bars["fl"]
    assert list(line.get_ydata()) == pytest.approx([0.22, 0.32])
    assert np.allclose(line.get_xdata(), [0, 1], atol=0.1)
    [low, high] = spread.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.02 / 2**0.5)  # 0.21 and 0.23
    assert np.allclose(bars["ct-only"][0].get_xdata(), [0], atol=0.1)
    assert list(bars["mri-only"][0].get_ydata()) == pytest.approx([0.12, 0.12])  # has no ratio


def test_predictions_shows_a_case_in_its_window_and_each_model_of_the_last_ratio(run):
    figure = figures.predictions(figures.read_run(run))
    titles = [axis.get_title() for axis in figure.axes]
    columns = ["target", "mri-only", "fl\n1:5", "fedgin\n1:5 p=1", "fedgin\n1:5 p=0.5"]
    mri, ct = "MRI phantom16\npercentiles 0.5…99.5", "CT phantom16\n−160…240 HU"
    assert titles == [mri, *columns, ct, *columns]
    for row, modality in enumerate(("mri", "ct")):
        image, labels = make_phantom(1, modality, 16)
        low, high = (-160, 240) if modality == "ct" else np.percentile(image, (0.5, 99.5))
        expected = (image.clip(low, high) - low) / (high - low)  # black is 0 and white is 1
        scan, target = figure.axes[6 * row : 6 * row + 2]
        black, white = scan.images[0].get_clim()
        shown = (np.asarray(scan.images[0].get_array()) - black) / (white - black)
        slices = [np.rot90(expected[:, :, z].T, 2) for z in range(32)]
        [z] = [z for z in range(32) if np.allclose(shown, slices[z], atol=1e-5)]
        assert np.array_equal(target.images[1].get_array(), np.rot90(labels[:, :, z].T, 2))


def test_draws_what_a_run_has_so_far_and_says_when_there_is_nothing(run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "run")

    def drawn(*args):
        for path in out.rglob("*.png"):
            path.unlink()
        capsys.readouterr()
        code = figures.main(list(map(str, args)))
        return code, {path.stem for path in out.rglob("*.png")}, capsys.readouterr().err

    for training in DICE:  # as if none were finished, and those of seed 3 in their training
        folder = out / training.folder
        (folder / "scores.csv").rename(folder / "testing.csv")
        if training.seed == 3:
            (folder / "model.pt").unlink()
    assert drawn(out, "--out", out / "new") == (0, {"validation", "predictions"}, "")
    for path in out.glob("*/model.pt"):
        path.unlink()
    assert drawn(out) == (0, {"validation"}, "")
    for path in out.glob("*/history.csv"):
        path.unlink()
    message = f"{out}: nothing to draw yet, as no round of the run is finished"
    assert drawn(out) == (2, set(), f"figures.py: {message}\n")
    assert "no run is there" in drawn(out / "new")[2]
    (out / "config.json").write_text('{"seeds": [42], "python": "3.11.7"}')  # by version 1
    assert "the version that made it must draw it" in drawn(out)[2]


def test_budget_shows_dice_against_steps_on_each_scanner(run, tmp_path):
    """Two runs, of which the longer one has Dice 0.1 higher but lacks a seed and an arm."""
    short = figures.read_run(run)
    scores = [
        {**score, "dice": score["dice"] + (0.1 if score["scanner"] == "own" else 0.05)}
        for score in short.scores
        if score["seed"] == 3 and score["arm"] != "ct-only"
    ]
    config = dataclasses.replace(short.config, rounds=6)
    figure = figures.budget(short._replace(config=config, scores=scores), short)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"{m}, {s} scanner" for s in ("own", "other") for m in ("MRI", "CT")]
    own, other = ({x.get_label(): x for x in figure.axes[i].lines} for i in (0, 2))
    assert set(own) == {text.get_text() for text in figure.legends[0].get_texts()}
    assert "ct-only" not in own
    assert list(own["mri-only"].get_xdata()) == [60, 180]
    assert list(own["mri-only"].get_ydata()) == pytest.approx([0.13, 0.23])  # seed 3
    assert list(other["mri-only"].get_ydata()) == pytest.approx([0.065, 0.115])
    assert figures.main([str(run), str(run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["budget.png"]
