"""The pages keep their word, and the pictures show what they say."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import monai.data
import monai.transforms
import numpy as np
import pytest
import torch
from conftest import write_totalsegmentator
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader, TensorDataset

import fedgin
import figures
import gin
import method_figures
from data import normalize
from fedgin import ARMS
from scans.cases import PreparedCase
from scans.phantom import make_phantom
from study import tables
from study.config import VERSION, Checkpoint, Config, Training
from study.hospitals import PHANTOM_SPLITS, Hospital
from study.results import RunFolder
from unet3d import UNet3D

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_readmes_snippet_for_a_data_loader_redraws_a_quarter_of_the_images():
    snippet, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 4
    loader = DataLoader(TensorDataset(torch.randn(80, 1, 8, 8, 8), torch.zeros(80)), batch_size=4)
    seen = []
    torch.manual_seed(1)
    exec(snippet, {"loader": loader, "step": lambda images, labels: seen.append(images)})
    before = torch.cat([images for images, _ in loader])
    assert 10 <= (torch.cat(seen) != before).flatten(1).any(1).sum() <= 30


def test_readmes_snippet_for_monai_redraws_a_quarter_of_the_images():
    _, snippet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) <= 3
    names = {"load": monai.transforms.Identityd("image")}
    exec(snippet, names)
    transform = names["transform"].set_random_state(1)
    plain, affine = torch.randn(1, 8, 8, 8), torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    loaded = monai.data.MetaTensor(plain, affine=affine, meta={"name": "s1"})  # as LoadImaged gives
    torch.manual_seed(5)
    expected = gin.gin(plain[None])[0]
    for image in (plain, loaded):
        changed = 0
        for _ in range(80):
            case = {"image": image.clone(), "label": torch.ones(1, 8, 8, 8)}
            torch.manual_seed(5)
            redrawn = transform(case)
            found = torch.as_tensor(redrawn["image"])
            changed += not torch.equal(found, plain)
            assert torch.equal(found, plain) or torch.equal(found, expected)
            assert torch.equal(case["image"], image)
            assert redrawn["label"] is case["label"]
        assert 10 <= changed <= 30
    assert torch.equal(redrawn["image"].affine, affine.double())
    assert redrawn["image"].meta["name"] == "s1"


def test_a_slice_is_seen_from_the_feet():
    """Its indices run to the patient's right and front: right is on the left, the front is up."""
    axis, image = plt.figure().subplots(), np.arange(12.0).reshape(3, 4)
    method_figures.show(axis, image, (0, 1))
    method_figures.mark_sides(axis)
    rows = axis.images[0].get_array()
    assert (rows[0, 0], rows[0, -1], rows[-1, 0]) == (image[-1, -1], image[0, -1], image[-1, 0])
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert left < right and top < bottom  # columns run right, and rows down
    places = {"R": (0.05, 0.5), "L": (0.95, 0.5)}
    assert {text.get_text(): text.get_position() for text in axis.texts} == places
    assert all(text.get_transform() == axis.transAxes for text in axis.texts)


def test_blend_is_gin_for_the_alpha_that_gin_draws():
    x = torch.from_numpy(normalize(make_phantom(1, "ct", 0)[0], "ct"))[None, None]
    alpha = float(method_figures.draw_network(x, 5)[-1])
    expected = gin.gin(x, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(method_figures.blend(x, alpha, (1, 3), 5), expected)


def test_pictures_of_the_method_and_of_scans(ct_folder, tmp_path):
    mri_folder = write_totalsegmentator(tmp_path / "mri", "mri", 1)
    scans = [str(folder / "s0000") for folder in (ct_folder, mri_folder)]
    for args in ([], ["--scans", *scans]):
        assert figures.main([*args, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gin.png", "gin-steps.png", "round.svg", "arms.svg"}
    assert [name for name in names if not (ROOT / "docs" / name).is_file()] == []


def test_the_differences_from_the_paper_stand_where_the_table_says():
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", METHOD, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 17))
    for _, places in rows:
        found = re.findall(r"`([\w/]+\.py)`, `([\w.]+)`", places)
        assert len(found) == places.count(".py")
        for file, function in found:
            assert source_of(file, function)


def test_the_tables_of_real_scans_are_made_from_their_scores():
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    scores = figures.read_scores(ROOT / "docs/real_scans.csv")
    organs = list(dict.fromkeys(score["organ"] for score in scores))
    assert len(scores) == 7 * 3 * (10 + 16) * len(organs)  # trainings, seeds, test cases, organs
    surfaces_and_organs = tables.tables(scores, organs).split("\n\n")[1:]
    for table in [*tables.screen(scores, organs).split("\n\n"), *surfaces_and_organs]:
        assert table in results
    for modality, words in (("mri", "ahead of `fl` on MRI by"), ("ct", "behind it on CT by")):
        by_seed = [[s for s in scores if s["seed"] == seed] for seed in (1, 2, 3)]
        pairs = [
            (figures.of_arm(s, "fedgin", 0.25, "1:5"), figures.of_arm(s, "fl", None, "1:5"))
            for s in by_seed
        ]
        first, second, third = (
            f"{abs(tables.paired_difference(*pair, modality)[1]):.3f}" for pair in pairs
        )
        assert f"{words} {first}, {second} and {third}" in " ".join(results.split())


def test_a_study_of_your_own_is_laid_out_as_the_page_says(tmp_path, monkeypatch, capsys):
    scans = (ROOT / "docs/scans.md").read_text(encoding="utf-8")
    layout, table, line = re.findall(
        r"```\w+\n(.*?)```", scans[scans.index("## A study of your own") :], re.DOTALL
    )[:3]
    names = re.findall(r"^data/(ct|mri)/(s\d+)/(.*)$", layout, re.MULTILINE)
    organs = {file.split("/")[1].split(".")[0] for _, _, file in names if "/" in file}
    ids = [row.split(",")[0] for row in table.splitlines()[1:]]
    for modality in ("ct", "mri"):
        root = write_totalsegmentator(tmp_path / "data" / modality, modality, 3, organs=organs)
        for i, id_ in enumerate(ids):
            (root / f"s{i:04d}").rename(root / f"x{id_}")
        for id_ in ids:
            (root / f"x{id_}").rename(root / id_)
        (root / "meta.csv").write_text(table)
    assert all((tmp_path / "data" / m / id_ / file).is_file() for m, id_, file in names)
    monkeypatch.chdir(tmp_path)
    tiny = "--width 2 --depth 2 --patch 16 --spacing 18 --rounds 1 --local-steps 1 --out run"
    assert fedgin.main([*shlex.split(line)[2:], *tiny.split()]) == 0
    scores = figures.read_scores(tmp_path / "run/scores.csv")
    assert {(s["hospital"], s["case"]) for s in scores} == {("ct", ids[-1]), ("mri", ids[-1])}
    assert {score["organ"] for score in scores} == organs
    assert "All tables: run/results.md" in capsys.readouterr().out


# ------------------------------------------------------------------------------- pictures of a run

SEEN, UNSEEN = tables.SCANNERS
LABELS = (
    ("mri-only",), ("fl", "1:1"), ("fl", "1:5"), ("fedgin", "1:1", 1.0), ("fedgin", "1:1", 0.25),
    ("fedgin", "1:5", 1.0), ("fedgin", "1:5", 0.25),
)  # fmt: skip
DICE = {Training(s, *label): n / 10 + s / 100 for s in (1, 3) for n, label in enumerate(LABELS, 1)}


def keep(folder, config, dice):
    """Let a training end with this Dice on MRI of the seen scanner, and others elsewhere."""
    folder.begin({"mri": 2}, torch.device("cpu"))
    weights = UNet3D(1, 6, config.width, config.depth).state_dict()
    folder.keep_model(Checkpoint(1, weights, 1, 0.5, weights))
    for name, share in (("mri", 1.0), ("", 0.5)):  # the unseen scanner is not a hospital's
        for modality, value in (("mri", dice), ("ct", dice + 0.005)):
            score = {"outcome": "scored", "dice": value * share, "hd95": 1.0, "nsd": 1.0}
            case = PreparedCase("16", modality, None, None, None, None)
            scores = dict.fromkeys(config.organs, score)
            folder.keep_scores(Hospital(name or "unseen", name, (), (), ()), case, scores)
    folder.finish(Checkpoint())


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a run with two seeds, two ratios and two probabilities of GIN leaves."""
    out = tmp_path_factory.mktemp("docs") / "run"
    config = Config(width=2, depth=2, rounds=1, mri_cases=2, out=str(out))
    run_folder = RunFolder(config, list(DICE), list(ARMS))
    run_folder.open({})
    for training, dice in DICE.items():
        keep(run_folder.folder(training), config, dice)
    run_folder.report()
    return out


@pytest.fixture
def run(left, monkeypatch):
    monkeypatch.setattr(figures, "REAL_SCANS", left / "scores.csv")
    yield left
    plt.close("all")


def test_ratios_shows_means_and_deviations(run):
    figure = figures.ratios(figures.read_run(run))
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels) == [f"{m}, {s} scanner" for s in (SEEN, UNSEEN) for m in ("MRI", "CT")]
    for scanner, share in ((SEEN, 1.0), (UNSEEN, 0.5)):
        axis = panels[f"MRI, {scanner} scanner"]
        labels = [text.get_text() for text in axis.texts]
        assert labels == ["mri-only", "fl", "fedgin p=1", "fedgin p=0.25"]
        lines = dict(zip(labels, axis.containers, strict=True))
        line, _, [spread] = lines["fl"]
        assert list(line.get_ydata()) == pytest.approx([0.22 * share, 0.32 * share])
        assert np.allclose(line.get_xdata(), [0, 1], atol=0.15)
        [low, high] = spread.get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * 0.02 * share / 2**0.5)  # of 0.21 and 0.23
        assert list(lines["mri-only"][0].get_ydata()) == pytest.approx([0.12 * share] * 2)


def test_probability_shows_dice_against_p_on_phantoms_and_on_scans(run):
    figure = figures.probability(figures.read_run(run))
    assert [axis.get_title() for axis in figure.axes] == ["phantoms", "real scans"]
    for axis in figure.axes:
        shown = {line.get_label(): line[0] for line in axis.containers}
        for name, more in (("MRI", 0.0), ("CT", 0.005)):
            assert list(shown[name].get_xdata()) == [0, 0.25, 1]
            dices = [0.32 + more, 0.72 + more, 0.62 + more]
            assert list(shown[name].get_ydata()) == pytest.approx(dices)


def test_predictions_shows_a_case_and_three_models_of_the_first_seed(run):
    axes = figures.predictions(figures.read_run(run)).axes
    titles = [axis.get_title().split("\n")[0] for axis in axes]
    columns = ["reference", "mri-only", "fl 1:5", "fedgin 1:5 p=0.25"]
    assert titles == ["MRI", *columns, "CT", *columns]
    for modality, (scan, reference) in (("mri", axes[:2]), ("ct", axes[5:7])):
        [(image, z)] = [
            (normalize(image, modality), z)
            for image, labels in (make_phantom(1, modality, n) for n in PHANTOM_SPLITS["test"])
            for z in range(32)
            if np.array_equal(reference.images[1].get_array(), np.rot90(labels[:, :, z].T, 2))
        ]
        assert np.array_equal(scan.images[0].get_array(), np.rot90(image[:, :, z].T, 2))
        assert scan.images[0].get_clim() == pytest.approx(tuple(np.percentile(image, (0.5, 99.5))))


def test_draws_what_a_run_has_so_far_and_says_when_there_is_nothing(run, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / "run")

    def drawn(path):
        code = figures.main([str(path), "--out", str(tmp_path / "drawn")])
        names = {each.name for each in tmp_path.glob("drawn/*")}
        shutil.rmtree(tmp_path / "drawn", ignore_errors=True)
        return code, names, capsys.readouterr().err

    assert drawn(out) == (0, {"ratios.svg", "probability.svg", "predictions.png"}, "")
    for path in out.glob("*/scores.json"):
        path.rename(path.with_name("testing.json"))
    assert drawn(out) == (0, {"predictions.png"}, "")
    for path in out.glob("*/model.pt"):
        path.unlink()
    message = f"{out}: nothing to draw yet, because no training has come far enough"
    assert drawn(out) == (2, set(), f"figures.py: {message}\n")
    assert "holds no run" in drawn(out / "new")[2]
    (out / "config.json").write_text('{"seeds": [42], "python": "3.11.7"}')  # by version 1
    assert "config.json: cannot be read" in drawn(out)[2]
