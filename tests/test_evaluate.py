"""Step 5 and the predictions of step 3: metrics, intervals, thresholds, maps, and a whole run."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import kernels
import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from conftest import PROJECT, bayes, beside, fitted, prepare_data, run_main
from PIL import Image
from sklearn import metrics as sk
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

step = scripts.definitions("05_evaluate")
data, network = step.data, step.network
P = step.PROBABILITIES
IMAGENET = ResNet18_Weights.IMAGENET1K_V1.transforms()
ALONE = ["alone_benign", "alone_normal", "alone_malignant"]
QUICK = {"weights": "none", "epochs": 1, "precision": "fp32", "device": "cpu", "freeze": 5}
FLAGS = ("--device", "cpu", "--precision", "fp32", "--resamples", "200", "--recall", "0.8")


def judged(label, seed=0, ties=False):
    """Make predictions better than chance, two films a patient, and a decision to recall."""
    p = np.exp(np.random.default_rng(seed).normal(size=(len(label), 3)) + 1.2 * np.eye(3)[label])
    p /= p.sum(1, keepdims=True)
    table = pd.DataFrame({"patient": np.arange(len(label)) // 2, "fold": 0, "label": label})
    table[P] = p.round(1) + 0.1 if ties else p
    return table.assign(predicted=p.argmax(1)), p[:, MALIGNANT] > 0.35


def answers(right, label):
    """Make predictions, one film a patient: right ones, and wrong ones of the next class."""
    table = pd.DataFrame({"patient": np.arange(len(right)), "fold": 0, "label": label})
    predicted = np.where(right, label, (label + 1) % 3)
    table[P] = np.eye(3)[predicted] * 0.7 + 0.1
    return table.assign(predicted=predicted)


def intervals(table, resamples=2000, seed=0):
    weights = step.patient_weights(table["patient"], table["fold"], resamples, seed)
    return step.summarise(step.measure(table, np.zeros(len(table), bool), weights))


def by_sklearn(table, recalled):
    y, predicted, p = table["label"].to_numpy(), table["predicted"], table[P].to_numpy()
    one, lesion, each = y == MALIGNANT, y != NORMAL, {"labels": range(3), "zero_division": 0}
    fpr, tpr, _ = sk.roc_curve(one, p[:, MALIGNANT], drop_intermediate=False)
    ratio, found = p[:, MALIGNANT] / (p[:, MALIGNANT] + p[:, BENIGN]), (recalled & one).sum()
    metrics = {
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced accuracy": sk.balanced_accuracy_score(y, predicted),
        "macro F1": sk.f1_score(y, predicted, average="macro", **each),
        "AUC malignant": sk.roc_auc_score(one, p[:, MALIGNANT]),
        "AUC abnormal": sk.roc_auc_score(lesion, 1 - p[:, NORMAL]),
        "AUC benign/malignant": sk.roc_auc_score(one[lesion], ratio[lesion]),
        "AUC macro": np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in range(3)]),
        "specificity at recall 0.95": 1 - fpr[tpr >= 0.95 - 1e-9][0],
        "average precision malignant": sk.average_precision_score(one, p[:, MALIGNANT]),
        "recall at the point": sk.recall_score(one, recalled),
        "specificity at the point": sk.recall_score(~one, ~recalled),
        "PPV at the point": sk.precision_score(one, recalled, zero_division=0),
        "NPV at the point": sk.precision_score(~one, ~recalled, zero_division=0),
        "films recalled per cancer found": recalled.sum() / found if found else 0,
    }
    for kind, score in (("recall", sk.recall_score), ("precision", sk.precision_score)):
        values = score(y, predicted, average=None, **each)
        metrics.update({f"{name} {kind}": value for name, value in zip(CLASS_NAMES, values)})
    return metrics


# ---------------------------------------------------------------------- metrics and intervals


@pytest.mark.parametrize("ties", [False, True])
def test_every_metric_equals_scikit_learns_also_on_repeated_films(ties):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        table, recalled = judged(rng.integers(0, 3, 80), seed, ties)
        counts = np.vstack([np.ones((1, 80), int), rng.integers(0, 4, (2, 80))])
        values = step.measure(table, recalled, counts.astype(np.float32))
        for n, count in enumerate(counts):
            wanted = by_sklearn(table.loc[table.index.repeat(count)], recalled.repeat(count))
            assert set(wanted) == set(values)
            for name in wanted:
                assert values[name][n] == pytest.approx(wanted[name], abs=1e-6), (name, n)


def test_film_that_is_surely_normal_spoils_no_metric():
    table, recalled = judged(np.arange(40) % 3)
    table.loc[0, P] = [0.0, 1.0, 0.0]  # a benign film
    assert np.isfinite(step.measure(table, recalled, np.ones((1, 40), np.float32))).all(axis=None)


def test_specificity_at_a_recall_is_read_off_scikit_learns_roc_curve():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scores, positive = rng.random(60).round(rng.integers(1, 9)), rng.random(60) < 0.4
        weights = rng.integers(0, 4, (4, 60)).astype(np.float32)
        for recall in (0.3, 0.5, 0.8, 0.95, 1.0):
            *_, found = step.ranked(scores, positive, weights, recall)
            for value, weight in zip(found, weights):
                fpr, tpr, _ = sk.roc_curve(
                    positive, scores, sample_weight=weight, drop_intermediate=False
                )
                assert value == pytest.approx(1 - fpr[tpr >= recall - 1e-9][0], abs=1e-5)
    weights[0, positive] = weights[1, ~positive] = 0  # nothing to find, or to pass by
    *_, found = step.ranked(scores, positive, weights, 0.8)
    assert np.isnan(found).tolist() == [True, True, False, False]


@pytest.mark.parametrize("k, n, tolerance", [(150, 200, 0.015), (36, 50, 0.03), (490, 500, 0.01)])
def test_interval_of_recall_is_near_wilsons_with_one_film_a_patient(k, n, tolerance):
    table = answers(np.arange(3 * n) % n < k, np.repeat([MALIGNANT, NORMAL, BENIGN], n))
    value, low, high = intervals(table).loc["malignant recall", ["value", "low", "high"]]
    assert value == pytest.approx(k / n)
    assert (low, high) == pytest.approx(step.wilson(k, n), abs=tolerance)


def test_intervals_cover_the_truth_about_95_times_in_100():
    covered = []
    for seed in range(200):
        right = np.random.default_rng(seed).random(60) < 0.8
        table = answers(right.repeat(2), np.arange(120) % 3)
        table["patient"] //= 2  # both films right or both wrong: film by film it would be 83
        low, high = intervals(table, 400, seed).loc["accuracy", ["low", "high"]]
        covered.append(low <= 0.8 <= high)
    assert 0.9 <= np.mean(covered) <= 0.985


def test_patients_are_resampled_not_films():
    single = answers(np.arange(60) % 4 > 0, np.arange(60) % 3)
    double = pd.concat([single, single], ignore_index=True)
    tables = single, double, double.assign(patient=np.arange(120))
    one, two, filmwise = ((t["high"] - t["low"])["accuracy"] for t in map(intervals, tables))
    assert two == pytest.approx(one) and two == pytest.approx(filmwise * math.sqrt(2), rel=0.15)
    weights = step.patient_weights(double["patient"], np.arange(120) % 5, 50, 1)
    assert (weights[0] == 1).all() and (weights[1:51, :60] == weights[1:51, 60:]).all()
    assert (weights[1:51].sum(1) == 120).all() and not np.array_equal(weights[1], weights[2])
    assert (weights[51:] == [np.arange(120) % 5 == fold for fold in range(5)]).all()


def test_2000_resamples_of_322_films_take_seconds():
    table, _ = judged(np.arange(322) % 3)
    start = time.perf_counter()
    assert intervals(table)["low"]["accuracy"] > 0.3
    assert time.perf_counter() - start < 10


def test_wilson_gives_known_values():
    newcombe = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}  # Stat. Med. 1998
    newcombe.update({(0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)})
    for (hits, n), (low, high) in newcombe.items():
        assert step.wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
        assert step.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_groups_count_abnormal_test_films_and_their_findings():
    labels = pd.DataFrame({"image": list("abcde"), "tissue": list("FFDDF")})
    findings = [("a", "CIRC", 25), ("b", "SPIC", 26), ("b", "CALC", np.nan), ("c", "SPIC", 120)]
    findings = pd.DataFrame([*findings, ("e", "SPIC", 9)], columns=["image", "type", "radius"])
    predictions = pd.DataFrame({"image": list("abcd"), "label": [0, 2, 2, 1]})  # e is no test film
    predictions["predicted"] = [NORMAL, BENIGN, MALIGNANT, BENIGN]
    groups = step.by_group(predictions, SimpleNamespace(labels=labels, findings=findings))
    found = {f"{g.group} {g.value}": tuple(g)[3:] for g in groups.itertuples()}
    wanted = {"finding CALC": (1, 1, 0), "finding CIRC": (1, 0, 0), "finding SPIC": (2, 1, 0.5)}
    wanted.update({"tissue D": (1, 1, 1), "tissue F": (2, 0.5, 0), "radius to 25 px": (1, 0, 0)})
    wanted.update({"radius 26 to 50 px": (1, 1, 0), "radius over 100 px": (1, 1, 1)})
    assert {name: row[:3] for name, row in found.items()} == wanted
    assert all(row[3:] == step.wilson(round(row[0] * row[1]), row[0]) for row in found.values())


# ---------------------------------------------------------------------- threshold, calibration


def test_threshold_is_the_highest_that_reaches_the_wanted_recall_on_its_own_patients():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores, positive = rng.random(30).round(rng.integers(1, 4)), rng.random(30) < 0.4
        positive[0], recall = True, rng.choice([0.01, 0.5, 0.8, 0.9, 0.95, 1])
        threshold, ranked = step.choose_threshold(scores, positive, recall), scores[positive]
        assert (ranked >= threshold).mean() >= recall - 1e-9
        assert all((ranked >= higher).mean() < recall for higher in ranked[ranked > threshold])
    ranked, positive = np.linspace(1, 0.04, 25), np.ones(25, bool)
    assert step.choose_threshold(ranked, ~positive, 0.95) == 0, "without positives all are recalled"
    assert step.choose_threshold(ranked[:8], positive[:8], 0.95) == ranked[7], "7.6 films are 8"
    for recall, needed in [(1.0, 25), (0.95, 24), (0.92, 23), (0.56, 14), (0.04, 1), (0.0, 1)]:
        assert step.choose_threshold(ranked, positive, recall) == ranked[needed - 1], recall


def test_calibration_errors_of_cases_done_by_hand():
    sure, third, most, half = [1.0, 0, 0], [1 / 3] * 3, [0.75, 0.25, 0], [0.55, 0.45, 0]
    two_bins = (0.125 + 1.125 + 2 * 0.405) / 4, (0.5 + 0.9) / 4
    cases = [([sure] * 4, [0] * 4, (0, 0)), ([sure] * 4, [1] * 4, (2, 1))]
    cases += [([third] * 3, [0, 1, 2], (2 / 3, 0)), ([most] * 4, [0, 0, 0, 1], (0.375, 0))]
    cases += [([most, most, half, half], [0, 1, 0, 0], two_bins)]
    for p, labels, wanted in cases:
        found = step.calibration_errors(np.array(p), np.array(labels))
        assert found == pytest.approx(wanted), (p, labels)


@pytest.mark.parametrize("factor", [0.1, 0.3, 4.0, 12.0])
def test_temperature_undoes_over_and_underconfidence_and_changes_no_prediction(factor):
    torch.manual_seed(0)
    fair, ones = 1.5 * torch.randn(2000, 3), torch.ones(3)
    for prior in (ones, torch.tensor([0.2, 0.65, 0.15])):
        labels = torch.multinomial(fair.softmax(1) * prior, 1)[:, 0]
        loss, temperature = network.fit_temperature(fair * factor, labels, prior)
        assert temperature == pytest.approx(factor, rel=0.1)
        wanted, least = fitted(fair * factor, labels, prior)
        assert (temperature, loss) == (pytest.approx(wanted, rel=6e-3), pytest.approx(least, 1e-4))
        before, after, naive = (
            network.probabilities(fair * factor, t, p)
            for t, p in [(1.0, prior), (temperature, prior), (temperature, ones)]
        )
        assert sk.log_loss(labels, after) < sk.log_loss(labels, before) - 0.01
        assert prior is ones or sk.log_loss(labels, after) < sk.log_loss(labels, naive) - 0.1
        assert (naive.argmax(1) == fair.argmax(1).numpy()).all()
        assert after == pytest.approx(bayes(fair * factor, temperature, prior), abs=1e-5)


# ---------------------------------------------------------------------- where the network looks


@pytest.mark.parametrize("mirrored", [False, True])
def test_bright_place_of_a_map_comes_back_to_its_place_on_the_film(mirrored):
    g, size = common.Geometry(200, 150, 11, 23, 160, 100, mirrored, 0.4), (64, 48)
    maps, (rows, columns) = np.zeros((3, 8, 6)), np.mgrid[:200, :150]
    maps[0, 2, 3] = maps[1, 5, 1] = maps[2, 6, 2] = 1
    for point, one in zip(step.peaks(maps, size), maps):
        film = common.canvas_on_film(one, g, size)
        centre = (film * columns).sum() / film.sum(), (film * rows).sum() / film.sum()
        assert common.film_to_canvas(*centre, g) == pytest.approx(point, abs=0.2)  # 0.5 px of film
    film = common.canvas_on_film(np.ones(size), g, size)
    assert film[11:171, 23:123].min() == 1 and film.sum() == 16000, "not black outside of the crop"


@pytest.mark.parametrize("radius, hit", [(15.9, False), (16.1, True)])
def test_pointing_game_hits_in_a_circle_and_half_a_place_beyond_and_misses_elsewhere(radius, hit):
    films, cams, places = np.zeros((3, 256, 128), np.uint8), *np.zeros((2, 3, 16, 8))
    films[:, :, :64], labels = 90, pd.DataFrame({"image": ["one", "two", "unusable"]})
    findings = labels.assign(type="CIRC", canvas_x=55.5, canvas_y=87.5)
    findings["canvas_radius"] = [radius, radius, np.nan]
    prepared = SimpleNamespace(films=films, labels=labels, findings=findings)
    cams[0, 15, 7] = cams[1, 5, 4] = places[0, 5, 3] = 1
    places[1, 5, 5] = 1  # two places, 32 px, from the centre
    reading = network.Reading(None, cams[::-1], places[::-1])
    turned = labels[::-1].reset_index(drop=True)
    points = step.pointing_game(turned, reading, prepared).set_index("image")
    assert points["cam"].to_dict() == {"one": False, "two": True}
    assert points["places"].to_dict() == {"one": True, "two": hit}
    inside = np.hypot(*(np.mgrid[:256, :64].T - [87.5, 55.5]).T) <= radius + 16
    assert points["chance"].tolist() == pytest.approx([inside.mean()] * 2)


def linear(layer, features):
    """Apply a linear layer to features (1, C, h, w) at every place."""
    return torch.einsum("kc,bchw->bkhw", layer.weight, features) + layer.bias[:, None, None]


@pytest.mark.parametrize(
    ("recipe", "shape", "top"),
    [("plain", (64, 96), 0), ("lesion", (64, 96), 4), ("lesion", (512, 576), 8)],
)
def test_logits_grad_cam_and_places_equal_an_independent_computation(recipe, shape, top):
    torch.manual_seed(2)
    model, _ = network.build_model("none", recipe)
    for layer in filter(None, (model.head, model.skip_head)):
        torch.nn.init.normal_(layer.weight, std=0.5)
        torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(model.film_bias)
    films = np.random.default_rng(0).random((6, *shape)) ** np.arange(1, 7)[:, None, None]
    dataset = data.MammogramDataset.of_canvases((films * 255).astype(np.uint8))
    predicted = network.predict(model, dataset).logits  # in training mode until now: no dropout
    reading = network.predict(model, dataset, 4, bar=common.Progress(6, ""), maps=True)
    assert (reading.cams > 0).any((1, 2)).sum() > 2 and predicted.std(0).max() > 0.1
    for n, film in enumerate(dataset.films):
        stages, maps, ways = [], [], []
        for way in (film, film[::-1].copy()):  # and upside down
            grey = torch.from_numpy(way)[None].float() / 255
            features = torch.stack([(grey - m) / s for m, s in zip(IMAGENET.mean, IMAGENET.std)], 1)
            for name, layer in model.backbone.named_children():
                if name in ("avgpool", "fc"):
                    break
                features = layer(features)
                if name == ("layer4" if recipe == "plain" else "layer3"):
                    features = features.detach().requires_grad_()  # the last that all places pass
                    stages.append(features)
            places = linear(model.head, features)
            if recipe == "lesion":
                places = F.interpolate(places, stages[-1].shape[2:], mode="bilinear")
                places = places + linear(model.skip_head, stages[-1])
            maps.append(places)
            pooled = places.mean((2, 3))[0]
            if recipe == "lesion":
                odds = (places - places[:, [NORMAL]])[0].flatten(1)
                pooled = odds.sort(1, descending=True).values[:, :top].mean(1)
            ways.append(pooled + model.film_bias)
        logits = (ways[0] + ways[1]) / 2
        lesion = max((BENIGN, MALIGNANT), key=lambda c: logits[c].item())
        logits[lesion].backward()
        cams = [F.relu((s.grad.mean((2, 3), keepdim=True) * s).sum(1))[0] for s in stages]
        places = [F.softmax(m[0, [NORMAL, lesion]], 0)[1] for m in maps]
        pairs = [(predicted, logits), (reading.logits, logits)]
        pairs += [(reading.cams, (cams[0] + cams[1].flip(0)) / 2)]
        pairs += [(reading.places, (places[0] + places[1].flip(0)) / 2)]
        if recipe == "plain":  # linear: Grad-CAM is the map of places without its bias
            of_head = [
                F.relu(m[0, lesion] - model.head.bias[lesion]) / m[0, 0].numel() for m in maps
            ]
            pairs.append((reading.cams, (of_head[0] + of_head[1].flip(0)) / 4))
        for found, wanted in pairs:
            assert found[n] == pytest.approx(wanted.detach().numpy(), rel=1e-3, abs=1e-3)


# ---------------------------------------------------------------------- a whole run


def command(*arguments):
    """Run step 5 in this process as its command line does; its variables are returned too."""
    script, out, err, status = str(PROJECT / "05_evaluate.py"), io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        with contextlib.redirect_stderr(err):
            try:
                variables = runpy.run_path(script, run_name="__main__")
            except SystemExit as end:  # its work is done
                status, variables = end.code or 0, {}
            except Exception:
                sys.excepthook(*sys.exc_info())
                status, variables = 1, {}
    ended = {"returncode": status, "stdout": out.getvalue(), "stderr": err.getvalue()}
    return SimpleNamespace(**{**variables, **ended})


def refusal(done):
    """Return the one message that a run of step 5 ended with."""
    assert done.returncode == 1 and re.fullmatch(r"\s*error: [^\n]+\n", done.stderr), done.stderr
    assert "unexpected" not in done.stderr and "Traceback" not in done.stdout
    return done.stderr


def taught(best, prepared):
    """Change a checkpoint as if its network had learnt something, so that its answers differ."""
    torch.manual_seed(best["fold"])
    model, kept = network.MammogramNet(), prepared.labels["image"].isin(best["validation"]["image"])
    model.load_state_dict(best["model"])
    for head in (model.head, model.skip_head):
        torch.nn.init.normal_(head.weight)
    logits = network.predict(model, data.MammogramDataset(prepared, np.flatnonzero(kept))).logits
    centre, spread = logits.mean(0), logits.std(0).mean()
    state = model.state_dict()
    for name in state:
        if not name.startswith("backbone."):
            state[name] /= spread
    state["film_bias"] -= centre / spread
    return {**best, "model": state}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train every fold on small phantoms, noting what is read, and evaluate in a process."""
    home, reads = tmp_path_factory.mktemp("evaluate"), []
    getitems, fold_parts = data.MammogramDataset.__getitems__, data.fold_parts
    predict = network.predict

    def noting_rows(dataset, numbers):
        reads[-1][1].update(dataset.rows[numbers].tolist())
        return getitems(dataset, numbers)

    def noting_fold(prepared, fold, *rest):
        reads.append((fold, set()))
        return fold_parts(prepared, fold, *rest)

    def answering(model, dataset, *rest, kept=None):  # right, but for the last film
        logits, answers = predict(model, dataset, *rest).logits, dataset.labels.clone()
        answers[-1] += 1 if answers[-1] < 2 else -1
        return network.Reading(logits - logits.mean(0) + 2 * torch.eye(3)[answers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(home / "data"))
        patch.setenv("BCD_RUNS_DIR", str(home / "runs"))
        small = {"patients": 24, "phantom_size": 128, "size": "64x64", "folds": 3}
        prepared = prepare_data(source="phantom", **small)
        with patch.context() as spying:
            spying.setattr(data.MammogramDataset, "__getitems__", noting_rows)
            spying.setattr(data, "fold_parts", noting_fold)
            spying.setattr(network, "predict", answering)
            run_main("04_train.py", run="cv", fold="all", **QUICK)
        trained = []
        for path in (home / "runs" / "cv").glob("fold-*/best.pt"):
            trained.append(torch.load(path, weights_only=True))
            torch.save(taught(trained[-1], prepared), path)
        done, folder = command(*FLAGS, "--run", "cv"), home / "runs" / "cv"
        assert done.returncode == 0, done.stderr
        table = pd.read_csv(folder / "predictions.csv", dtype={"patient": str})
        record, values = (common.read_json(folder / f"{n}.json") for n in ("settings", "metrics"))
        folds = step.load_folds(folder, record, "cpu")
        yield SimpleNamespace(
            folder=folder, reads=reads, prepared=prepared, done=done, table=table, record=record,
            values=values, folds=folds, trained=trained,
        )  # fmt: skip
        shutil.rmtree(home / "runs")  # checkpoints are large


def by_hand(fold, canvases, films=None):
    """Compute p from a checkpoint, of each film alone, or beside the other ones in `films`."""
    canvases = np.array(canvases)
    with torch.no_grad():
        ways = [
            torch.from_numpy(way.copy())[:, None] / 255 for way in (canvases, canvases[:, ::-1])
        ]
        logits = sum(fold.models[0](way)[0] for way in ways) / 2
    if films is not None:
        weight = fold.calibration["weight"]
        logits = beside(logits, films["patient"], films["laterality"], weight)
    return bayes(logits, fold.calibration["alone" if films is None else "beside"], fold.prior)


def threshold_by_hand(fold, recall, alone):
    """Choose a fold's threshold from the validation films in its checkpoint."""
    kept, labels = fold.validation, fold.validation["labels"].numpy()
    logits = kept["logits"].numpy()
    if not alone:
        logits = beside(logits, kept["patient"], kept["laterality"], fold.calibration["weight"])
    scores = bayes(logits, fold.calibration["alone" if alone else "beside"], fold.prior)[
        :, MALIGNANT
    ]
    ranked = np.sort(scores[labels == MALIGNANT])[::-1]
    return ranked[math.ceil(recall * len(ranked) - 1e-9) - 1] if len(ranked) else 0


def called(p, priors):
    """Return what films are called by probabilities (n, 3), a prior for each, at the default."""
    return np.array([np.argmax(row / prior**0.33) for row, prior in zip(p, np.asarray(priors))])


def priors_of(run):
    """Return the class frequencies of each prediction's fold, (n, 3)."""
    return np.array([next(f.prior.numpy() for f in run.folds if f.number == n)
                     for n in run.table["fold"]])  # fmt: skip


def test_evaluation_writes_the_files_of_the_contract(run):
    columns = "image patient fold label p_benign p_normal p_malignant predicted".split()
    assert list(run.table) == [*columns, *ALONE, "alone_predicted"] and len(run.table) == 48
    joined = run.table.merge(run.prepared.splits, on=["image", "patient", "fold"])
    assert len(joined.merge(run.prepared.labels, on=["image", "patient", "label"])) == 48
    for p in (run.table[ALONE].to_numpy(), run.table[P].to_numpy()):
        assert p.sum(1) == pytest.approx(1, abs=5e-6) and (p >= 0).all() and p.std(0).min() > 1e-3
    assert (run.table["predicted"] == called(p, priors_of(run))).all()
    alone = called(run.table[ALONE].to_numpy(), priors_of(run))
    assert (run.table["alone_predicted"] == alone).all() and (alone != run.table["predicted"]).any()
    named = {"source": "phantom", "weights": run.record["weights_used"], "seed": 0, "n": 48}
    assert run.values["split_seed"] == 0 and run.values["note"] == run.record["note"] == ""
    assert run.values["synthetic"] is True and {**run.values, **named} == run.values
    drawn = {f.stem: Image.open(f).size for f in (run.folder / "figures").glob("*.png")}
    assert set(drawn) >= {"confusion", "roc", "calibration", "groups", "gradcam", "places"}
    assert min(drawn.values()) > (300, 200) and not list(run.folder.rglob("*.part"))


def test_metrics_json_follows_from_predictions_csv_and_the_thresholds(run):
    limits = {t["fold"]: t["threshold"] for t in run.values["thresholds"]}
    recalled = (run.table["p_malignant"] >= run.table["fold"].map(limits) - 1e-6).to_numpy()
    wanted, found = by_sklearn(run.table, recalled), run.values["metrics"]
    assert recalled.any() and set(wanted) == set(found)
    found = {name: found[name]["value"] for name in found}
    found.update({f"{name} recall": run.values["recall_per_class"][name] for name in CLASS_NAMES})
    found.update({"accuracy": run.values["accuracy"], "macro F1": run.values["macro_f1"]})
    found["malignant recall"] = run.values["malignant_recall"]
    order = {"average precision malignant", "specificity at recall 0.95"}  # ties change them much
    for name in set(wanted) - order:
        if wanted[name]:  # scikit-learn says 0 where there is nothing to divide by
            rounding = 2e-3 if "AUC" in name else 1e-5  # six digits can make a tie
            assert found[name] == pytest.approx(wanted[name], abs=rounding), name
    confusion = sk.confusion_matrix(run.table["label"], run.table["predicted"], labels=range(3))
    assert run.values["confusion_matrix"] == confusion.tolist()


def test_report_loads_nothing_and_like_the_session_says_what_it_is(run):
    page, said = (run.folder / "report.html").read_text(encoding="utf-8"), run.done.stdout
    sources = re.findall(r"src=\"(.{5})", page)
    assert len(sources) == len(list((run.folder / "figures").glob("*.png"))) > 5
    assert set(sources) == {"data:"} and page.count("src=") == len(sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(|href=", page)
    for text in (page, said):
        assert common.DISCLAIMER in text and "SYNTHETIC PHANTOMS, n = 48" in text
    assert "<h2>shortcuts: what tells classes apart" in page
    assert re.search("^SYNTHETIC PHANTOMS: ", said, re.MULTILINE)
    assert "split seed 0, training seed 0, weights: none" in " ".join(said.split())


def test_every_film_is_predicted_by_the_model_that_never_saw_its_patient(run):
    rows = run.prepared.labels.reset_index().set_index("image").loc[run.table["image"], "index"]
    films = run.prepared.labels.iloc[rows.to_numpy()]
    for fold in run.folds:
        for columns, company in ((P, films), (ALONE, None)):
            p = by_hand(fold, run.prepared.films[rows.to_numpy()], company)
            far = np.abs(p - run.table[columns]).max(axis=1)
            tested = run.table["fold"] == fold.number
            assert far[tested].max() < 1e-4 < 1e-3 < far[~tested].mean(), columns
    assert np.abs(run.table[P].to_numpy() - run.table[ALONE]).max(axis=1).mean() > 0.03


def test_the_likeliest_class_stands_beside_the_decision(run):
    found, label = run.done.four_ways, run.table["label"]
    named = {
        "likeliest class": run.table[P].to_numpy().argmax(1),
        "beside the other breast": run.table["predicted"],
        "always normal": np.full(48, NORMAL),
    }
    for way, predicted in named.items():
        value = found[way, "value"]
        assert value["accuracy"] == pytest.approx(sk.accuracy_score(label, predicted), abs=1e-6)
        recall = sk.recall_score(label, predicted, average=None)
        assert value[[f"{c} recall" for c in CLASS_NAMES]].tolist() == pytest.approx(list(recall))
    kept = run.values["metrics_likeliest_class"]["accuracy"]["value"]
    assert kept == pytest.approx(found["likeliest class", "value"]["accuracy"])
    p, prior = np.array([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]), [0.2, 0.64, 0.16]
    for tempering, wanted in {0: [1, 1], 0.33: [1, 1], 0.5: [2, 1], 1: [2, 1]}.items():
        assert network.decide(p, prior, tempering).tolist() == wanted, tempering
    with pytest.raises(UserError, match="--tempering 2: expected 0 to 1"):
        step.Settings(tempering=2)


LAST = "Judged", "metrics.json"


def judged_anew(run, cells=LAST, **changes):
    """Return a console's variables after step 5, some changed and some cells run again."""
    names = {**vars(run.done), **changes}
    for title, code in kernels.split_cells(PROJECT / "05_evaluate.py"):
        if title.startswith(cells):
            exec(code, names)
    return names


def test_the_claim_about_mias_stands_beside_no_other_database(run):
    assert "claim" not in run.done.words
    record = {**run.record, "source_used": "mias"}
    words = judged_anew(run, judged_record=record, judged_run=common.runs_dir("other"))["words"]
    assert words["claim"].notna().sum() == 3 and list(words)[:-1] == list(run.done.words)


def test_table_of_the_other_breast_shows_both_ways_as_scikit_learn_has_them(run):
    predictions, found = run.done.predictions, run.done.four_ways
    names = step.DECIDED + step.RANKED
    assert "judged in four ways" in run.done.stdout and set(found.index) == set(names)
    pd.testing.assert_frame_equal(predictions[P + ALONE].astype(float), run.table[P + ALONE],
                                  rtol=0, atol=2e-6)  # fmt: skip
    for way, columns, alone in [
        ("film alone", ALONE, True),
        ("beside the other breast", P, False),
    ]:
        p = predictions[columns].to_numpy()  # six digits can make ties
        named = called(p, priors_of(run))
        table = run.table[["label"]].assign(predicted=named, **dict(zip(P, p.T)))
        limits = [threshold_by_hand(fold, 0.8, alone) for fold in run.folds]
        recalled = p[:, MALIGNANT] >= np.array(limits)[run.table["fold"]] - 1e-6
        wanted = by_sklearn(table, recalled)
        for name in names:
            value, low, high = found.loc[name, way]
            assert value == pytest.approx(wanted[name], abs=6e-4), (name, columns)
            assert low <= value <= high


def test_a_setting_changed_after_predict_mixes_no_old_figures_with_new_ones(run):
    changed = dataclasses.replace(run.done.settings, recall=0.5, tempering=1.0, resamples=7)
    folder = common.runs_dir("other")
    names = judged_anew(run, settings=changed, judged_run=folder)
    pd.testing.assert_frame_equal(names["four_ways"], run.done.four_ways)
    assert run.values["wanted_recall"] == 0.8 and run.values["resamples"] > 7
    assert common.read_json(folder / "metrics.json") == run.values


def test_thresholds_chosen_anew_are_not_mixed_with_older_figures(run):
    folder = common.runs_dir("other")
    chosen = step.operating_points(run.folds, 0.5)
    names = judged_anew(run, thresholds=chosen, judged_run=folder)
    pd.testing.assert_frame_equal(names["four_ways"], run.done.four_ways)
    assert common.read_json(folder / "metrics.json") == run.values
    names = judged_anew(run, ("Test metrics", *LAST), thresholds=chosen, judged_run=folder)
    assert common.read_json(folder / "metrics.json")["wanted_recall"] == 0.5


def test_predictions_sorted_or_filtered_in_the_console_keep_their_labels_and_maps(run):
    cells = "Test metrics", "Judged", "Confusion", "ROC", "Calibration", "The pointing", "metrics"
    for anew in (False, True):  # with the old numbers of their rows, and with new ones
        changed = run.done.predictions.sort_values("p_malignant", ignore_index=anew)
        names = judged_anew(run, cells, predictions=changed, judged_run=common.runs_dir("other"))
        options = {"check_dtype": False, "atol": 1e-6}
        for name in ("metrics", "four_ways", "report", "calibration", "pointing"):
            pd.testing.assert_frame_equal(names[name], getattr(run.done, name), obj=name, **options)
    changed = run.done.predictions[run.done.predictions["fold"] == 1]
    names = judged_anew(run, cells, predictions=changed, judged_run=common.runs_dir("other"))
    assert f"n = {len(changed)} films" in names["scope"] and "1 of 3 folds" in names["scope"]
    assert names["metrics"]["fold sd"].isna().all()
    assert (names["metrics"]["fold mean"] - names["metrics"]["value"]).abs().max() < 1e-6
    values = common.read_json(common.runs_dir("other") / "metrics.json")
    assert values["folds"] == [1] and values["resamples"] == run.values["resamples"]
    films = run.prepared.labels.set_index("image").loc[run.done.predictions["image"]]
    left = (films["laterality"] == "left").to_numpy()  # the other breast counts all the same
    changed = run.done.predictions[left].reset_index(drop=True)
    names = judged_anew(run, cells, predictions=changed, judged_run=common.runs_dir("other"))
    logits = network.beside_other_breast(run.done.reading.logits, films)[left.copy()]
    before = step.calibration_errors(logits.softmax(1).numpy(), changed["label"])
    assert names["calibration"]["before"].tolist() == pytest.approx(before, abs=1e-6)


def test_predictions_of_another_run_do_not_get_into_a_report(run):
    later = "Test metrics", "Judged", "Confusion", "ROC", "Calibr", "By group", "The point", "metr"
    for cell in later:
        with pytest.raises(NameError, match="is not defined"):
            judged_anew(run, ("The run and its folds", cell))


def test_a_network_that_was_stopped_is_named(run, capsys):
    step.load_folds(run.folder, run.record, "cpu")
    assert "was stopped" not in capsys.readouterr().err
    record = {**run.record, "schedule": {"whole": {"epochs": 9, "patience": 4}}}
    step.load_folds(run.folder, record, "cpu")
    done = len(pd.read_csv(run.folder / "fold-0" / "history.csv"))
    assert f"fold-0 was stopped after {done} epochs" in capsys.readouterr().err


def test_nothing_that_chooses_reads_a_test_patient(run):
    patients = run.prepared.splits.set_index("image")["patient"]
    assert [number for number, _ in run.reads] == [fold.number for fold in run.folds] == [0, 1, 2]
    for (number, rows), fold in zip(run.reads, run.folds):
        tested, kept = set(run.table.loc[run.table["fold"] == number, "patient"]), fold.validation
        assert len(rows) > 15 and not tested & set(patients.iloc[sorted(rows)])
        assert not tested & set(patients[kept["image"]])
        assert not tested & set(kept["patient"])
        assert len({len(part) for part in kept.values()}) == 1
        labels = kept["labels"].numpy()
        threshold = threshold_by_hand(fold, 0.8, alone=False)
        wanted = [number, threshold, (labels == MALIGNANT).sum(), len(labels), 0.8]
        assert list(run.values["thresholds"][number].values()) == pytest.approx(wanted, rel=1e-3)


def test_calibration_follows_from_the_validation_films_in_the_checkpoint(run):
    for fold, told in zip(run.folds, run.values["temperatures"]):
        best = torch.load(run.folder / f"fold-{fold.number}" / "best.pt", weights_only=True)
        kept, labels = best["validation"], best["validation"]["labels"].numpy()
        pair = (kept["logits"], kept["patient"], kept["laterality"])
        both = {weight: beside(*pair, weight) for weight in (0, 0.5, 1, 1.5, 2, 3)}
        losses = {weight: fitted(z, labels, best["prior"])[1] for weight, z in both.items()}
        weight = fold.calibration["weight"]
        assert losses[weight] == pytest.approx(min(losses.values()), rel=1e-4)
        for way, logits in {"alone": kept["logits"], "beside": both[weight]}.items():
            chosen, _ = fitted(logits, labels, best["prior"])
            assert fold.calibration[way] == pytest.approx(chosen, rel=6e-3)
            assert 0.1 < chosen < 19, "at a limit, where any fit ends"
        assert told == {"fold": fold.number, **fold.calibration}


def test_run_is_judged_on_its_own_films_folds_and_shuffled_labels_only(run):
    settings, labels = step.Settings(device="cpu", precision="fp32"), run.prepared.labels
    moved = run.prepared.splits.assign(fold=(run.prepared.splits["fold"] + 1) % 3)
    for other in (run.prepared._replace(fingerprint="0"), run.prepared._replace(splits=moved)):
        with pytest.raises(UserError, match="other films, labels or folds"):
            step.predict_run(run.folds, other, run.record, settings)
    record = {**run.record, "shuffle_labels": True}
    table, _ = step.predict_run(run.folds, run.prepared, record, settings)
    mixed = data.shuffled_labels(labels, run.record["seed"])
    assert (mixed != labels["label"]).any()
    assert dict(zip(table["image"], table["label"])) == dict(zip(labels["image"], mixed))


def test_shuffled_labels_are_named_with_every_figure_and_whatever_begins_with_them(run):
    values = {**run.record, "shuffle_labels": True}
    record = common.record_of(values, run.prepared._replace(note="labels edited"))
    assert record["note"] == "labels SHUFFLED for a leak test; labels edited"
    assert record["note"] in step.scope_of(run.table, run.folds, {**run.record, **record})
    folder = common.runs_dir("mixed")
    shutil.copytree(run.folder, folder)
    common.write_json({**record, "run": "mixed"}, folder / "settings.json")
    film = next((common.data_dir("phantom") / "raw").glob("*.pgm"))
    said = command(*FLAGS, "--run", "mixed", "--image", str(film)).stderr
    assert f"the run mixed was trained so: {record['note']}" in said
    best = {**run.trained[0], "record": {**record, "run": "mixed"}}
    torch.save(best, folder / "fold-0" / "best.pt")
    assert "labels SHUFFLED" in network.read_weights("mixed").name
    shutil.rmtree(folder)


def test_missing_unfinished_and_damaged_runs_end_with_one_message(run):
    assert re.search("nowhere.*cv", refusal(command("--run", "nowhere")))
    common.write_json(run.record, common.runs_dir("bad/settings.json"))
    assert "best.pt" in refusal(command("--run", "bad"))
    path = common.runs_dir("bad/fold-0/best.pt")
    path.parent.mkdir()
    shutil.copy(run.folder / "fold-0" / "best.pt", path)
    os.truncate(path, 10000)
    assert f"{path} is damaged" in refusal(command("--run", "bad"))
    changed = {**run.trained[0], "model": {"head.weight": torch.zeros(3)}}
    torch.save(changed, path)
    assert "does not fit" in refusal(command("--run", "bad"))


def test_recall_that_is_no_share_is_refused(run):
    assert "--recall 95" in refusal(command(*FLAGS, "--run", "cv", "--recall=95"))
    with pytest.raises(UserError, match="--recall -0.1"):
        step.Settings(recall=-0.1)


def test_compared_with_itself_a_run_is_no_better_and_an_ideal_one_is(run):
    assert "intervals of the difference" in command(*FLAGS, "--compare", "cv", "cv").stdout
    comparison = step.compare_runs(["cv", "cv"], 200, 0)
    assert (comparison[["difference", "low", "high"]] == 0).all(axis=None)
    ideal = run.table.assign(predicted=run.table["label"])
    common.write_csv(ideal, common.runs_dir("ideal/predictions.csv"))
    comparison = step.compare_runs(["cv", "ideal"], 200, 0)
    wrong = int((run.table["label"] != run.table["predicted"]).sum())
    difference, low, high = comparison.loc["accuracy", ["difference", "low", "high"]]
    assert difference == pytest.approx(wrong / 48) and 0 < low < difference < high
    assert "predictions.csv" in refusal(command(*FLAGS, "--compare", "cv", "unevaluated"))
    assert "two runs or more" in refusal(command(*FLAGS, "--compare", "cv"))
    text = command(*FLAGS, "--compare", "cv", "cv", "cv").stdout
    assert "intervals of the mean" in text
    repeats = step.compare_runs(["cv", "ideal", "cv"], 200, 0)
    mean, low, high = repeats.loc["accuracy", ["mean", "low", "high"]]
    assert mean == pytest.approx(1 - wrong / 48 * 2 / 3) and low < mean < high


def test_predictions_older_than_the_networks_of_their_run_are_not_compared(home):
    for name in ("one", "two"):
        table = judged(np.arange(40) % 3)[0].assign(image=[f"f{n}" for n in range(40)])
        common.write_csv(table, common.runs_dir(name) / "predictions.csv")
    step.compare_runs(["one", "two"], 50, 0)
    best = common.runs_dir("two") / "fold-3-window" / "best.pt"  # --resume has trained on
    best.parent.mkdir()
    best.touch()
    os.utime(best.parents[1] / "predictions.csv", (1, 1))
    with pytest.raises(UserError, match="older than.*05_evaluate.py --run two makes"):
        step.compare_runs(["one", "two"], 50, 0)


def test_runs_on_films_and_patients_called_001_and_na_can_be_compared(home):
    table, _ = judged(np.arange(40) % 3)
    table["image"] = ["NA", "null", *(f"{n:03d}" for n in range(38))]
    table["patient"] = ["NA"] * 2 + [f"{n // 2:02d}" for n in range(38)]
    for name in ("one", "two"):
        common.write_csv(table, common.runs_dir(name) / "predictions.csv")
    comparison = step.compare_runs(["one", "two"], 50, 0)
    right = (table["label"] == table["predicted"]).mean()
    assert comparison.loc["accuracy", "run one"] == pytest.approx(right)


def test_compared_runs_have_the_same_patients_and_it_is_said_how_many_films(home):
    table = judged(np.arange(40) % 3)[0].assign(image=[f"f{n}" for n in range(40)])
    for name, part in {"low": table, "high": table[:30]}.items():
        common.write_csv(part, common.runs_dir(name) / "predictions.csv")
    found = step.compare_runs(["low", "high"], 50, 0)
    assert found.index.name == "n = 30 films" and (found["run low"] == found["run high"]).all()
    part = table.assign(patient=range(40))
    common.write_csv(part, common.runs_dir("split otherwise") / "predictions.csv")
    with pytest.raises(UserError, match="patients"):
        step.compare_runs(["split otherwise", "low"], 50, 0)


def test_average_precision_without_malignant_films_is_not_defined():
    table, recalled = judged(np.arange(40) % 2)  # benign and normal
    values = step.measure(table, recalled, np.ones((1, 40), np.float32))
    assert values[["average precision malignant", "AUC malignant"]].isna().all(axis=None)


def test_one_fold_without_malignant_films_is_evaluated_and_recorded_as_json(run, home, monkeypatch):
    conftest.small_network(monkeypatch)
    labels = run.prepared.labels[["image", "patient", "label"]]
    names = labels["label"].replace({MALIGNANT: BENIGN}).map(dict(enumerate(common.CLASS_NAMES)))
    common.write_csv(labels.assign(label=names), home / "mine.csv")
    own = {"images": str(run.prepared.folder / "raw"), "labels": str(home / "mine.csv")}
    prepare_data(source="own", size="64x64", folds=3, **own)
    folder = run_main("04_train.py", source="own", **QUICK).run_folder
    done = command(*FLAGS)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" not in done.stdout and "1 of 3 folds" in done.stdout
    text = (folder / "metrics.json").read_text(encoding="utf-8")
    shutil.rmtree(folder)  # the checkpoints
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["malignant_recall"] is None and values["synthetic"] is False
    assert values["metrics"]["specificity at recall 0.95"]["value"] is None


def test_another_head_is_one_place_in_step_3_and_every_later_step_runs(run, home, monkeypatch):
    def new_head(features):
        layers = torch.nn.Linear(features, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        return torch.nn.Sequential(*layers)

    conftest.small_network(monkeypatch)
    monkeypatch.setattr(network, "new_head", new_head)
    monkeypatch.setattr(common, "show", lambda figure, path=None, title="": step.plt.close(figure))
    shutil.copytree(run.prepared.folder.parent, home / "data")
    looked = run_main("03_model.py", weights="none")
    assert tuple(looked.four_read.logits.shape) == (4, 3)
    assert any(p.requires_grad for p in looked.model.parameters())
    trained = run_main("04_train.py", **QUICK)
    done = command(*FLAGS)
    assert done.returncode == 0, done.stderr
    read, end, start = done.fold_models[0].models[0], trained.trained_model, trained.model
    assert torch.equal(read.head[2].weight.cpu(), end.head[2].weight.cpu())
    assert not torch.equal(start.head[0].weight, end.head[0].weight)
    assert done.reading.cams.any() and done.predictions[P].std().min() > 0


# ---------------------------------------------------------------------- films of your own


@pytest.fixture(scope="module")
def own(run, tmp_path_factory):
    """Read a typical left breast, 131 x 117 px, in four formats, dark, and as prepared."""
    folder, labels = tmp_path_factory.mktemp("own"), run.prepared.labels
    measures = run.prepared.table[common.STATISTICS]
    far = ((measures - measures.median()) / measures.std()).abs().max(axis=1)
    known = far[labels["laterality"] == "left"].idxmin()
    raw = run.prepared.folder / "raw" / f"{labels['image'][known]}.pgm"
    film = np.asarray(Image.open(raw).resize((131, 131), Image.BILINEAR))[:, :117]
    paths = [folder / f"scan.{suffix}" for suffix in ("pgm", "png", "tif", "jpg")]
    twelve = np.rint(film * (4095 / 255)).astype(np.uint16)  # 12 of 16 bit
    for path, grey in zip(paths, (film, twelve, film, film)):
        Image.fromarray(grey).save(path)
    Image.fromarray(film // 5).save(folder / "dark.png")
    paths += [folder / "dark.png", raw]
    done = command(*FLAGS, "--run", "cv", "--image", *paths)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(run.folder / "own-films" / "predictions.csv", keep_default_na=False)
    return SimpleNamespace(
        folder=folder, paths=paths, film=film, known=known, done=done, table=table
    )


def test_own_films_of_any_format_and_odd_size_get_the_mean_of_the_folds_models(own, run):
    assert own.table["image"].tolist() == list(map(str, own.paths))
    p = own.table[P].to_numpy()
    assert p[:3] == pytest.approx(p[[0] * 3], abs=1e-5) and p[3] == pytest.approx(p[0], abs=0.05)
    alone = run.prepared.splits["fold"][own.known]  # the run's own film, by the fold it tested
    assert p[5] == pytest.approx(
        by_hand(run.folds[alone], run.prepared.films[[own.known]])[0], abs=1e-4
    )
    same = run.table.set_index("image").loc[run.prepared.labels["image"][own.known]]
    assert p[5] == pytest.approx(same[ALONE].astype(float).to_numpy(), abs=1e-4)
    priors = np.stack([fold.prior.numpy() for fold in run.folds])
    priors = [priors.mean(0)] * 5 + [priors[alone]]
    assert own.table["predicted"].tolist() == [CLASS_NAMES[c] for c in called(p, priors)]
    thresholds = [threshold_by_hand(fold, 0.8, alone=True) for fold in run.folds]
    wanted = [np.mean(thresholds)] * 5 + [thresholds[alone]]
    assert own.table["threshold"].tolist() == pytest.approx(wanted, rel=1e-3)
    assert own.table["recalled"].tolist() == (p[:, MALIGNANT] >= own.table["threshold"]).tolist()
    assert common.DISCLAIMER in own.done.stdout and "SYNTHETIC PHANTOMS" in own.done.stdout


def test_every_own_film_gets_a_figure_also_films_of_one_name(own, run):
    figures = list((run.folder / "own-films").glob("*.png"))
    assert len(figures) == len(own.paths), [path.name for path in figures]


def test_only_a_film_unlike_the_training_films_is_warned_of(own):
    (said,) = re.findall("warning: 1 (films are unlike the training films.*)", own.done.stderr)
    assert said.endswith(f": {own.folder / 'dark.png'}")
    kept = "read by the folds alone that never saw it"
    assert own.table["note"].tolist() == [""] * 4 + ["unlike the training films", kept]
    assert f"1 films of this run are {kept}: {own.paths[5]}" in own.done.stderr


def test_a_film_is_mirrored_by_its_pixels_and_reading_repeats_exactly(own, run):
    def read(name, side):
        settings = step.Settings(laterality=side, device="cpu", recall=0.8)
        table, figures = step.read_own_films([own.folder / name], run.folds, run.record, settings)
        (figure,) = figures
        heat = np.asarray(figure.axes[1].images[1].get_array())
        step.plt.close(figure)
        return table.loc[0, P].tolist(), heat

    Image.fromarray(own.film[:, ::-1]).save(own.folder / "turned.tif")
    (p, heat), (again, same) = read("scan.tif", "left"), read("scan.tif", "left")
    assert p == again and np.array_equal(heat, same) and heat.shape == (131, 117) and heat.any()
    assert own.table.loc[2, P].tolist() == pytest.approx(p, abs=1e-4)
    for side in ("right", "", "left"):
        found, turned = read("turned.tif", side)
        assert found == pytest.approx(p, abs=0.01)
        assert np.corrcoef(turned[:, ::-1].flat, heat.flat)[0, 1] > 0.98
    assert read("scan.tif", "right")[0] == p


@pytest.fixture
def read(run):
    """Return a function that reads films in this process, by film numbers or paths.

    The folds do not know these films again, unless they are given.
    """
    unseen = [fold._replace(seen=set()) for fold in run.folds]

    def read(*films, folds=unseen, **changes):
        raw, names = run.prepared.folder / "raw", run.prepared.labels["image"]
        paths = [film if isinstance(film, Path) else raw / f"{names[film]}.pgm" for film in films]
        settings = step.Settings(device="cpu", recall=0.8, **changes)
        table, _ = step.read_own_films(paths, folds, run.record, settings)
        return table.drop(columns="image")

    return read


def test_both_films_of_a_person_are_each_judged_beside_the_other(read, run, capsys):
    labels = run.prepared.labels
    films = np.flatnonzero(labels["patient"] == labels["patient"][4])
    table = read(*films, pair=True)
    couple = labels.iloc[films]
    p = [by_hand(fold, run.prepared.films[films], couple) for fold in run.folds]
    assert table[P].to_numpy() == pytest.approx(np.mean(p, axis=0), abs=1e-4)
    threshold = np.mean([t["threshold"] for t in run.values["thresholds"]])
    assert table["threshold"].tolist() == pytest.approx([threshold] * 2, rel=1e-3)
    assert read(*films[::-1], pair=True)[P].to_numpy() == pytest.approx(table[P].to_numpy()[::-1])
    first = couple["laterality"].iloc[0]
    pd.testing.assert_frame_equal(read(*films, pair=True, laterality=first), table)
    run.record["data"]["crop"] = "none"  # then nothing is mirrored
    read(*films, pair=True)
    run.record["data"]["crop"] = "breast"
    assert "same breast" not in capsys.readouterr().err
    apart, single = read(*films), pd.concat([read(n) for n in films], ignore_index=True)
    pd.testing.assert_frame_equal(apart, single)
    assert np.abs(apart[P] - table[P]).to_numpy().max() > 0.01


def test_films_that_a_run_was_trained_on_are_read_by_folds_that_never_saw_them(read, run, capsys):
    fold, patients = run.prepared.splits["fold"].to_numpy(), run.prepared.labels["patient"]
    films = np.flatnonzero(patients == patients[4])
    couple, alone = run.prepared.labels.iloc[films], run.folds[fold[4]]
    table = read(*films, folds=run.folds, pair=True)
    p = by_hand(alone, run.prepared.films[films], couple)
    assert table[P].to_numpy() == pytest.approx(p, abs=1e-4)
    assert "2 films of this run are read by the folds alone that never" in capsys.readouterr().err
    others = [other for other in run.folds if other is not alone]
    table = read(4, folds=others)
    assert table["note"].tolist() == ["known by heart: every fold was trained or chosen on it"]
    assert "1 films of this run are known by heart" in capsys.readouterr().err
    p = np.mean([by_hand(other, run.prepared.films[[4]])[0] for other in others], axis=0)
    assert table.loc[0, P].tolist() == pytest.approx(p.tolist(), abs=1e-4)


def test_predictions_are_written_before_the_first_figure_and_figures_drawn_one_by_one(
    own, run, monkeypatch
):
    table, shown, path = run.folder / "own-films" / "predictions.csv", [], own.paths[0]
    table.unlink()

    def show(figure, path=None, title=""):
        shown.append((table.is_file(), len(step.plt.get_fignums())))
        step.plt.close(figure)

    before = len(step.plt.get_fignums())
    monkeypatch.setattr(common, "show", show)
    command(*FLAGS, "--run", "cv", "--image", *[path] * 3)
    assert shown == [(True, before + 1)] * 3


def test_no_film_is_named_by_nothing():
    settings = step.Settings(image="a.png")
    for value in ("", None, [""]):
        settings.image = value
        assert settings.image == ()
    settings.image = [Path("x"), "y"]
    assert settings.image == (Path("x"), "y")


@pytest.mark.parametrize(
    "wrong, said",
    [({"image": "typo.png"}, "not there: typo.png"), ({"pair": True}, "--pair takes the two")]
    + [({"image": "typo.png", "laterality": "lft"}, "not there"), ({"laterality": "lft"}, "lft")],
)
def test_a_mistake_about_own_films_is_told_before_a_run_is_made(home, monkeypatch, wrong, said):
    monkeypatch.setattr(common, "run_step", lambda *names: pytest.fail("trains before it says so"))
    with pytest.raises(UserError, match=said):
        run_main("05_evaluate.py", **wrong)


def test_pair_that_is_none_is_refused_or_warned_of(read, run, own, capsys):
    for films in ((own.known,), (0, 1, 2)):
        with pytest.raises(UserError, match=f"--pair takes the two films.*{len(films)}"):
            read(*films, pair=True)
    table = read(own.known, own.known, pair=True)
    assert "warning: both films look like the same breast" in capsys.readouterr().err
    couple = pd.DataFrame({"patient": [0, 0], "laterality": ["left", "right"]})
    twice = run.prepared.films[[own.known, own.known]]
    p = np.mean([by_hand(fold, twice, couple) for fold in run.folds], axis=0)
    assert table[P].to_numpy() == pytest.approx(p, abs=1e-4)  # nothing new: its own logits


def test_file_that_is_no_film_ends_with_status_1_and_one_message(own):
    notes, gone = own.folder / "notes.txt", own.folder / "gone.png"
    notes.write_text("not a film")
    assert str(notes) in refusal(command("--run", "cv", "--image", notes))
    assert f"not there: {gone}" in refusal(command("--run", "cv", "--image", gone))
