"""Step 4: what a run writes, that it can be stopped at any moment and gone on with, and refuses."""

import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import kernels
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from sklearn import metrics as sk
from torch import nn

import common
from common import UserError

step = scripts.definitions("04_train")
data, network = step.data, step.network
SCRIPT = conftest.PROJECT / "04_train.py"
COLUMNS = (
    "fold,epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,val_macro_f1,"
    "val_malignant_recall,seconds,films_per_second,look"
).split(",")
# A quick run: only the heads are trained, unless `freeze` says otherwise.
QUICK = {"source": "phantom", "weights": "none", "epochs": 1, "precision": "fp32", "freeze": 5,
         "device": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_once(tmp_path_factory):
    """Prepare 16 patients on the smallest canvas, in 3 folds; by this seed 8 of them are normal."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(folder))
        small = {"patients": 16, "phantom_size": 128, "size": "64x64", "folds": 3, "seed": 464}
        conftest.prepare_data(source="phantom", **small)
    return folder


@pytest.fixture
def tiny(home, tiny_once, monkeypatch):
    """Return prepared films, and let steps train a ResNet of half the depth (for speed)."""
    conftest.small_network(monkeypatch)
    monkeypatch.setattr(common, "show", lambda figure, path=None, title="": plt.close(figure))
    shutil.copytree(tiny_once, home / "data")
    yield common.load_prepared("phantom")
    shutil.rmtree(home / "runs", ignore_errors=True)  # checkpoints are large


def train(**changes):
    """Run step 4 quickly; return its variables."""
    return conftest.run_main(SCRIPT.name, **{**QUICK, **changes})


def go_on(**changes):
    """Run step 4 again with --resume and nothing else but `changes`."""
    return conftest.run_main(SCRIPT.name, resume=True, **changes)


def run_cells(names, first="", until="The curves"):
    """Run the cells of step 4 from one to another, by the beginnings of their titles."""
    cells = kernels.split_cells(SCRIPT)
    titles = [*(title for title, _ in cells), "the end"]
    begin, end = ([t.startswith(name) for t in titles].index(True) for name in (first, until))
    for _, code in cells[begin:end]:
        exec(code, names)


@pytest.fixture
def console(tiny):
    """Return a console's variables, ready for the training cell."""
    names = {"__name__": "__main__", "__file__": str(SCRIPT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "command_line", lambda settings, _: settings(**QUICK))
        run_cells(names, until="Train")
    return names


def load(folder, name="best.pt", fold=0):
    return torch.load(folder / f"fold-{fold}" / name, weights_only=True)


def leaves(value, path=""):
    """Yield (path, value) of everything in nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], f"{path}/{key}")
    else:
        yield path, value


def differences(one, other):
    """Name what differs, bit for bit, between two checkpoints; clocks and names aside."""
    one, other = dict(leaves(one)), dict(leaves(other))
    aside = r"^/record/|/(seconds|films_per_second)$"
    return [
        path
        for path in sorted({*one, *other})
        if not re.search(aside, path)
        and not (
            torch.equal(one[path], other[path])
            if torch.is_tensor(one.get(path)) and torch.is_tensor(other.get(path))
            else path in one and path in other and one[path] == other[path]
        )
    ]


def history(folder):
    return pd.read_csv(folder / "history.csv").drop(columns=["seconds", "films_per_second"])


def assert_same_runs(one, other):
    """Compare all that two runs of fold 0 left, bit for bit."""
    for name in ("best.pt", "last.pt"):
        assert differences(load(one, name), load(other, name)) == []
    pd.testing.assert_frame_equal(history(one), history(other))


def break_in(monkeypatch, owner, name, call, error=KeyboardInterrupt):
    """Raise `error` at the n-th call of a function, as a stop button may at any moment."""
    whole, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            monkeypatch.setattr(owner, name, whole)
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def answer_alike(monkeypatch):
    """Let all networks say the same of all films: no epoch is better than the first."""

    def same(model, films, *rest, kept=None):
        return network.Reading(torch.zeros(len(films), 3))

    monkeypatch.setattr(network, "predict", same)


# ---------------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("recipe", ["lesion", "plain"])
def test_run_writes_the_files_and_columns_of_the_contract(tiny, recipe, capsys):
    run = train(recipe=recipe, epochs=2, freeze=4)
    folder, record = run.run_folder, common.read_json(run.run_folder / "settings.json")
    named = {"recipe": recipe, "seed": 0, "batch_size": 8, "balance": "sampler", "weights": "none"}
    assert {**record, **named} == record
    assert record["run"] == folder.name and record["synthetic"] is True
    printed = capsys.readouterr().out
    assert record["split_seed"] == 464 and "split_seed 464" in printed
    for path in (folder / "history.csv", folder / "fold-0" / "history.csv"):
        assert list(pd.read_csv(path)) == COLUMNS and pd.read_csv(path)["epoch"].tolist() == [1, 2]
    assert run.history["epoch"].tolist() == [1, 2]
    best, last = load(folder), load(folder, "last.pt")
    assert last["epoch"] == 2 and best["record"]["data"] == record["data"] == tiny.identity()
    kept = tiny.labels.iloc[data.fold_parts(tiny, 0)["validation"]]
    keys = {"model", "validation", "prior", "reduce", "epoch", "fold", "record", "seen"}
    assert set(best) == keys and best["reduce"] == 1
    for name in ("image", "patient", "laterality"):
        assert best["validation"][name] == kept[name].tolist()
    assert best["validation"]["labels"].tolist() == kept["label"].tolist()
    assert best["validation"]["logits"].shape == (len(kept), 3)
    assert not run.trained_model.training
    assert not differences(best["model"], dict(run.trained_model.state_dict()))
    assert not list(folder.rglob("*.part"))
    assert f"Next: python 05_evaluate.py --run {folder.name}" in printed


def test_fold_all_trains_every_fold_once(tiny):
    run = train(fold="all")
    assert run.history["fold"].tolist() == [0, 1, 2]
    assert history(run.run_folder)["fold"].tolist() == [0, 1, 2]
    for fold in range(3):
        seen = set(load(run.run_folder, fold=fold)["validation"]["image"])
        assert not seen & set(tiny.splits.loc[tiny.splits["fold"] == fold, "image"])


def test_no_film_of_a_test_patient_is_read_while_training(tiny, monkeypatch):
    test = set(np.flatnonzero(tiny.splits["fold"] == 1))
    reads = []

    class Guarded:
        shape = tiny.films.shape

        def __len__(self):
            return len(tiny.films)

        def __getitem__(self, rows):
            reads.extend(np.atleast_1d(rows).tolist())
            return tiny.films[rows]

    monkeypatch.setattr(common, "open_prepared", lambda source: tiny._replace(films=Guarded()))
    train(fold=1, epochs=2)
    assert test and len(set(reads)) > 8 and not test & set(reads)


@pytest.mark.parametrize("balance", ["sampler", "loss", "none"])
def test_rare_classes_count_by_the_sampler_or_the_loss_but_never_both(tiny, balance, monkeypatch):
    seen, whole = [], nn.functional.cross_entropy

    def spy(logits, labels, weights=None, **options):
        seen.extend([weights] if "label_smoothing" in options else [])  # the loss of films
        return whole(logits, labels, weights, **options)

    monkeypatch.setattr(nn.functional, "cross_entropy", spy)
    run = train(balance=balance)
    assert {w is not None for w in seen} == {balance == "loss"}
    epochs = itertools.chain.from_iterable(run.epoch_batches(run.state) for _ in range(80))
    drawn = torch.cat([rows for _, _, rows in epochs]).tolist()
    shares = np.bincount(tiny.labels["label"].iloc[drawn]) / len(drawn)
    if balance == "sampler":
        assert shares == pytest.approx(1 / 3, abs=0.06)
    else:
        rows, counts = np.unique(drawn, return_counts=True)
        assert set(rows) == set(run.train_films.rows), "not every film once an epoch"
        assert set(counts) == {80}


def test_validation_figures_and_prior_follow_from_the_checkpoint(tiny):
    for balance, changes in {"sampler": {}, "none": {}, "loss": {"shuffle_labels": True}}.items():
        run = train(balance=balance, lr=0.05, epochs=2, **changes)
        best, labels = load(run.run_folder), tiny.labels["label"].to_numpy()
        if changes:
            labels = data.shuffled_labels(tiny.labels, 0)
        parts, kept = data.fold_parts(tiny, 0), best["validation"]
        counts = np.bincount(labels[parts["train"]], minlength=3)
        prior = [1, 1, 1] if balance == "none" else counts / counts.sum()
        assert best["prior"].tolist() == pytest.approx(prior) and np.ptp(counts) > 3
        y = kept["labels"].numpy()
        pairs = (kept["logits"], kept["patient"], kept["laterality"])
        ways = {weight: conftest.beside(*pairs, weight) for weight in (1, 0, 0.5, 1.5, 2, 3)}
        fits = {weight: conftest.fitted(z, y, best["prior"]) for weight, z in ways.items()}
        weight = min(fits, key=lambda weight: fits[weight][1])
        judged = conftest.beside(*pairs, 1)
        assert np.abs(judged - kept["logits"].numpy()).max() > 1e-3 and y.tolist() == (
            labels[parts["validation"]].tolist()
        )
        p = conftest.bayes(ways[weight], fits[weight][0], best["prior"])
        predicted = p.argmax(1)
        figures = [
            sk.log_loss(y, p, labels=range(3)),
            sk.accuracy_score(y, predicted),
            sk.f1_score(y, predicted, average="macro", zero_division=0),
            sk.recall_score(y == 2, predicted == 2, zero_division=0),
        ]
        row = run.history.set_index("epoch").loc[best["epoch"], COLUMNS[5:9]]
        assert row.tolist() == pytest.approx(figures, rel=1e-3), balance


def test_shuffled_labels_move_between_patients_and_pairs_stay_together(tiny):
    labels = pd.concat([tiny.labels] * 3, ignore_index=True)[["patient", "label"]]
    labels["patient"] = np.arange(len(labels)) // 2
    labels = labels.iloc[:-1]  # one patient with one film
    mixed = labels.assign(label=data.shuffled_labels(labels, 0))
    pairs, moved = (t.groupby("patient")["label"].apply(tuple) for t in (labels, mixed))
    assert sorted(pairs) == sorted(moved) and (pairs != moved).sum() > 10
    assert (mixed["label"] != data.shuffled_labels(labels, 1)).any()
    for part in step.fold_films(tiny, 0, step.Settings(shuffle_labels=True)):
        assert part.labels.tolist() == data.shuffled_labels(tiny.labels, 0)[part.rows].tolist()


def test_share_of_validation_patients_is_a_setting_and_noted(tiny):
    usual, half = data.fold_parts(tiny, 0), data.fold_parts(tiny, 0, 0.5)
    run = train(validation=0.5)
    assert common.read_json(run.run_folder / "settings.json")["validation"] == 0.5
    kept = load(run.run_folder)["validation"]["image"]
    assert kept == tiny.labels["image"].iloc[half["validation"]].tolist()
    assert run.train_films.rows.tolist() == half["train"].tolist()
    assert len(kept) >= len(half["train"]) - 4 > 0 and len(kept) > len(usual["validation"]) + 4
    with pytest.raises(UserError, match="validation 0.5 -> 0.4"):
        go_on(validation=0.4)


def test_a_share_of_the_training_patients_changes_nothing_of_the_other_parts(tiny):
    whole, half = data.fold_parts(tiny, 0), data.fold_parts(tiny, 0, train_share=0.5)
    for part in ("validation", "test"):
        assert whole[part].tolist() == half[part].tolist()
    patients = tiny.labels["patient"]
    kept, every = (set(patients[parts["train"]]) for parts in (half, whole))
    assert kept < every and abs(len(kept) - len(every) / 2) <= 2
    assert half["train"].tolist() == [n for n in whole["train"] if patients[n] in kept]
    assert set(tiny.labels["label"][half["train"]]) == {0, 1, 2}
    assert train(train_share=0.5).train_films.rows.tolist() == half["train"].tolist()
    with pytest.raises(UserError, match="--train-share 0.*expected 0.001 to 1"):
        train(train_share=0)


def test_both_looks_cost_the_same_in_training_and_resume_bit_for_bit(tiny, monkeypatch):
    shapes, read = [], network.MammogramNet.frozen_features
    monkeypatch.setattr(data, "ROWS", 32)

    def noting(self, films):
        shapes.append((self.training, tuple(films.shape[2:])))
        return read(self, films)

    monkeypatch.setattr(network.MammogramNet, "frozen_features", noting)
    both = train(run="both", epochs=2)
    # windows are read whole; a window is looked at before training only where it is the first look
    assert set(shapes) == {(True, (32, 32)), (False, (32, 32)), (False, (64, 64))}
    assert both.history["look"].tolist() == ["whole"] * 2 + ["window"] * 3
    batches = len(both.epoch_batches(both.state))
    break_in(monkeypatch, data, "augment", 1 + batches + 1)  # in the second epoch of whole films
    train(run="parts", epochs=2)
    break_in(monkeypatch, data, "augment", 1 + 2 * batches + 1)  # in the second of windows
    assert go_on(run="parts").history["look"].tolist() == ["whole"] * 2 + ["window"]
    parts = go_on(run="parts")
    window = train(run="window", looks="window", epochs=2)
    for name, other in [("0", parts), ("0-window", parts), ("0-window", window)]:
        found, again = (load(run.run_folder, "last.pt", name) for run in (both, other))
        assert not differences(found, again)


def test_films_typed_in_a_cell_are_what_both_looks_train_on(tiny, monkeypatch):
    monkeypatch.setattr(data, "ROWS", 32)
    monkeypatch.setattr(common, "command_line", lambda settings, _: settings(**QUICK))
    names = {"__name__": "__main__", "__file__": str(SCRIPT)}
    run_cells(names, until="The network")
    typed = data.MammogramDataset(tiny, names["train_films"].rows[:9])  # reduced by none
    names["train_films"] = typed
    run_cells(names, first="The network")
    both = [load(names["run_folder"], fold=name) for name in ("0", "0-window")]
    films = set(tiny.table["digest"].iloc[[*typed.rows, *names["validation_films"].rows]])
    assert all(set(best["seen"]["films"]) == films for best in both)
    assert [best["reduce"] for best in both] == [2, 1]


@pytest.mark.parametrize("part", ["test", "validation"])
def test_films_typed_in_a_cell_that_would_leak_are_refused(tiny, monkeypatch, part):
    monkeypatch.setattr(common, "command_line", lambda settings, _: settings(**QUICK))
    names = {"__name__": "__main__", "__file__": str(SCRIPT)}
    run_cells(names, until="Train")
    leak = [*names["train_films"].rows, data.fold_parts(tiny, 0)[part][0]]
    names["train_films"] = data.MammogramDataset(tiny, leak)
    patient = tiny.labels["patient"][leak[-1]]
    with pytest.raises(UserError, match=f"no patient in common; leave out films of: {patient}$"):
        run_cells(names, first="Train")
    assert not any(common.runs_dir().glob("*"))


def test_a_setting_changed_above_a_cell_that_was_run_alone_is_named(tiny, monkeypatch):
    monkeypatch.setattr(common, "command_line", lambda settings, _: settings(**QUICK))
    names = {"__name__": "__main__", "__file__": str(SCRIPT)}
    run_cells(names, until="An epoch")
    names["settings"].fold = "1"
    run_cells(names, first="The films of the first fold", until="The network")
    with pytest.raises(UserError, match="The films of the first fold.* are: the films$"):
        run_cells(names, first="Train")


@pytest.mark.parametrize("missing", [False, True])
def test_logits_and_maps_of_both_looks_are_averaged(tiny, monkeypatch, capsys, missing):
    monkeypatch.setattr(data, "ROWS", 32)
    folder = train(run="both", epochs=1, lr=0.01).run_folder
    if missing:
        shutil.rmtree(folder / "fold-0-window")
    judged = conftest.run_main("05_evaluate.py", run="both", precision="fp32")
    assert ("one look alone is judged" in capsys.readouterr().err) == missing
    (fold,) = judged.fold_models
    films, looks = data.MammogramDataset(tiny, data.fold_parts(tiny, 0)["test"]), []
    for model, times in zip(fold.models, fold.reduce):
        small = data.MammogramDataset(tiny, films.rows, reduce=times)
        wanted = [film.reshape(64 // times, times, -1, times).mean((1, 3)).round()
                  for film in tiny.films[films.rows]]  # fmt: skip
        assert (small.__getitems__(range(len(films)))[0][:, 0].numpy() == wanted).all()
        looks.append(network.predict(model, small).logits)
    assert fold.reduce == ([2] if missing else [2, 1])
    assert judged.reading.logits == pytest.approx(torch.stack(looks).mean(0).numpy(), abs=1e-4)
    sides = (2, 2) if missing else (4, 4)
    assert judged.reading.places.shape[1:] == judged.reading.cams.shape[1:] == sides
    kept = [load(folder, fold=f"0{name}")["validation"]["logits"]
            for name in ("", "-window")[: len(looks)]]  # fmt: skip
    assert torch.allclose(fold.validation["logits"], torch.stack(kept).mean(0), 0, 1e-6)


def test_a_large_canvas_with_circles_is_looked_at_in_two_ways(tiny):
    large = tiny._replace(films=np.zeros((1, 1024, 576), np.uint8))
    without, both = large._replace(findings=tiny.findings[:0]), ["whole", "window"]
    some, none = network.Weights({}, "some"), network.Weights(None, "none")
    cases = [(tiny, "lesion"), (large, "plain"), (without, "lesion"), (large, "lesion")]
    for (prepared, recipe), looks in zip(cases, [both[:1]] * 3 + [both]):
        assert step.filled_in(step.Settings(recipe=recipe), prepared, none)["looks"] == looks
    schedule = step.schedule_of(step.filled_in(step.Settings(), large, some))
    assert list(schedule.itertuples(name=None)) == [("whole", 10, 5), ("window", 16, 8)]
    begun = network.Weights({}, "a run", {"films": ["digest"], "patients": ["own/1"]})
    schedule = step.schedule_of(step.filled_in(step.Settings(), large, begun))
    assert list(schedule.itertuples(name=None)) == [("whole", 5, 2), ("window", 8, 3)]
    for looks, prepared in [(("window",), tiny), (("half",), large), ((), large)]:
        with pytest.raises(UserError, match="--looks.*windows need a canvas of 1024 rows"):
            step.filled_in(step.Settings(looks=looks), prepared, none)


@pytest.mark.parametrize("share", [0, 0.6, -0.2])
def test_share_of_validation_patients_that_leaves_none_or_too_few_is_refused(tiny, share):
    with pytest.raises(UserError, match=f"--validation {share}.*expected 0.001 to 0.5"):
        train(validation=share)


@pytest.mark.parametrize("recipe", ["lesion", "plain"])
def test_another_head_is_one_change_and_steps_4_and_5_run(tiny, recipe, monkeypatch):
    def new_head(features):
        return nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, 3))

    monkeypatch.setattr(network, "new_head", new_head)
    run = train(recipe=recipe, epochs=2)
    moved = differences(dict(run.model.state_dict()), load(run.run_folder)["model"])
    heads = ["head", "skip_head"] if recipe == "lesion" else ["head"]
    assert {f"/{head}.{n}.weight" for head in heads for n in (0, 2)} <= set(moved)
    found = conftest.run_main("05_evaluate.py", resamples=20, device="cpu", precision="fp32")
    test = tiny.labels["image"][tiny.splits["fold"] == 0]
    assert sorted(found.predictions["image"]) == sorted(test)
    assert np.isfinite(found.predictions[found.PROBABILITIES]).all(axis=None)
    assert np.isfinite(found.reading.cams).all() and np.ptp(found.reading.cams) > 0
    assert common.read_json(run.run_folder / "metrics.json")["n"] == len(test)


# ---------------------------------------------------------------------- cells, one after another


def test_optimiser_that_was_put_in_the_place_of_ours_is_the_one_that_trains(console, monkeypatch):
    answer_alike(monkeypatch)
    before = {name: value.clone() for name, value in console["model"].state_dict().items()}
    learning = [p for p in console["model"].parameters() if p.requires_grad]
    console["optimizer"] = torch.optim.SGD(learning, lr=0.125, momentum=0.5)
    console["settings"].epochs = console["settings"].patience = 3
    run_cells(console, "Train")
    last = load(console["run_folder"], "last.pt")
    (group,) = last["optimizer"]["param_groups"]
    assert group["momentum"] == 0.5 and len(last["optimizer"]["state"]) == len(learning)
    assert all(set(s) == {"momentum_buffer"} for s in last["optimizer"]["state"].values())
    assert differences(before, last["model"]), "nothing was learned"
    rates = [0.125 * (1 + np.cos(np.pi * n / 3)) / 2 for n in range(3)]
    assert console["history"]["lr"].tolist() == pytest.approx(rates)


def test_optimiser_of_another_network_is_refused(console):
    console["model"] = network.build_model("none")[0]
    with pytest.raises(UserError, match="run the cell 'The network, its optimiser' first"):
        run_cells(console, "Train")


def test_training_cell_run_twice_gives_two_equal_runs(console):
    folders = []
    for _ in range(2):
        run_cells(console, "Train")
        folders.append(console["run_folder"])
    assert [folder.name for folder in folders] == ["phantom-lesion-001", "phantom-lesion-002"]
    assert_same_runs(*folders)


def test_training_cell_that_was_stopped_goes_on_where_it_was(console, monkeypatch):
    whole = train(run="whole", epochs=2).run_folder
    console["settings"].epochs = 2
    break_in(monkeypatch, torch, "save", 3)  # best.pt or last.pt of the second epoch
    run_cells(console, "Train")
    assert console["history"]["epoch"].tolist() == [1]
    console["settings"].resume = True
    run_cells(console, "Train")
    assert console["history"]["epoch"].tolist() == [1, 2]
    assert_same_runs(whole, console["run_folder"])


def test_settings_that_changed_since_the_network_was_made_are_refused_in_one_message(console):
    console["settings"].lr, console["settings"].seed = 0.002, 1
    said = "'The films of the first fold' on again, .*changed are: seed, lr, backbone_lr$"
    with pytest.raises(UserError, match=said):
        run_cells(console, "Train")
    assert not list(common.runs_dir().glob("*/*"))
    run_cells(console, "The films of the first fold")
    groups = load(console["run_folder"], "last.pt")["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {0.002}
    console["optimizer"] = torch.optim.SGD(console["model"].parameters(), lr=0.1)
    run_cells(console, "Train")  # the model is still as it began
    assert console["history"]["lr"].tolist() == [0.1]


def test_a_network_that_step_3_would_not_make_is_not_trained(console, monkeypatch):
    """As after an edit of step 3, since step 5 could not read it."""
    head = lambda features: torch.nn.Sequential(torch.nn.Linear(features, 3))  # noqa: E731
    monkeypatch.setattr(network, "new_head", head)
    with pytest.raises(UserError, match="'The films of the first fold' on.*are: network$"):
        run_cells(console, "Train")
    assert not list(common.runs_dir().glob("*/*"))


def test_curves_are_those_of_the_run_that_failed_not_of_the_one_before(console, monkeypatch):
    run_cells(console, "Train")
    first = console["run_folder"]
    monkeypatch.setattr(data, "augment", lambda films, *rest, **options: (films * np.nan, None))
    with pytest.raises(UserError, match="the loss became nan"):
        run_cells(console, "Train")
    run_cells(console, "The curves", "the end")
    assert len(console["history"]) == 0 and console["run_folder"] != first


# ---------------------------------------------------------------------- stopping and going on


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tiny, monkeypatch, capsys):
    changes = {"epochs": 2, "freeze": 3}
    whole = train(run="whole", **changes)
    batches = len(whole.epoch_batches(whole.state))
    break_in(monkeypatch, data, "augment", 1 + batches + 2)  # one is looked at before training
    folder = train(run="stopped", **changes).run_folder
    assert "the state of epoch 1 is saved" in (printed := capsys.readouterr().out)
    assert "Next: python 04_train.py --resume --run stopped" in printed
    assert load(folder, "last.pt")["epoch"] == 1 and batches > 1
    torch.rand(7), np.random.rand(7)  # what else is drawn in a session must not matter
    assert go_on().run_folder == folder
    assert_same_runs(whole.run_folder, folder)
    assert differences(load(folder), load(folder, "last.pt")), "compares nothing"


@pytest.mark.parametrize("owner, name, call", [(torch, "save", 2), (common, "write_csv", 1)])
def test_stop_between_two_files_says_what_is_saved_and_loses_no_row(
    tiny, owner, name, call, monkeypatch, capsys
):
    break_in(monkeypatch, owner, name, call)
    train(run="stopped")
    saved = 1 if name == "write_csv" else 0
    said = "the state of epoch 1 is saved" if saved else "no state is saved yet"
    assert said in capsys.readouterr().out
    run = train(run="stopped", resume=True)
    assert run.history["epoch"].tolist() == history(run.run_folder)["epoch"].tolist() == [1]
    assert pd.read_csv(run.run_folder / "fold-0" / "history.csv")["epoch"].tolist() == [1]


@pytest.mark.parametrize("room", [100, 60000, 99999])  # bytes; torch fails in several ways
def test_full_disk_ends_with_one_message_and_the_last_state_stays(tiny, room, monkeypatch):
    folder = train(run="whole").run_folder
    files = sorted((folder / "fold-0").iterdir())
    before = [path.read_bytes() for path in files]

    class FullDisk(io.BytesIO):
        def write(self, part):
            if self.tell() + len(part) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(part)

    whole = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: whole(state, FullDisk()))
    with pytest.raises(UserError, match=r"the disk is full.*\.pt"):
        train(run="whole", resume=True, epochs=2)
    assert sorted((folder / "fold-0").iterdir()) == files, "a part was left behind"
    assert [path.read_bytes() for path in files] == before


def test_message_of_a_stop_names_the_epoch_that_is_saved(tiny, monkeypatch, capsys):
    answer_alike(monkeypatch)
    break_in(monkeypatch, torch, "save", 3)  # best and last of epoch 1, last of epoch 2
    folder = train(epochs=2, patience=2).run_folder
    assert load(folder, "last.pt")["epoch"] == 1
    assert "the state of epoch 1 is saved" in capsys.readouterr().out


KILLS = """
import importlib, json, os, random, runpy, signal, sys, time
sys.path.insert(0, sys.argv[1])
import matplotlib.pyplot as plt
import torch
torch.set_num_threads(1)
import seaborn, sklearn.metrics, sklearn.model_selection, sklearn.utils.class_weight, torchvision
from torchvision.models.resnet import BasicBlock, ResNet
import common  # all that is slow is imported before forking
data, network = (importlib.import_module(name) for name in ("02_dataset", "03_model"))
torchvision.models.resnet18 = lambda weights: ResNet(BasicBlock, [1, 1, 1, 1])
common.show = lambda figure, path=None, title="": plt.close(figure)
runs, quick = common.runs_dir(), json.loads(sys.argv[2])
counts = dict(kills=0, resumes=0, in_writes=0, finished=0, failed=0, lives=0)

def life(name, delay, in_write):
    folder = runs / name
    resume = (folder / "settings.json").is_file()
    counts["resumes"] += resume and (folder / "fold-0" / "last.pt").is_file()
    counts["lives"] += 1
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            how = dict(run=name, resume=resume, overwrite=not resume)
            common.command_line = lambda settings, _: settings(**quick, **how)
            runpy.run_path(sys.argv[1] + "/04_train.py", run_name="__main__")
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    start = time.time()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            counts["failed"] += status != 0
            return True
        parts = in_write and list(folder.glob(f"**/.*.{child}.part"))
        if time.time() - start > delay and (parts or not in_write):
            time.sleep(random.random() * 0.03 if in_write else 0)
            os.kill(child, signal.SIGKILL)
            counts["in_writes"] += bool(list(folder.glob(f"**/.*.{child}.part")))
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            counts["kills"] += killed
            return not killed
        time.sleep(0.001)

start = time.time()
life("whole", 1e9, False)
span, number = time.time() - start, 0
random.seed(0)
wanted = dict(kills=10, resumes=5, in_writes=2)
while any(counts[n] < least for n, least in wanted.items()) and time.time() - start < 200:
    name = f"killed-{counts['finished']}"
    counts["finished"] += life(name, random.uniform(0.1, 0.7) * span, counts["lives"] % 2 == 0)
name = f"killed-{counts['finished']}"
counts["finished"] += life(name, 1e9, False)
print(json.dumps({**counts, "seconds": round(time.time() - start, 1)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_run_killed_at_random_moments_ends_as_if_it_had_never_been(tiny):
    quick = json.dumps({**QUICK, "epochs": 3, "patience": 3})
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(conftest.PROJECT), quick],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["kills"] >= 10 and counts["resumes"] >= 5 and counts["in_writes"] >= 2, counts
    assert counts["failed"] == 0, done.stderr
    whole, mismatches, leftovers = common.runs_dir("whole"), [], []
    for number in range(counts["finished"]):
        folder = common.runs_dir(f"killed-{number}")
        for name in ("best.pt", "last.pt"):
            mismatches += differences(load(whole, name), load(folder, name))
        mismatches += [] if history(whole).equals(history(folder)) else [f"{folder}/history.csv"]
        leftovers += folder.rglob("*.part")
    assert not mismatches, (counts, mismatches)
    assert not leftovers, f"half-written files are not removed: {leftovers}"


def note_run(tiny, name, **changes):
    """Write settings.json of a run that began with the quick settings."""
    settings = dataclasses.asdict(step.Settings(**{**QUICK, **changes}))
    record = {**settings, "data": tiny.identity(), "note": "", "film_bits": 8}
    record.update(
        source_used="phantom", film_statistics={}, schedule={}, weights_used="none (random start)"
    )
    common.write_json(record, common.runs_dir(name) / "settings.json")
    return common.read_json(common.runs_dir(name) / "settings.json")


@pytest.mark.parametrize(
    "changes, named",
    [({"seed": 1}, "seed 0 -> 1"), ({"recipe": "plain"}, "recipe lesion -> plain")]
    + [({"batch_size": 4}, "batch_size 8 -> 4"), ({}, "split [0-9a-f]+ -> [0-9a-f]+")],
)
def test_resume_with_other_settings_or_data_is_refused_and_names_the_difference(
    tiny, changes, named
):
    note_run(tiny, "old")
    if not changes:
        changed = tiny.splits.assign(fold=(tiny.splits["fold"] + 1) % 3)
        common.write_csv(changed, tiny.folder / "splits.csv")
    with pytest.raises(UserError, match=named):
        train(run="old", resume=True, **changes)


def test_a_run_whose_looks_were_named_goes_on(tiny):
    train(run="one", looks="whole", epochs=1)
    gone_on = train(run="one", looks="whole", resume=True, epochs=2)
    assert gone_on.state.progress["epoch"] == 2
    assert step.Settings(looks=["whole"]).looks == ("whole",)  # as typed in a cell


@pytest.mark.parametrize(
    "name, value, said",
    [("epochs", 2.5, "0 to 99999 .int"), ("epochs", "3", "'3': expected 0 to 99999 .*quotes")]
    + [("seed", -1, "0 to 4294967295"), ("recipe", "lesions", "one of: lesion, plain")]
    + [("precision", "fp16", "one of: auto, fp32, bf16")],
)
def test_a_value_that_no_flag_would_take_is_refused_where_it_is_typed(name, value, said):
    with pytest.raises(UserError, match=f"--{name} .*{said}"):
        setattr(step.Settings(), name, value)


def test_resume_with_other_weights_than_the_run_began_with_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(network, "load_weights", lambda *given: network.Weights(None, "none"))
    train(run="old", weights="auto", freeze=-1)
    state = network.MammogramNet().backbone.state_dict()
    monkeypatch.setattr(network, "load_weights", lambda *given: network.Weights(state, "ImageNet"))
    with pytest.raises(UserError, match="none.*ImageNet"):
        go_on(run="old", epochs=2)


def test_a_run_that_goes_on_under_another_torch_is_no_more_bit_for_bit(tiny, capsys):
    path = train(run="old").run_folder / "settings.json"
    assert "bit for bit" not in capsys.readouterr().err
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "2.4.0"'), "utf-8")
    for epochs in (2, 3):  # and it stays so
        go_on(run="old", epochs=epochs)
        said = "old began with torch 2.4.0: not bit for bit any more"
        assert said in capsys.readouterr().err
        assert common.read_json(path)["torch"] == "2.4.0"


def test_truncated_last_state_is_named_and_the_best_one_offered(tiny):
    folder = train().run_folder / "fold-0"
    os.truncate(folder / "last.pt", 1000)
    with pytest.raises(UserError) as caught:
        train(resume=True, epochs=2)
    assert str(folder / "last.pt") in str(caught.value)
    assert f"{folder / 'best.pt'} is still there" in str(caught.value)


# ---------------------------------------------------------------------- names and refusals


def test_runs_are_numbered_and_a_taken_name_is_only_replaced_on_request(tiny):
    folders = [train().run_folder.name for _ in range(2)]
    assert folders == ["phantom-lesion-001", "phantom-lesion-002"]
    shutil.rmtree(common.runs_dir("phantom-lesion-001"))
    mark = common.runs_dir("phantom-lesion-002") / "mark.txt"
    mark.touch()
    with pytest.raises(UserError, match="phantom-lesion-002 exists.*--overwrite"):
        train(run="phantom-lesion-002")
    assert mark.exists()
    train(run="phantom-lesion-002", overwrite=True)
    assert not mark.exists() and train().run_folder.name == "phantom-lesion-003"


@pytest.mark.parametrize("fold", ["3", "-1", "x", "", "0,9", "0.5", "²"])
def test_bad_fold_is_refused_before_anything_is_deleted(tiny, fold):
    mark = common.runs_dir("old") / "mark.txt"
    common.write_json({}, mark)
    with pytest.raises(UserError, match="expected 0 to 2, all or none"):
        train(fold=fold, run="old", overwrite=True)
    assert mark.exists()


@pytest.mark.parametrize("name", ["..", ".", "../data", "a/b", "a\\b", " "])
def test_run_name_never_leads_out_of_the_folder_of_runs(tiny, home, name):
    common.runs_dir("other").mkdir(parents=True)
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError, match="--run"):
        train(run=name, overwrite=True)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_run_that_is_being_trained_is_refused_and_left_alone(tiny, how):
    record = note_run(tiny, "busy")
    with common.locked(common.runs_dir("busy")):
        with pytest.raises(UserError, match="another process|exists"):
            train(run="busy", **how)
        assert common.read_json(common.runs_dir("busy") / "settings.json") == record


def test_run_that_could_not_begin_does_not_take_its_name(tiny):
    with pytest.raises(UserError, match="missing.pth"):
        train(run="mine", weights="missing.pth")
    assert train(run="mine").run_folder.name == "mine"


# ---------------------------------------------------------------------- trouble on the way


def test_loss_that_is_not_finite_stops_with_its_films_named_and_the_state_kept(tiny, monkeypatch):
    whole, calls = network.predict, []

    def predict(*args, kept=None):  # before training, and at the end of the first epoch
        poisoned = lambda films, a, b, c, maps, *windows: (films * np.nan, maps)  # noqa: E731
        calls.append(monkeypatch.setattr(data, "augment", poisoned) if calls else "untrained")
        return whole(*args)

    monkeypatch.setattr(network, "predict", predict)
    with pytest.raises(UserError, match="nan in epoch 2.*lower --lr") as caught:
        train(run="nan", epochs=3)
    rows = data.fold_parts(tiny, 0)["train"]
    named = re.findall(r"mdb\d+", str(caught.value))
    assert len(named) == 8 and set(named) <= set(tiny.labels["image"].iloc[rows])
    assert load(common.runs_dir("nan"), "last.pt")["epoch"] == 1
    assert load(common.runs_dir("nan"))["epoch"] == 1


def test_state_with_a_validation_loss_that_is_not_finite_is_never_saved(tiny, monkeypatch):
    whole, factors = network.predict, [1, 1, np.nan]  # before training, and after each epoch

    def predict(*args, kept=None):
        return whole(*args)._replace(logits=whole(*args).logits * factors.pop(0))

    monkeypatch.setattr(network, "predict", predict)
    with pytest.raises(UserError, match="epoch 2"):
        train(run="nan", epochs=2)
    assert load(common.runs_dir("nan"), "last.pt")["epoch"] == 1


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("owner, name", [(data, "augment"), (torch.Tensor, "backward")])
def test_lack_of_memory_names_a_smaller_batch_size(tiny, owner, name, real, monkeypatch):
    """In the batch that is looked at, and in training."""

    def fail(*args, **kwargs):
        torch.empty(10**15) if real else None
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(UserError, match="memory.*--batch-size 4"):
        train()


def test_rates_fall_along_a_cosine_and_training_stops_without_a_better_loss(tiny, monkeypatch):
    answer_alike(monkeypatch)
    run = train(lr=0.01, epochs=20, patience=5, freeze=4)
    assert run.history["lr"].tolist() == pytest.approx(
        [0.01 * (1 + np.cos(np.pi * n / 20)) / 2 for n in range(6)]
    )
    groups = load(run.run_folder, "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [run.history["lr"].iloc[-1]] * 2
    assert load(run.run_folder)["epoch"] == 1
    run = go_on(epochs=8, patience=9)  # what is left falls to zero by then
    assert run.history["lr"].iloc[6:].tolist() == pytest.approx(
        [0.01 * (1 + np.cos(np.pi * n / 8)) / 2 for n in (6, 7)]
    )


def test_early_stopping_and_a_resume_that_has_nothing_to_do_say_so(tiny, monkeypatch, capsys):
    answer_alike(monkeypatch)
    train(epochs=20, patience=1)
    early = "fold 0 stopped early: 2 of 20 epochs are done, the best was 1; --resume with larger"
    assert early in capsys.readouterr().out
    go_on()
    assert early in capsys.readouterr().out
    go_on(patience=5, epochs=3)
    assert "fold 0 " not in (printed := capsys.readouterr().out).replace("fold 0 epoch", "")
    assert "fold 0 epoch  3/3" in printed
    go_on()
    assert "fold 0 was finished before: 3 of 3 epochs" in capsys.readouterr().out


def test_a_run_goes_on_with_its_own_source_whatever_was_prepared_last(tiny):
    train(run="old", source="auto")
    (tiny.folder.parent / "mias").mkdir()
    (tiny.folder.parent / "mias" / "prepared.json").write_text("newer, and opened by no resume")
    assert go_on(epochs=2).history["epoch"].tolist() == [1, 2]
    assert go_on(source="phantom").record["source_used"] == "phantom"
    with pytest.raises(UserError, match="source phantom -> mias"):
        go_on(source="mias")


def test_the_newest_run_is_the_one_begun_last_whatever_was_judged_since(tiny):
    for age, name in enumerate(("last", "first")):
        note_run(tiny, name)
        past = 1e9 - age
        os.utime(common.runs_dir(name) / "settings.json", (past, past))
    for name in ("predictions.csv", "metrics.json", "report.html"):
        (common.runs_dir("first") / name).touch()
    assert common.find_run() == common.runs_dir("last")
    assert common.find_run("first") == common.runs_dir("first")


def test_what_was_prepared_is_known_again_on_a_system_of_other_line_ends(tiny, monkeypatch):
    before = tiny.identity()
    monkeypatch.setattr(os, "linesep", "\r\n")
    assert common.load_prepared("phantom").identity() == before


def test_a_run_of_an_earlier_version_is_refused_in_one_message(tiny):
    record = note_run(tiny, "old")
    del record["looks"]
    common.write_json(record, common.runs_dir("old") / "settings.json")
    for resume in ("04_train.py", {"resume": True}), ("05_evaluate.py", {}):
        with pytest.raises(UserError, match="old is of an earlier version.*lacks: looks$"):
            conftest.run_main(resume[0], run="old", **resume[1])


def test_a_gradient_norm_of_zero_switches_its_limit_off(tiny):
    one, other = (train(run=name, max_norm=n).run_folder for name, n in {"a": 0, "b": 1e9}.items())
    assert_same_runs(one, other)


def test_the_share_of_patients_that_was_used_is_said_and_noted(tiny, capsys):
    for share, nearest in {0.7: 1.0, 0.6: 0.5}.items():
        films, all_films = (data.fold_parts(tiny, 0, train_share=s)["train"] for s in (share, 1))
        assert len(films) == pytest.approx(nearest * len(all_films), rel=0.1)
    record = common.read_json(train(run="part", train_share=0.6).run_folder / "settings.json")
    parts, patients = data.fold_parts(tiny, 0, train_share=0.6), tiny.labels["patient"]
    train_part, kept, test = (patients[parts[n]].nunique() for n in parts)
    share, validate = train_part / (16 - test - kept), kept / (16 - test)
    assert record["train_share_used"] == pytest.approx(share) and abs(share - 0.6) > 0.04
    assert record["validation_used"] == pytest.approx(validate)
    assert f"{validate:.2f} validate, of the others {share:.2f} train" in capsys.readouterr().out
    scope = conftest.run_main("05_evaluate.py", run="part", precision="fp32").scope
    assert f"{share:.0%} of the training patients" in scope


@pytest.mark.parametrize("size", [(9, 5), (16, 9), (10, 7)])
def test_maps_that_do_not_divide_into_places_are_pooled_on_the_cpu(size, monkeypatch):
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(1) or cpu(self))
    places = torch.zeros(2, 3, *(-(-side // 2) for side in size))
    step.lesion_loss(places, torch.rand(2, 2, *size).round(), torch.ones(2, dtype=torch.bool))
    assert moved == [1]
    step.lesion_loss(
        places, torch.rand(2, 2, *(2 * n for n in places.shape[2:])), torch.ones(2) > 0
    )
    assert moved == [1]


# ---------------------------------------------------------------------- machine, command line


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_automatic_precision_is_bf16_only_where_this_processor_multiplies_it(tiny):
    native = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    record = common.read_json(train(precision="auto").run_folder / "settings.json")
    assert record["precision_used"] == ("bfloat16" if native else "float32")


def test_bf16_trains_and_is_recorded(tiny):
    run = train(precision="bf16", freeze=4)
    assert common.read_json(run.run_folder / "settings.json")["precision_used"] == "bfloat16"
    assert np.isfinite(run.history.drop(columns="look")).all(axis=None)
    assert {v.dtype for v in load(run.run_folder)["model"].values()} == {torch.float32, torch.int64}


def test_command_prints_a_line_an_epoch_and_names_the_run_and_the_next_command(tiny, home):
    done = conftest.run_script("04_train.py", "--epochs", 2, "--weights", "none", "--freeze", 5)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert len(re.findall(r"^fold 0 epoch .*val loss", done.stdout, re.MULTILINE)) == 2
    assert "run phantom-lesion-001" in done.stdout
    assert "Next: python 05_evaluate.py --run phantom-lesion-001" in done.stdout
    assert (home / "runs" / "phantom-lesion-001" / "figures" / "history.png").stat().st_size > 1000


def test_tempering_favours_rare_classes_where_training_saw_them_as_they_are_too(tiny):
    run = train(balance="none", lr=0.05, epochs=2)
    judged = conftest.run_main("05_evaluate.py", run=run.run_folder.name, tempering=1.0)
    (fold,) = judged.fold_models
    counts = np.bincount(run.validation_films.labels, minlength=3).clip(0.5)
    assert fold.frequencies.tolist() == pytest.approx(counts / counts.sum())
    assert fold.prior.tolist() == [1, 1, 1]
    p = judged.predictions[["p_benign", "p_normal", "p_malignant"]].to_numpy()
    assert judged.predictions["predicted"].tolist() == (p / counts).argmax(1).tolist()
    assert (judged.predictions["predicted"] != p.argmax(1)).any()


def test_a_history_that_another_program_holds_open_does_not_end_a_training(
    tiny, monkeypatch, capsys
):
    """Windows replaces no file that Excel has open; the states are saved, and the end is loud."""
    replace = os.replace

    def refuse_history(source, target):
        if Path(target) == common.runs_dir("open/history.csv"):
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_history)
    with pytest.raises(UserError, match="no permission for .*open.history.csv; close it"):
        train(run="open", epochs=2)
    assert "history.csv; close it" in capsys.readouterr().err.split("after the next epoch")[0]
    fold = common.runs_dir("open/fold-0")
    assert pd.read_csv(fold / "history.csv")["epoch"].tolist() == [1, 2]
    assert common.read_checkpoint(fold / "last.pt")["epoch"] == 2
