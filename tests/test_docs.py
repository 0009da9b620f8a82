"""The pages keep their word, and the pictures show what they say."""

import ast
import contextlib
import dataclasses
import io
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import awkward_affine, save
from matplotlib import pyplot as plt

import figures
import gin
import method_figures
import nifti
import results
from config import Config
from data import NORMALIZATION, normalize
from phantom import ORGANS, phantom
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHOD = (ROOT / "docs/method.md").read_text(encoding="utf-8")
QUOTE = re.compile(
    r"From\s`([\w.]+)`\sin\s\[(\w+\.py)\]\(\.\./\2\):\n\n```python\n(.*?)```", re.DOTALL
)

# ------------------------------------------------------------------------------------------- pages


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
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found, slugs = [], Counter()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


def test_anchors_follow_githubs_rule(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# GIN's probability\n## The files, in `reading` order\n# A-b_c\n# A\n# A\n")
    expected = ["gins-probability", "the-files-in-reading-order", "a-b_c", "a", "a-1"]
    assert anchors(page) == expected


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


# ------------------------------------------------------------------------------------------ slices


def place(mask):
    """Show a slice of 0 and 1; how far right and down of the middle its ones are, in pixels."""
    figure, axis = plt.subplots(facecolor="black")
    method_figures.show(axis, np.asarray(mask, dtype=float), (0, 1))
    figure.canvas.draw()
    sides = {text.get_text(): text.get_window_extent() for text in axis.texts}
    frame = axis.get_window_extent()
    assert frame.x0 < sides["R"].x0 < frame.x0 + 40 < frame.x1 - 40 < sides["L"].x1 < frame.x1
    for text in axis.texts:
        text.remove()
    figure.canvas.draw()
    rows, columns = np.nonzero(np.asarray(figure.canvas.buffer_rgba())[:, :, 0] > 127)
    middle = (frame.x0 + frame.x1) / 2, figure.bbox.height - (frame.y0 + frame.y1) / 2
    plt.close(figure)
    return columns.mean() - middle[0], rows.mean() - middle[1]


@pytest.mark.parametrize("modality", ["ct", "mri"])
def test_a_phantoms_liver_is_on_the_pictures_left(modality):
    for index in range(3):
        _, labels = phantom(42, modality, index)
        at = {}
        for n, organ in enumerate(ORGANS, start=1):
            at[organ] = place(labels[:, :, (labels == n).sum((0, 1)).argmax()] == n)
        assert at["liver"][0] < -10
        assert at["spleen"][0] > 10
        assert at["gallbladder"][1] < at["kidneys"][1]  # kidneys lie at the back


@pytest.mark.parametrize(
    ("flips", "order"), [((1, 1, 1), [0, 1, 2]), ((-1, -1, 1), [0, 1, 2]), ((-1, 1, -1), [2, 0, 1])]
)
def test_a_scans_right_is_on_the_pictures_left_however_it_is_stored(flips, order, tmp_path):
    """Marked by world coordinates, which run to the patient's right, front and head."""
    affine, shape = awkward_affine((2, 2, 2), flips, order), (40, 40, 40)
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T
    right, front, _ = np.moveaxis(world - world.mean((0, 1, 2)), -1, 0)
    for name, mask in (("right", right > 10), ("front", front > 10)):
        save(tmp_path / f"{name}.nii.gz", mask.astype(np.float32), affine)
    to_right, to_front = (nifti.read_nifti(tmp_path / f"{n}.nii.gz") for n in ("right", "front"))
    assert place(to_right.voxels[:, :, 20])[0] < -10
    assert place(to_front.voxels[:, :, 20])[1] < -10


def test_blend_is_gin_for_the_alpha_that_gin_draws():
    x = torch.from_numpy(normalize(phantom(1, "ct", 0)[0], "ct"))[None, None]
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

LABELS = ("mri-only 1:1", "fl 1:1", "fedgin 1:1 p=1", "fedgin 1:1 p=0.5")
LABELS += ("fl 1:5", "fedgin 1:5 p=1", "fedgin 1:5 p=0.5")


def dice_of(label, seed, modality):
    """Some number between 0 and 1 that no two labels share."""
    return (LABELS.index(label) + 1) / 10 + seed / 100 + (0.005 if modality == "ct" else 0)


@pytest.fixture
def run(tmp_path):
    """What a run with two seeds, two ratios and two shares of GIN leaves."""
    config = Config(
        arms=("mri-only", "fl", "fedgin"), ratios=("1:1", "1:5"), seeds=(1, 3), width=2, depth=2,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    history, scores = ["seconds,arm,seed,round,loss,loss_ct,val_dice_ct,val_dice_mri"], []
    model_config = {f: getattr(config, f) for f in ("organs", "spacing", "patch", "width", "depth")}
    model = {"normalization": NORMALIZATION, **model_config}
    network = UNet3D(1, 6, 2, 2).state_dict()
    for seed in config.seeds:
        for label in LABELS:
            for n in (1, 2):
                ct, mri = (dice_of(label, seed, m) / n for m in ("ct", "mri"))
                ct = "" if label.startswith("mri-only") else ct
                history.append(f"1.5,{label},{seed},{n},2.5,2.5,{ct},{mri}")
            for modality in ("mri", "ct"):
                score = {"outcome": "scored", "dice": dice_of(label, seed, modality)}
                organs = {organ: {**score, "hd95": 1.0, "nsd": 1.0} for organ in config.organs}
                about = {"seed": seed, "arm": label, "hospital": modality, "scanner": "own"}
                about["modality"] = modality
                scores.append({**about, "case": "phantom16", "scores": organs})
            checkpoint = folder / results.model_path(config, label, seed).name
            torch.save({"model": model, "weights": network}, checkpoint)
    (folder / "history.csv").write_text("\n".join(history))
    (folder / "results.json").write_text(json.dumps({"results": scores}))
    return folder


def test_validation_shows_means_over_seeds_by_ratio(run):
    figure = figures.validation(figures.read_run(run))
    panels = {axis.get_title(): axis for axis in figure.axes}
    shown = {title: {line.get_label(): line for line in a.lines} for title, a in panels.items()}
    assert list(shown) == [f"{m}, at MRI : CT {r}" for r in ("1:1", "1:5") for m in ("MRI", "CT")]
    assert list(shown["CT, at MRI : CT 1:1"]) == ["fl", "fedgin p=1", "fedgin p=0.5"]
    lines = shown["MRI, at MRI : CT 1:5"]
    assert list(lines["fl"].get_xdata()) == [1, 2]
    assert list(lines["fl"].get_ydata()) == pytest.approx([0.52, 0.26])  # 0.51 and 0.53; halves
    a, b = lines["fedgin p=1"], lines["fedgin p=0.5"]
    assert a.get_color() == b.get_color() != lines["fl"].get_color()
    assert a.get_linestyle() != b.get_linestyle()
    plt.close(figure)


def test_ratios_shows_means_and_deviations(run):
    figure = figures.ratios(figures.read_run(run))
    bars = {c.get_label(): c for c in figure.axes[0].containers}
    assert list(bars) == ["mri-only", "fl", "fedgin p=1", "fedgin p=0.5"]
    line, _, [spread] = bars["fl"]
    assert list(line.get_ydata()) == pytest.approx([0.22, 0.52])
    assert np.allclose(line.get_xdata(), [0, 1], atol=0.1)
    [low, high] = spread.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.02 / 2**0.5)  # 0.21 and 0.23
    assert len(bars["mri-only"][0].get_xdata()) == 1
    plt.close(figure)


def test_predictions_shows_a_case_in_its_window_and_each_model_of_the_last_ratio(run):
    figure = figures.predictions(figures.read_run(run))
    titles = [axis.get_title() for axis in figure.axes]
    columns = ["target", "fl\n1:5", "fedgin\n1:5 p=1", "fedgin\n1:5 p=0.5"]
    mri, ct = "MRI phantom16\npercentiles 0.5…99.5", "CT phantom16\n−160…240 HU"
    assert titles == [mri, *columns, ct, *columns]
    for row, modality in enumerate(("mri", "ct")):
        image, labels = phantom(1, modality, 16)
        low, high = (-160, 240) if modality == "ct" else np.percentile(image, (0.5, 99.5))
        scan, target = figure.axes[5 * row : 5 * row + 2]
        assert scan.images[0].get_clim() == pytest.approx((low, high))
        shown = np.asarray(scan.images[0].get_array())
        [z] = [z for z in range(32) if np.array_equal(shown, np.rot90(image[:, :, z].T, 2))]
        assert np.array_equal(target.images[1].get_array(), np.rot90(labels[:, :, z].T, 2))
    plt.close(figure)


def test_draws_what_a_run_has_so_far_and_says_when_there_is_nothing(run, capsys):
    def drawn(*args):
        code = figures.main(list(map(str, args)))
        return code, {path.stem for path in run.rglob("*.png")}

    for path in run.glob("*seed3.pt"):
        path.unlink()
    (run / "results.json").unlink()
    assert drawn(run, "--out", run / "new") == (0, {"validation", "predictions"})
    for path in (*run.rglob("*.png"), *run.glob("*.pt")):
        path.unlink()
    assert drawn(run) == (0, {"validation"})
    (run / "validation.png").unlink()
    (run / "history.csv").unlink()
    capsys.readouterr()
    assert drawn(run) == (2, set())
    message = f"{run}: nothing to draw yet, as no round of the run is finished"
    assert capsys.readouterr().err == f"figures.py: {message}\n"
    assert drawn(run / "new") == (2, set())
    assert "no run is there" in capsys.readouterr().err


def test_budget_shows_dice_against_steps_on_each_scanner(run, tmp_path):
    """Two runs, of which the longer one has Dice 0.1 higher; elsewhere both have half of it."""
    runs = []
    for rounds, more in ((20, 0.0), (60, 0.1)):
        first = figures.read_run(run)
        scores = []
        for score in first.scores:
            for scanner, factor in (("own", 1.0), ("other", 0.5)):
                dice = (next(iter(score["scores"].values()))["dice"] + more) * factor
                organs = {o: {**s, "dice": dice} for o, s in score["scores"].items()}
                scores.append({**score, "scanner": scanner, "scores": organs})
        config = dataclasses.replace(first.config, rounds=rounds, local_steps=5)
        runs.append(first._replace(config=config, scores=scores))
    for one, seed in zip(runs, (8, 9), strict=True):  # seeds that the other run has not
        one.scores.append({**one.scores[0], "arm": "ct-only", "seed": seed})
    figure = figures.budget(*runs[::-1])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"{m}, {s} scanner" for s in ("own", "other") for m in ("MRI", "CT")]
    own, other = ({x.get_label(): x for x in figure.axes[i].lines} for i in (0, 2))
    assert "ct-only" not in own
    assert "ct-only" not in [text.get_text() for text in figure.legends[0].get_texts()]
    line = own["mri-only 1:1"] if "mri-only 1:1" in own else own["mri-only"]
    assert list(line.get_xdata()) == [100, 300]
    low, high = line.get_ydata()
    assert high - low == pytest.approx(0.1)
    assert list(other["mri-only"].get_ydata()) == pytest.approx([low / 2, high / 2])
    plt.close(figure)
    code = figures.main([str(run), str(run), "--out", str(tmp_path / "out")])
    assert (code, [path.name for path in (tmp_path / "out").iterdir()]) == (0, ["budget.png"])
