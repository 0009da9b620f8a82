"""docs/recipes.md: every recipe runs as it stands, for a round on phantoms."""

import contextlib
import dataclasses
import io
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_totalsegmentator
from torch.utils.data import DataLoader, Dataset

from federated import train_client
from gin import GIN

PAGE = (Path(__file__).parent.parent / "docs/recipes.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(section, names, old="", new=""):
    """Execute a section's code after the page's first lines; return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks(SECTIONS[section]):
            exec(block.replace(old, new), names)
    return printed.getvalue()


@pytest.fixture(scope="module")
def begun():
    [first, *_] = blocks(PAGE)
    tiny = first.replace('"complete")', '"complete", rounds=1, local_steps=1, width=2, depth=2)')
    assert tiny != first
    names = {}
    exec(tiny, names)
    return names


@pytest.fixture
def names(begun):
    return dict(begun)


def test_another_augmentation_in_gins_place(names):
    plain = names["make_clients"](names["config"], names["fl"], names["everyone"])
    assert run("Another augmentation in GIN's place", names).startswith("1 {'mri': 0.")
    for name, client in names["clients"].items():
        [(images, (labels, _))], [(again, _)] = client.batches(1), client.batches(1)
        [(before, (target, _))] = plain[name].batches(1)
        assert torch.equal(labels, target)
        assert torch.equal(again, images)
        assert not torch.allclose(images, before)
        assert torch.allclose(images.amax((2, 3, 4)), before.amax((2, 3, 4)), atol=1e-5)


def test_a_spatial_augmentation_moves_labels_with_images(names):
    assert run("A spatial augmentation beside GIN", names).startswith("1 {'mri': 0.")
    draws = torch.Generator().manual_seed(0)
    ball = (torch.stack(torch.meshgrid(*[torch.arange(24.0) - 9] * 3, indexing="ij")) ** 2).sum(0)
    labels = (ball < 20).long().expand(64, -1, -1, -1)
    images, moved = names["turned"](labels[:, None].float(), labels, draws)
    untouched = (images[:, 0] - labels).abs().flatten(1).amax(1) < 1e-3
    assert 20 < untouched.sum() < 44  # half of them
    assert torch.equal(moved[untouched], labels[untouched])
    inside = (images[:, 0] > 0.5) != (moved == 1)  # up to a rim that is interpolated
    assert inside.float().mean() < 0.002
    sizes = (moved == 1).flatten(1).sum(1) / (labels == 1).flatten(1).sum(1)
    assert 1.25**-3 * 0.85 < sizes.min() < 0.75
    assert 1.3 < sizes.max() < 1.25**3 * 1.15


def test_fedprox_holds_weights_near_those_of_the_server(names):
    assert run("FedProx in the place of local training", names).startswith("1 {'mri': ")

    def distance(train):
        model = names["make_model"](names["config"], seed=42)
        start = {key: w.clone() for key, w in model.state_dict().items()}
        client = names["make_clients"](names["config"], names["fl"], names["everyone"])["ct"]
        batches = [batch for round_ in range(1, 9) for batch in client.batches(round_)]
        train(model, batches, client.loss_function, lr=1e-2)
        return sum(float((w - start[k]).pow(2).sum()) for k, w in model.state_dict().items())

    plain = distance(names["train_locally"])
    free, held = (distance(partial(names["fedprox"], mu=mu)) for mu in (0.0, 10.0))
    assert free == pytest.approx(plain, rel=1e-6)
    assert held < 0.8 * plain


def test_norms_stay_with_their_hospital(names):
    assert len(run("Normalization that stays with its modality", names).splitlines()) == 2
    modules, own = names["model"].named_modules(), names["own"]
    owners = [name for name, module in modules if isinstance(module, torch.nn.GroupNorm)]
    norms = {f"{name}.{kind}" for name in owners for kind in ("weight", "bias")}
    assert set(own["mri"]) == set(own["ct"]) == norms
    assert any(not torch.equal(own["mri"][key], own["ct"][key]) for key in norms)


def test_another_network(names):
    assert run("Another network", names).startswith("1 {'mri': ")


def test_a_folder_layout_of_ones_own(names, tmp_path, monkeypatch):
    source = write_totalsegmentator(tmp_path / "source", "mri", 3, organs=("liver",))
    for folder in sorted(source.glob("s*")):
        mine = tmp_path / "my_scans" / folder.name
        mine.mkdir(parents=True)
        (folder / "mri.nii.gz").rename(mine / "T2.nii.gz")
        (folder / "segmentations/liver.nii.gz").rename(mine / "labels.nii.gz")
    monkeypatch.chdir(tmp_path)
    run("Your own folder layout", names, "spacing=2.0", "spacing=9.0")
    [hospital] = names["everyone"]
    assert [len(part) for part in hospital[2:]] == [1, 1, 1]
    assert hospital.train[0].counts[1] > 100
    config = dataclasses.replace(names["config"], organs=("liver",))
    training = names["Training"](42, "mri-only")
    clients = names["make_clients"](config, training, [hospital])
    [last] = names["train_arm"](config, training, clients, hospital.val)
    assert last.history[0].val_dice["mri"] >= 0


def test_gin_in_a_flower_client(names):
    flwr = pytest.importorskip("flwr.app")
    run("GIN in a Flower ClientApp", names)
    model = names["make_model"](names["config"], seed=42)
    config, arrays = flwr.ConfigRecord({"server-round": 1}), flwr.ArrayRecord(model.state_dict())
    content = flwr.RecordDict({"arrays": arrays, "config": config})
    message = flwr.Message(content, dst_node_id=1, message_type="train")
    context = flwr.Context(1, 1, {"partition-id": 1}, flwr.RecordDict(), {})
    answer = names["app"](message, context)
    clients = names["make_clients"](names["config"], names["fedgin"], names["everyone"])
    train_client(model, clients["ct"], 1, lr=1e-3)
    found = answer.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(w, found[key]) for key, w in model.state_dict().items())
    assert answer.content["metrics"]["num-examples"] == 12


def test_gamma_leaves_a_patch_of_air_and_nan_is_blamed_on_its_maker(names):
    run("Another augmentation in GIN's place", names)
    images = torch.cat([torch.full((1, 1, 4, 4, 4), -1.5), torch.rand(1, 1, 4, 4, 4)])
    brightened, _ = names["gamma"](images, None, torch.Generator().manual_seed(0))
    assert torch.equal(brightened[0], images[0])
    assert not torch.allclose(brightened[1], images[1])
    assert brightened.isfinite().all()

    def broken(images, labels, draws):
        return images / 0, labels

    clients = names["augmented"](names["clients"], broken)
    with pytest.raises(FloatingPointError, match="^broken made NaN or infinite values$"):
        list(clients["mri"].batches(1))


class Redrawn(Dataset):
    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.layer(torch.linspace(-1, 1, 64).view(1, 1, 4, 4, 4))


@pytest.mark.parametrize("seed", [1, None])
def test_gin_takes_no_generator_in_the_workers_of_a_data_loader(seed):
    """With one, both workers draw alike, and again so in every epoch."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(Redrawn(GIN(generator=generator)), batch_size=None, num_workers=2)
    drawn = [image for _ in range(2) for image in loader]
    alike = [torch.equal(drawn[0], other) for other in drawn[1:]]
    assert alike == [seed is not None] * 3
