"""Steps 2 and 3: batches, circles, balance, augmentation; the network and its weights."""

import hashlib
import http.server
import importlib
import math
import os
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18

from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

data = importlib.import_module("02_dataset")
network = importlib.import_module("03_model")
training = scripts.definitions("04_train")
CHOSEN = ResNet18_Weights.IMAGENET1K_V1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- step 2: items and batches


def test_item_is_film_label_and_row_and_carries_no_film_number(phantoms):
    dataset = data.MammogramDataset(phantoms, [7, 3])
    assert len(dataset) == 2
    film, label, row = dataset[1]
    assert film.dtype == torch.uint8 and film.shape == (1, 128, 72)
    assert torch.equal(film[0], torch.from_numpy(phantoms.films[3].copy()))
    assert (type(label), label, type(row), row) == (int, phantoms.labels["label"][3], int, 3)


def test_batches_cover_every_film_once_in_order(phantoms):
    rows = np.arange(len(phantoms.films))[::-1][:21]
    loader = data.batches(data.MammogramDataset(phantoms, rows), 8)
    assert isinstance(loader, torch.utils.data.DataLoader) and len(loader) == 3
    films, labels, found = zip(*loader)
    assert [tuple(f.shape) for f in films] == [(8, 1, 128, 72)] * 2 + [(5, 1, 128, 72)]
    assert {f.dtype for f in films} == {torch.uint8}
    assert {x.dtype for x in labels + found} == {torch.int64}
    assert np.array_equal(torch.cat(found).numpy(), rows)
    assert np.array_equal(torch.cat(films)[:, 0].numpy(), phantoms.films[rows])
    assert torch.cat(labels).tolist() == phantoms.labels["label"].iloc[rows].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_every_batch_without_overlap_and_take_equally_many_steps(phantoms, size):
    dataset, orders = data.MammogramDataset(phantoms, np.arange(40, 3, -1)), []
    settings = training.Settings(batch_size=4)
    for seed in (0, 1):
        samplers = [
            torch.utils.data.RandomSampler(dataset, generator=generator(seed)) for _ in range(size)
        ]
        states = [
            SimpleNamespace(
                train_films=dataset, settings=settings, sampler=sampler, rank=rank, count=size
            )
            for rank, sampler in enumerate(samplers)
        ]
        steps = [[rows for _, _, rows in training.epoch_batches(state)] for state in states]
        assert [len(share) for share in steps] == [37 // (4 * size)] * size
        assert {len(rows) for share in steps for rows in share} == {4}
        together = torch.stack([torch.stack(share) for share in steps], 2).flatten().tolist()
        order = torch.randperm(37, generator=generator(seed))[: len(together)]
        assert together == dataset.rows[order].tolist(), "not dealt out film by film"
        orders.append(together)
    assert orders[0] != orders[1]


def test_films_are_a_read_only_memory_map_that_batches_copy(phantoms):
    assert isinstance(phantoms.films, np.memmap) and not phantoms.films.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        phantoms.films[0, 0, 0] = 1
    dataset, before = data.MammogramDataset(phantoms), phantoms.films[:2].copy()
    dataset[0][0].fill_(99)
    dataset.__getitems__([0, 1])[0].fill_(99)
    assert np.array_equal(phantoms.films[:2], before)


def test_circles_of_every_film_lie_on_its_map_and_nothing_else_does(phantoms):
    maps, known = data.MammogramDataset(phantoms).lesion_maps(range(len(phantoms.films)))
    assert maps.shape == (48, 2, 16, 9) and maps.dtype == torch.float32 and known.all() != known[0]
    ys, xs = (np.mgrid[:128, :72] + 0.5) // 8
    for n, image in enumerate(phantoms.labels["image"]):
        wanted, reach = np.zeros((2, 16, 9)), np.zeros((2, 16, 9))
        circles = phantoms.findings.dropna(subset=["canvas_radius"])
        for circle in circles[circles["image"] == image].itertuples():
            channel = int(circle.severity == "M")
            wanted[channel, int(circle.canvas_y / 8), int(circle.canvas_x / 8)] = 1
            distance = np.hypot(*(np.mgrid[:128, :72].T - [circle.canvas_y, circle.canvas_x]).T)
            touched = distance <= circle.canvas_radius + 6
            reach[channel, ys[touched].astype(int), xs[touched].astype(int)] = 1
        assert (maps[n].numpy() >= wanted).all(), f"{image}: a centre is not on its map"
        assert (maps[n].numpy() <= reach).all(), f"{image}: the map is wider than its circle"


def with_findings(phantoms, row, *circles, label=BENIGN):
    """Give a film other findings (severity, x, y, radius on the canvas) and another label."""
    labels = phantoms.labels.copy()
    labels.loc[row, "label"] = label
    columns = ["severity", "canvas_x", "canvas_y", "canvas_radius"]
    findings = pd.DataFrame(list(circles), columns=columns)
    findings.insert(0, "image", labels["image"][row])
    return phantoms._replace(labels=labels, findings=findings)


def test_small_circle_counts_exactly_the_pixel_of_its_centre(phantoms):
    changed = with_findings(phantoms, 5, ("M", 70.0, 126.0, 0.3), ("B", 8.2, 16.9, 1.0))
    maps, known = data.MammogramDataset(changed).lesion_maps([5])
    assert known.tolist() == [True]
    assert maps[0, 1].nonzero().tolist() == [[15, 8]]
    assert maps[0, 0].nonzero().tolist() == [[2, 1]]


def test_abnormal_film_without_usable_circle_is_unknown(phantoms):
    nothing, whole = (np.nan,) * 3, ("B", 30.0, 40.0, 9.0)
    for label, circles, expected in [
        (MALIGNANT, [("M", *nothing)], False),
        (BENIGN, [], False),
        (NORMAL, [], True),
        (BENIGN, [whole], True),
        (MALIGNANT, [whole, ("M", *nothing)], False),  # the circle is not the whole truth
        (MALIGNANT, [whole], False),  # a benign one cannot be why it is malignant
        (MALIGNANT, [whole, ("M", 30.0, 40.0, 9.0)], True),
    ]:
        changed = with_findings(phantoms, 5, *circles, label=label)
        maps, known = data.MammogramDataset(changed).lesion_maps([5])
        assert known.tolist() == [expected], (CLASS_NAMES[label], circles)
        assert (maps.sum() > 0) == (whole in circles)


# ---------------------------------------------------------------------- step 2: balance


def test_class_weights_make_classes_count_alike_with_mean_one():
    for labels in ([0] * 3 + [1] * 20 + [2] * 7, [1] * 5 + [2], [1, 1]):
        weights, counts = data.class_weights(torch.tensor(labels)), np.bincount(labels, minlength=3)
        assert weights[labels].mean().item() == pytest.approx(1)
        shares = (weights.numpy() * counts)[counts > 0]
        assert weights.dtype == torch.float32 and shares == pytest.approx(shares[0])
        assert (weights.numpy()[counts == 0] == 0).all()  # label smoothing asks for all classes
    logits, weights = torch.zeros(300, 3), data.class_weights(torch.tensor([0, 2] * 150))
    options = {"weight": weights, "label_smoothing": 0.1}
    loss = F.cross_entropy(logits, torch.tensor([0, 2] * 150), **options).item()
    assert loss == pytest.approx(np.log(3), rel=0.05)  # with a weight for normal it was 6.6


def test_sampler_draws_every_class_equally_often_and_as_many_films_as_there_are():
    labels = torch.tensor([0] * 6 + [1] * 50 + [2] * 14)
    sampler = data.balanced_sampler(labels, generator())
    epochs = [list(sampler) for _ in range(100)]
    assert {len(epoch) for epoch in epochs} == {70} and epochs[0] != epochs[1]
    shares = np.bincount(labels[np.concatenate(epochs)]) / 7000
    assert shares == pytest.approx(1 / 3, abs=0.03)  # five standard deviations
    drawn = np.bincount(np.concatenate(epochs), minlength=70)
    assert drawn.min() > 0, "a film is never drawn"


# ---------------------------------------------------------------------- step 2: augmentation


def blob(row, column, count=1, size=(128, 72), cell=1, width=6.0):
    """Draw a bright spot at a place of the canvas, on a grid of `cell` px: (count, 1, h, w)."""
    ys, xs = np.mgrid[: size[0] // cell, : size[1] // cell] * cell + (cell - 1) / 2
    spot = np.exp(-((ys - row) ** 2 + (xs - column) ** 2) / (2 * width**2))
    return torch.tensor(spot, dtype=torch.float32).expand(count, 1, *spot.shape).contiguous()


def centres(images, cell=1):
    """Return rows and columns, in canvas px, of the centres of mass of (n, 1, h, w)."""
    ys, xs = np.mgrid[: images.shape[2], : images.shape[3]] * cell + (cell - 1) / 2
    mass = images[:, 0].double().numpy()
    return [(mass * axis).sum((1, 2)) / mass.sum((1, 2)) for axis in (ys, xs)]


def test_strength_zero_is_the_identity():
    films, maps = torch.rand(3, 1, 40, 24), torch.rand(3, 2, 5, 3)
    same, same_maps = data.augment(films, torch.tensor([0, 1, 2]), generator(), 0, maps)
    assert torch.equal(same, films) and torch.equal(same_maps, maps)


def test_augmentation_depends_on_its_generator_alone():
    films, labels = torch.rand(4, 1, 40, 24), torch.tensor([0, 1, 2, 2])
    state = torch.get_rng_state()
    first, again, other = (data.augment(films, labels, generator(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(first[2], first[3], atol=0.05), "films of a batch vary alike"


def test_maps_travel_with_their_films():
    labels = torch.arange(60) % 3
    films, maps = blob(44, 27, 60), torch.cat([blob(44, 27, 60, cell=8)] * 2, 1)
    films, maps = data.augment(films, labels, generator(), 1.0, maps)
    assert films.shape == (60, 1, 128, 72) and maps.shape == (60, 2, 16, 9)
    for axis, film, lesion in zip("yx", centres(films), centres(maps[:, :1], cell=8)):
        assert np.ptp(film) > 6, f"nothing moves along {axis}"
        assert np.abs(film - lesion).max() < 2, f"film and map part along {axis}"


def test_black_stays_black_and_grey_values_stay_between_0_and_1():
    labels = torch.arange(30) % 3
    assert not data.augment(torch.zeros(30, 1, 40, 24), labels, generator(), 3.0)[0].any()
    films = data.augment(torch.rand(30, 1, 40, 24), labels, generator(), 3.0)[0]
    assert 0 <= films.min() and films.max() <= 1 and films.dtype == torch.float32


def test_rarer_classes_are_varied_more():
    moved = {}
    for label in range(3):
        films = data.augment(blob(63.5, 50, 400), torch.full((400,), label), generator())[0]
        row, column = centres(films)
        moved[label] = np.hypot(row - 63.5, column - 50).mean(), films.amax((1, 2, 3)).std().item()
    for rare in (BENIGN, MALIGNANT):
        assert np.greater(moved[rare], np.multiply(1.2, moved[NORMAL])).all(), moved


def test_about_half_of_the_films_are_turned_upside_down_and_none_sideways():
    row, column = centres(data.augment(blob(30, 15, 900), torch.arange(900) % 3, generator())[0])
    for label in range(3):
        assert (row[label::3] > 64).mean() == pytest.approx(0.5, abs=0.1)
    assert (column < 36).all()


def test_largest_rotation_scale_and_shift_are_as_declared(monkeypatch):
    def offsets(start, **strengths):
        alone = {getattr(data, kind): (limit,) * 3 for kind, limit in strengths.items()}
        monkeypatch.setattr(data, "MOVES", alone)
        monkeypatch.setattr(data, "GREYS", {})
        films = blob(63.5, start, 500, width=3)
        row, column = centres(data.augment(films, torch.zeros(500).long(), generator())[0])
        return row - 63.5, column - 35.5

    row, column = offsets(55.5, rotation=15.0)
    assert np.hypot(row, column) == pytest.approx(20, abs=0.3), "sheared"
    assert np.abs(np.degrees(np.arctan2(row, column))).max() == pytest.approx(15, abs=0.5)
    assert np.ptp(np.log(offsets(55.5, scale=0.15)[1] / 20)) == pytest.approx(0.3, abs=0.02)
    row, column = offsets(35.5, shift=0.2)  # a share of the canvas side
    found = [np.abs(row).max() / 128, np.abs(column).max() / 72]
    assert found == pytest.approx([0.2, 0.2], abs=0.01)


def test_sampling_grid_is_pytorchs_own():
    theta = torch.randn(4, 3, 3, generator=generator())
    library = torch.nn.functional.affine_grid(theta[:, :2], (4, 1, 20, 12), align_corners=False)
    assert torch.allclose(data.sampling_grid(theta, 20, 12), library, 0, 1e-6)


@pytest.mark.parametrize("sides, times", [((40, 24), 2), ((41, 26), 3), ((128, 72), 16)])
def test_reduced_films_are_pytorchs_own_means(sides, times):
    films = torch.randint(0, 256, (3, 1, *sides), generator=generator(), dtype=torch.uint8)
    films[0] = 255
    library = torch.nn.functional.avg_pool2d(films.float(), times).round().byte()
    assert torch.equal(data.block_means(films, times), library)


def test_new_kind_of_augmentation_is_one_function_and_one_line(monkeypatch):
    def noise(films, strength, generator):
        """Add noise of a standard deviation of `strength`."""
        return films + strength[:, None, None, None] * torch.randn(films.shape, generator=generator)

    monkeypatch.setattr(data, "MOVES", {})
    monkeypatch.setattr(data, "GREYS", {noise: (0.0, 0.1, 0.2)})
    films, maps, labels = torch.full((3, 1, 64, 40), 0.5), torch.rand(3, 2, 8, 5), torch.arange(3)
    varied, same = data.augment(films, labels, generator(), 0.5, maps)
    assert varied.std((1, 2, 3)).tolist() == pytest.approx([0, 0.05, 0.1], abs=0.005)
    assert torch.allclose(same, maps, 0, 1e-5)
    assert 0 <= data.augment(films, labels, generator(), 9.0)[0].min() < 0.01


# ---------------------------------------------------------------------- step 2: windows


def test_a_window_is_that_part_of_the_film_and_of_its_maps():
    films, maps = torch.rand(2, 1, 64, 40), torch.rand(2, 2, 16, 10)
    centres = torch.tensor([[-0.5, -0.5], [0.5, 0.25]])  # x, y: top left, and 3/8 further down
    labels = torch.tensor([0, 2])
    seen, of_maps = data.augment(films, labels, generator(), 0, maps, 0.5, centres)
    assert torch.allclose(seen[0], films[0, :, :32, :20], 0, 1e-4)
    assert torch.allclose(seen[1], films[1, :, 24:56, 20:], 0, 1e-4)
    assert torch.allclose(of_maps[0], maps[0, :, :8, :5], 0, 1e-4)
    varied, _ = data.augment(films, labels, generator(), 1.0, maps, 0.5, centres)
    assert varied.shape == seen.shape and (varied != seen).any()


def test_three_of_four_windows_hold_a_circle_and_all_lie_on_the_canvas_and_the_breast(phantoms):
    dataset = data.MammogramDataset(phantoms)
    height, width = phantoms.films.shape[1:]
    circled = [n for n, image in enumerate(dataset.images) if image in dataset.circles] * 40
    for rows, share in ((circled, 0.75), (np.arange(48).repeat(10), 0)):
        x, y = data.window_centres(dataset, rows, 0.5, generator()).numpy().T
        assert np.abs([x, y]).max() <= 0.5
        x, y = (x + 1) * width / 2 - 0.5, (y + 1) * height / 2 - 0.5
        hit = [any(abs(c.canvas_x - x[n]) < width / 4 and abs(c.canvas_y - y[n]) < height / 4
                   for c in dataset.circles.get(dataset.images[row], []))
               for n, row in enumerate(rows)]  # fmt: skip
        assert not share or share < np.mean(hit) < 0.98
        corners = zip(rows, (y - 31.5).astype(int), (x - 17.5).astype(int))
        lit = [(dataset.films[row, top : top + 64, left : left + 36] > 0).mean()
               for row, top, left in corners]  # fmt: skip
        assert np.mean(lit) > 0.6 and min(lit) > 0.05
    first, again = (data.window_centres(dataset, circled, 0.5, generator(1)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_window_is_called_what_its_circles_say():
    maps = torch.zeros(6, 2, 8, 8)
    maps[0, 0, :2, :2] = maps[1, 1, :2, :2] = maps[3, :, 4:, 4:] = maps[4, 1, 0, 0] = 1
    maps[5, 1] = 1
    labels = torch.tensor([BENIGN, MALIGNANT, MALIGNANT, BENIGN, MALIGNANT, MALIGNANT])
    known = torch.tensor([True] * 5 + [False])
    wanted = [BENIGN, MALIGNANT, NORMAL, MALIGNANT, NORMAL, MALIGNANT]
    assert data.window_labels(labels, maps, known).tolist() == wanted
    maps[5] = 0  # a film without a usable circle keeps its label
    assert data.window_labels(labels, maps, known)[5] == MALIGNANT


# ---------------------------------------------------------------------- step 3: the network


@pytest.fixture(scope="module")
def rgb():
    """Return torchvision's resnet18 with weights and statistics that are nothing special."""
    torch.manual_seed(1)
    model = resnet18(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.3, 0.8)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def weights_file(rgb, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(rgb.state_dict(), path)
    return path


def normalised(films):
    """Repeat grey films in three channels, normalised as torchvision's transforms do."""
    mean, std = CHOSEN.transforms().mean, CHOSEN.transforms().std
    return (films - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_grey_network_gives_what_rgb_resnet18_gives_on_three_equal_channels(
    rgb, weights_file, size
):
    films = torch.rand(3, 1, *size)
    model, name = network.build_model(str(weights_file), "plain")
    assert "resnet18.pth" in name
    model.eval()
    stems = []
    model.backbone.conv1.register_forward_hook(lambda module, films, stem: stems.append(stem))
    with torch.no_grad():
        model.head.weight.copy_(rgb.fc.weight[:3])
        model.head.bias.copy_(rgb.fc.bias[:3])
        logits, wanted = model(films)[0], rgb(normalised(films))[:, :3]
        wanted_stem = rgb.conv1(normalised(films))
    (stem,) = stems
    assert torch.allclose(stem[:, :, 3:-3, 3:-3], wanted_stem[:, :, 3:-3, 3:-3], 0, 1e-5)
    assert torch.allclose(stem, wanted_stem, 0, 1e-5), "wrong along the border"
    assert wanted.std() > 0.05 and torch.allclose(logits, wanted, 1e-5, 1e-5)


def test_state_dict_of_torchvision_goes_in_and_comes_out_unchanged(rgb, weights_file):
    model, _ = network.build_model(str(weights_file))
    given, back = rgb.state_dict(), model.backbone.state_dict()
    assert set(back) == {name for name in given if not name.startswith("fc.")}
    assert all(torch.equal(value, given[name]) for name, value in back.items())
    unfit = resnet18(weights=None).load_state_dict(back, strict=False)
    assert (unfit.missing_keys, unfit.unexpected_keys) == (["fc.weight", "fc.bias"], [])


def begun(weights_file, **changes):
    """Return the model and the optimiser that step 4 begins a fold with."""
    settings = training.Settings(device="cpu", **changes)
    return training.network_and_optimizer(settings, network.load_weights(str(weights_file)))


@pytest.mark.parametrize("recipe", ["plain", "lesion"])
@pytest.mark.parametrize("frozen", [-1, 1, 5])
def test_frozen_stages_do_not_change_in_training_nor_do_their_statistics(
    weights_file, frozen, recipe
):
    rates = {"lr": 0.01, "backbone_lr": 0.01}
    model, optimizer = begun(weights_file, recipe=recipe, freeze=frozen, **rates)
    before = {n: v.clone() for n, v in model.backbone.state_dict().items()}
    logits, _ = model.eval().train()(torch.rand(4, 1, 64, 64))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).backward()
    optimizer.step()
    after, trained = model.backbone.state_dict(), {n for n, _ in model.backbone.named_parameters()}
    count = {-1: 4, 1: 2, 5: 6}[frozen]
    stages = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    for names, free in [
        (trained, stages[count:]),
        (set(after) - trained, stages[count:] if recipe == "plain" else []),  # statistics
    ]:
        same = {n.split(".")[0] for n in names if after[n].equal(before[n])}
        changed = {n.split(".")[0] for n in names if not after[n].equal(before[n])}
        assert changed == set(free) and not same & changed


def test_parameter_groups_hold_every_trained_parameter_once_at_its_rate(weights_file):
    model, optimizer = begun(weights_file)
    head, backbone = optimizer.param_groups
    assert (head["lr"], backbone["lr"]) == (1e-3, 1e-4)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert len(head["params"]) + len(backbone["params"]) == len(names)
    assert {names.pop(id(p))[:8] for p in backbone["params"]} == {"backbone"}
    assert {names.pop(id(p))[:4] for p in head["params"]} == {"head", "skip", "film"}
    assert not names


@pytest.mark.parametrize("recipe, place", [("plain", 32), ("lesion", 16)])
def test_logits_and_maps_have_the_promised_shapes_at_any_size(recipe, place):
    model = network.build_model("none", recipe)[0].eval()
    for height, width in [(64, 64), (128, 72), (97, 130)]:
        with torch.no_grad():
            logits, maps = model(torch.rand(2, 1, height, width))
        assert logits.shape == (2, 3)
        assert maps.shape == (2, 3, math.ceil(height / place), math.ceil(width / place))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [0, 3, 5])
def test_frozen_features_of_validation_films_are_computed_once_and_say_the_same(
    frozen, dtype, monkeypatch
):
    torch.manual_seed(1)
    model, _ = network.build_model("none", freeze=frozen)
    films = np.random.default_rng(0).integers(0, 256, (7, 64, 32), np.uint8)
    dataset, calls, kept = data.MammogramDataset.of_canvases(films), [], []
    model.backbone.conv1.register_forward_hook(lambda *_: calls.append(1))
    wanted = network.predict(model, dataset, 3, dtype).logits
    for _ in range(3):
        assert network.predict(model, dataset, 3, dtype, kept=kept).logits.equal(wanted)
    assert len(kept) == (3 if frozen else 0) and len(calls) == (6 if frozen else 12)
    torch.nn.init.normal_(model.head.weight)  # what is not frozen may learn in between
    again = network.predict(model, dataset, 3, dtype).logits
    assert network.predict(model, dataset, 3, dtype, kept=kept).logits.equal(again)
    assert not again.equal(wanted)
    monkeypatch.setattr(network, "KEPT", 1000)
    kept = []
    network.predict(model, dataset, 3, dtype, kept=kept)
    assert not kept


# ---------------------------------------------------------------------- step 3: probabilities


def test_film_is_judged_beside_the_same_patients_other_breast_in_any_order():
    own = torch.randn(13, 3, generator=generator())
    patients = np.array(list("aabccddddeeef"))  # b and f have one film
    sides = np.array(["left", "right", "left", "", "", "left", "", "left", "left"]
                     + ["left", "left", "right", "right"])  # fmt: skip
    wanted = own.clone()  # without the other breast, or not knowing which it is: unchanged
    wanted[0], wanted[1] = 2 * own[0] - own[1], 2 * own[1] - own[0]
    wanted[9], wanted[10] = 2 * own[9] - own[11], 2 * own[10] - own[11]  # two films of a side
    wanted[11] = 2 * own[11] - (own[9] + own[10]) / 2
    found = network.beside_other_breast(own, {"patient": patients, "laterality": sides})
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, 0, 1e-6)
    numbers = np.unique(patients, return_inverse=True)[1]
    for seed in range(5):
        order = torch.randperm(13, generator=generator(seed)).numpy()
        for named in (patients, numbers):
            films = {"patient": named[order], "laterality": sides[order]}
            again = network.beside_other_breast(own[order], films)
            assert torch.allclose(again, wanted[order], 0, 1e-6)
        table = pd.DataFrame({"patient": patients, "laterality": sides}).iloc[order]  # odd index
        again = network.beside_other_breast(own[order].numpy(), table)
        assert torch.allclose(again, wanted[order], 0, 1e-6)


def test_a_film_more_suspicious_than_the_other_breast_gains_and_equal_films_keep_their_logits():
    own = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    for logits, wanted in [(own, [-1, 5]), (own[[1, 1]], [3, 3])]:
        both = {"patient": ["a", "a"], "laterality": ["right", "left"]}
        found = network.beside_other_breast(logits, both)
        assert found[:, MALIGNANT].tolist() == wanted and not found[:, :MALIGNANT].any()
        assert torch.equal(network.beside_other_breast(logits, both, 0), logits)
        double = network.beside_other_breast(logits, both, 2)[:, MALIGNANT]
        assert double.tolist() == [2 * w - x for w, x in zip(wanted, logits[:, MALIGNANT].tolist())]


def fitted(shared, sides=("left", "right")):
    """Return the weight and both temperatures of breasts that have so much in common."""
    torch.manual_seed(0)
    lesion, tissue = torch.randn(600, 2), shared * torch.randn(600, 1) + torch.randn(600, 2)
    labels = torch.where(lesion > 0.5, MALIGNANT, NORMAL).flatten()
    logits = (lesion + tissue).view(-1, 1) * torch.tensor([0.0, 0.0, 1.0])
    films = {"patient": np.repeat(np.arange(600), 2), "laterality": list(sides) * 600}
    prior = torch.ones(3) / 3
    alone = network.fit_temperature(logits, labels, prior)[1]
    return (*network.fit_calibration(logits, films, labels, prior), alone)


def test_the_other_breasts_weight_follows_what_breasts_have_in_common():
    weight, beside, alone = fitted(9)
    assert weight > 1 and beside != alone
    weight, beside, alone = fitted(0)
    assert weight == 0 and beside == alone
    assert fitted(9, ("left", ""))[0] == 1, "no breast has another"


def test_probabilities_follow_bayes_rule():
    likelihoods = torch.tensor([[0.50, 0.25, 0.25], [0.1, 0.1, 0.8]])
    prior = torch.tensor([0.2, 0.6, 0.2])
    wanted = [[1 / 3, 1 / 2, 1 / 6], [0.02 / 0.24, 0.06 / 0.24, 0.16 / 0.24]]
    p = network.probabilities(3 * likelihoods.log(), 3.0, prior)
    assert p == pytest.approx(np.array(wanted), abs=1e-6) and p.dtype == np.float32
    p = network.probabilities(3 * likelihoods.log().numpy() + 7, 3.0, torch.ones(3))
    assert p == pytest.approx(likelihoods.numpy(), abs=1e-6), "without a prior they are given back"


# ---------------------------------------------------------------------- step 3: weights


class Hostile:  # noqa: D101
    def __reduce__(self):  # noqa: D105
        return os.mkdir, ("marker",)


def damaged(kind, rgb, path):
    """Write a weights file that must not be taken."""
    state = rgb.state_dict()
    if kind == "not a number":
        state["layer1.0.conv1.weight"] = torch.full((64, 64, 3, 3), float("nan"))
    elif kind == "of another shape":
        state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    elif kind == "hostile":
        state["layer1.0.conv1.weight"] = Hostile()
    elif kind == "no state":
        state = [1, 2]
    torch.save(state, path, _use_new_zipfile_serialization=kind != "truncated, legacy format")
    whole = path.read_bytes()
    if kind.startswith("truncated"):
        path.write_bytes(whole[: 5000 if "legacy" in kind else len(whole) // 3])
    elif kind in ("empty", "a web page"):
        path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "kind, said",
    [
        ("not a number", "NaN.*layer1.0.conv1"),
        ("of another shape", "layer1.0.conv1"),
        ("truncated", "damaged"),
    ]
    + [("truncated, legacy format", "damaged"), ("empty", "damaged|code"), ("missing", "not there")]
    + [("hostile", "code"), ("a web page", "damaged|code"), ("no state", "expected a state dict")],
)
def test_bad_weights_file_is_named_and_refused(kind, said, rgb, home, monkeypatch):
    monkeypatch.chdir(home)
    damaged(kind, rgb, home / "mine.pth")
    with pytest.raises(UserError, match=said) as caught:
        network.build_model(str(home / "mine.pth"))
    assert "mine.pth" in str(caught.value)
    assert not (home / "marker").exists(), "the file ran code"


@pytest.fixture
def offline(home, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=OSError("no route to host")))


def test_auto_without_network_starts_at_random_and_cannot_be_overlooked(offline, capsys):
    model, name = network.build_model("auto")
    printed = capsys.readouterr().out
    assert "NO IMAGENET WEIGHTS (no route to host)" in printed and "RANDOM START" in printed
    assert CHOSEN.url in printed and "--weights FILE" in printed
    assert name.startswith("none") and model.frozen == 0


def test_imagenet_without_network_is_an_error_that_says_what_to_do(offline):
    with pytest.raises(UserError, match="no route to host.*--weights FILE"):
        network.build_model("imagenet")


@pytest.fixture
def served(home, weights_file, monkeypatch):
    """Serve the weights over loopback in place of torchvision's; return how to name them."""
    folder = home / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")

    def serve(digest=None):
        content = weights_file.read_bytes()
        name = f"resnet18-{digest or hashlib.sha256(content).hexdigest()[:8]}.pth"
        (folder / name).write_bytes(content)
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(CHOSEN.value, "url", url)
        return home / "torch" / "hub" / "checkpoints" / name

    yield serve
    server.shutdown()
    server.server_close()


def test_imagenet_weights_are_downloaded_once_and_used(served, rgb, monkeypatch):
    cached = served()
    model, name = network.build_model("imagenet")
    assert cached.is_file() and "ImageNet" in name and model.frozen == 3
    assert model.backbone.layer4[0].conv1.weight.equal(rgb.layer4[0].conv1.weight)
    monkeypatch.setattr(CHOSEN.value, "url", f"http://127.0.0.1:1/{cached.name}")  # nobody there
    assert "ImageNet" in network.build_model("auto")[1]


def test_download_with_a_wrong_checksum_is_refused_and_not_kept(served, capsys):
    cached = served("01234567")
    with pytest.raises(UserError, match="invalid hash value"):
        network.build_model("imagenet")
    assert network.build_model("auto")[1].startswith("none")
    assert "NO IMAGENET WEIGHTS" in capsys.readouterr().out
    assert not list(cached.parent.glob("*"))


@pytest.mark.parametrize("kind", ["hostile", "a web page", "truncated"])
def test_damaged_download_cache_is_named_and_runs_no_code(kind, served, rgb, home, monkeypatch):
    monkeypatch.chdir(home)
    cached = served()
    cached.parent.mkdir(parents=True)
    damaged(kind, rgb, cached)
    with pytest.raises(UserError, match=cached.name):
        network.build_model("imagenet")
    assert not (home / "marker").exists(), "the file ran code"
