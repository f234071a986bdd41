"""Step 4: what a run writes, that it can be stopped at any moment and gone on with, and refuses."""

import dataclasses
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from torchvision.models.resnet import BasicBlock, ResNet

import common
from common import UserError

step = importlib.import_module("04_train")
data, network, prepare = step.data, step.network, step.prepare
COLUMNS = (
    "fold,epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy,val_macro_f1,"
    "val_malignant_recall,seconds,films_per_second"
).split(",")
RANDOM = (None, "none (random start)")  # what load_weights returns for "none"


@pytest.fixture(scope="module")
def tiny_once(tmp_path_factory):
    """Prepare 16 patients on the smallest canvas, in 3 folds; by this seed 8 of them are normal."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(folder))
        small = {"patients": 16, "phantom_size": 128, "size": "64x64", "folds": 3, "seed": 464}
        prepare.prepare(prepare.Settings(source="phantom", **small))
    return folder


@pytest.fixture
def tiny(home, tiny_once, monkeypatch):
    """Return prepared films, and let steps train a ResNet of half the depth (for speed)."""
    monkeypatch.setattr(network, "resnet18", lambda weights=None: ResNet(BasicBlock, [1] * 4))
    shutil.copytree(tiny_once, home / "data")
    yield prepare.load_prepared("phantom")
    shutil.rmtree(home / "runs", ignore_errors=True)  # checkpoints are large


def wanted(**changes):
    """Return settings of a quick run: only the head is trained, unless `freeze` says otherwise."""
    quick = {"source": "phantom", "weights": "none", "epochs": 1, "precision": "fp32", "freeze": 5}
    return step.Settings(**{**quick, "device": "cpu", **changes})


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


def break_in(monkeypatch, name, call, error=KeyboardInterrupt, owner=step):
    """Raise `error` at the n-th call of a function, as a stop button may at any moment."""
    whole, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            monkeypatch.setattr(owner, name, whole)
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


# ---------------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("recipe", ["lesion", "plain"])
def test_run_writes_the_files_and_columns_of_the_contract(tiny, recipe, capsys):
    model, table, folder = step.train(wanted(recipe=recipe, epochs=2, freeze=4))
    record = json.loads((folder / "settings.json").read_text())
    named = {"recipe": recipe, "seed": 0, "batch_size": 8, "balance": "sampler", "weights": "none"}
    assert {**record, **named} == record
    assert record["run"] == folder.name and record["synthetic"] is True
    printed = capsys.readouterr().out
    assert record["split_seed"] == 464 and "split seed 464" in printed
    for path in (folder / "history.csv", folder / "fold-0" / "history.csv"):
        assert list(pd.read_csv(path)) == COLUMNS and pd.read_csv(path)["epoch"].tolist() == [1, 2]
    assert table["epoch"].tolist() == [1, 2]
    best, last = load(folder), load(folder, "last.pt")
    assert last["epoch"] == 2 and best["record"]["data"] == record["data"]
    parts = data.fold_parts(tiny.splits, tiny.labels, 0)
    kept = tiny.labels.iloc[parts["validation"]]
    assert set(best) == {"model", "validation", "prior", "epoch", "fold", "record"}
    for name in ("image", "patient", "laterality"):
        assert best["validation"][name] == kept[name].tolist()
    assert best["validation"]["labels"].tolist() == kept["label"].tolist()
    assert best["validation"]["logits"].shape == (len(kept), 3)
    assert not model.training and not differences(best["model"], dict(model.state_dict()))
    assert not list(folder.rglob("*.part"))
    assert f"Next: python 05_evaluate.py --run {folder.name}" in printed


def test_fold_all_trains_every_fold_once(tiny):
    _, table, folder = step.train(wanted(fold="all"))
    assert table["fold"].tolist() == [0, 1, 2] and history(folder)["fold"].tolist() == [0, 1, 2]
    images = [set(load(folder, fold=k)["validation"]["image"]) for k in range(3)]
    for fold, part in enumerate(images):
        assert not part & set(tiny.splits.loc[tiny.splits["fold"] == fold, "image"])


def test_no_film_of_a_test_patient_is_read_while_training(tiny):
    test = set(np.flatnonzero(tiny.splits["fold"] == 1))
    reads = []

    class Guarded:
        shape = tiny.films.shape

        def __len__(self):
            return len(tiny.films)

        def __getitem__(self, rows):
            reads.extend(np.atleast_1d(rows).tolist())
            return tiny.films[rows]

    guarded = tiny._replace(films=Guarded())
    step.fit_fold(wanted(epochs=2), guarded, 1, RANDOM, common.runs_dir("guarded"), {})
    assert test and len(set(reads)) > 8 and not test & set(reads)


@pytest.mark.parametrize("balance", ["sampler", "loss", "none"])
def test_rare_classes_count_by_the_sampler_or_the_loss_but_never_both(tiny, balance, monkeypatch):
    seen = []
    whole = step.film_loss

    def spy(logits, labels, weights=None, smoothing=0.0):
        seen.append(weights)
        return whole(logits, labels, weights, smoothing)

    trainer = step.Trainer(wanted(balance=balance), tiny, 0, RANDOM)
    monkeypatch.setattr(step, "film_loss", spy)
    trainer.train_epoch(common.Progress(1, ""))
    assert {w is not None for w in seen} == {balance == "loss"}
    drawn = [n for _ in range(80) for n in trainer.sampler]
    counts = np.bincount(drawn, minlength=len(trainer.training))
    shares = np.bincount(trainer.training.labels[trainer.training.rows][drawn]) / len(drawn)
    if balance == "sampler":
        assert shares == pytest.approx(1 / 3, abs=0.06)
    else:
        assert set(counts) == {80}, "not every film once an epoch"


def test_validation_figures_and_prior_follow_from_the_checkpoint(tiny):
    for balance, changes in {"sampler": {}, "none": {}, "loss": {"shuffle_labels": True}}.items():
        _, table, folder = step.train(wanted(balance=balance, lr=0.05, epochs=2, **changes))
        best, labels = load(folder), tiny.labels["label"].to_numpy()
        if changes:
            labels = step.shuffled_labels(tiny.labels, 0)
        parts, kept = data.fold_parts(tiny.splits, tiny.labels, 0), best["validation"]
        counts = np.bincount(labels[parts["train"]], minlength=3)
        prior = [1, 1, 1] if balance == "none" else counts / counts.sum()
        assert best["prior"].tolist() == pytest.approx(prior) and np.ptp(counts) > 3
        y = kept["labels"].numpy()
        judged = conftest.beside(kept["logits"], kept["patient"], kept["laterality"])
        assert np.abs(judged - kept["logits"].numpy()).max() > 1e-3 and y.tolist() == (
            labels[parts["validation"]].tolist()
        )
        p = conftest.bayes(judged, conftest.fitted(judged, y, best["prior"]), best["prior"])
        predicted = p.argmax(1)
        figures = [
            sk.log_loss(y, p, labels=range(3)),
            sk.accuracy_score(y, predicted),
            sk.f1_score(y, predicted, average="macro", zero_division=0),
            sk.recall_score(y == 2, predicted == 2, zero_division=0),
        ]
        row = table.set_index("epoch").loc[best["epoch"], COLUMNS[5:9]]
        assert row.tolist() == pytest.approx(figures, rel=1e-3), balance


def test_shuffled_labels_move_between_patients_and_pairs_stay_together(tiny):
    labels = pd.concat([tiny.labels] * 3, ignore_index=True)[["patient", "label"]]
    labels["patient"] = np.arange(len(labels)) // 2
    labels = labels.iloc[:-1]  # one patient with one film
    mixed = labels.assign(label=step.shuffled_labels(labels, 0))
    pairs, moved = (t.groupby("patient")["label"].apply(tuple) for t in (labels, mixed))
    assert sorted(pairs) == sorted(moved) and (pairs != moved).sum() > 10
    assert (mixed["label"] != step.shuffled_labels(labels, 1)).any()
    trainer = step.Trainer(wanted(shuffle_labels=True), tiny, 0, RANDOM)
    for part in (trainer.training, trainer.validation):
        assert part.labels.tolist() == step.shuffled_labels(tiny.labels, 0).tolist()


# ---------------------------------------------------------------------- stopping and going on


def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tiny, monkeypatch, capsys):
    changes = {"epochs": 2, "freeze": 3, "lr_patience": 1}
    whole = step.train(wanted(run="whole", **changes))[2]
    break_in(monkeypatch, "film_loss", 4)  # 2 batches an epoch
    folder = step.train(wanted(run="stopped", **changes))[2]
    assert "the state of epoch 1 is saved" in (printed := capsys.readouterr().out)
    assert "Next: python 04_train.py --resume --run stopped" in printed
    assert load(folder, "last.pt")["epoch"] == 1
    torch.rand(7), np.random.rand(7)  # what else is drawn in a session must not matter
    assert step.train(step.Settings(resume=True))[2] == folder
    for name in ("best.pt", "last.pt"):
        assert differences(load(whole, name), load(folder, name)) == []
    pd.testing.assert_frame_equal(history(whole), history(folder))
    assert differences(load(whole), load(whole, "last.pt")), "compares nothing"


@pytest.mark.parametrize("name, call", [("save_checkpoint", 2), ("write_history", 1)])
def test_stop_between_two_files_says_what_is_saved_and_loses_no_row(tiny, name, call, monkeypatch):
    owner, name = (common, "write_csv") if name == "write_history" else (step, name)
    break_in(monkeypatch, name, call, owner=owner)
    _, _, folder = step.train(wanted(run="stopped"))
    _, table, folder = step.train(wanted(run="stopped", resume=True))
    assert table["epoch"].tolist() == [1] and history(folder)["epoch"].tolist() == [1]
    assert pd.read_csv(folder / "fold-0" / "history.csv")["epoch"].tolist() == [1]


def test_full_disk_ends_with_one_message_and_the_last_state_stays(tiny, monkeypatch):
    folder = step.train(wanted(run="whole"))[2]
    files = sorted((folder / "fold-0").iterdir())
    before = [path.read_bytes() for path in files]

    def fill_the_disk(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(UserError, match=r"the disk is full.*\.pt"):
        step.train(wanted(run="whole", resume=True, epochs=2))
    assert sorted((folder / "fold-0").iterdir()) == files, "a part was left behind"
    assert [path.read_bytes() for path in files] == before


def test_message_of_a_stop_names_the_epoch_that_is_saved(tiny, monkeypatch, capsys):
    monkeypatch.setattr(step.Trainer, "validate", constant_validation(step.Trainer.validate))
    break_in(monkeypatch, "save_checkpoint", 3)  # best and last of epoch 1, last of epoch 2
    folder = step.train(wanted(epochs=2))[2]
    assert load(folder, "last.pt")["epoch"] == 1
    assert "the state of epoch 1 is saved" in capsys.readouterr().out


KILLS = """
import importlib, json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from torchvision.models.resnet import BasicBlock, ResNet
step = importlib.import_module("04_train")
step.network.resnet18 = lambda weights: ResNet(BasicBlock, [1, 1, 1, 1])
runs = step.common.runs_dir()
quick = dict(source="phantom", weights="none", epochs=3, precision="fp32", freeze=5, device="cpu")
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
            step.train(step.Settings(run=name, resume=resume, overwrite=not resume, **quick))
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
while counts["kills"] < 20 and time.time() - start < 200:
    name = f"killed-{counts['finished']}"
    counts["finished"] += life(name, random.uniform(0.1, 0.7) * span, counts["lives"] % 2 == 0)
name = f"killed-{counts['finished']}"
counts["finished"] += life(name, 1e9, False)
print(json.dumps({**counts, "seconds": round(time.time() - start, 1)}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_run_killed_at_random_moments_ends_as_if_it_had_never_been(tiny):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(conftest.PROJECT)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["kills"] >= 20 and counts["resumes"] >= 10 and counts["in_writes"] >= 3, counts
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


@pytest.mark.parametrize(
    "changes, named",
    [({"seed": 1}, "seed 0 -> 1"), ({"recipe": "plain"}, "recipe lesion -> plain")]
    + [({"batch_size": 4}, "batch_size 8 -> 4"), ({}, "split [0-9a-f]+ -> [0-9a-f]+")],
)
def test_resume_with_other_settings_or_data_is_refused_and_names_the_difference(
    tiny, changes, named
):
    record = {**dataclasses.asdict(wanted()), "recipe": "lesion", "data": step.describe_data(tiny)}
    common.write_json(record, common.runs_dir("old") / "settings.json")
    if not changes:
        changed = tiny.splits.assign(fold=(tiny.splits["fold"] + 1) % 3)
        common.write_csv(changed, tiny.folder / "splits.csv")
    with pytest.raises(UserError, match=named):
        step.train(wanted(run="old", resume=True, **changes))


def test_resume_with_other_weights_than_the_run_began_with_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(network, "load_weights", lambda weights: (None, "none (random start)"))
    step.train(wanted(run="old", weights="auto", freeze=-1))
    state = {k: v for k, v in network.resnet18().state_dict().items() if k[:3] != "fc."}
    monkeypatch.setattr(network, "load_weights", lambda weights: (state, "ImageNet"))
    with pytest.raises(UserError, match="none.*ImageNet"):
        step.train(step.Settings(run="old", resume=True, epochs=2))


def test_truncated_last_state_is_named_and_the_best_one_offered(tiny):
    folder = step.train(wanted())[2] / "fold-0"
    os.truncate(folder / "last.pt", 1000)
    with pytest.raises(UserError) as caught:
        step.train(wanted(resume=True, epochs=2))
    assert str(folder / "last.pt") in str(caught.value)
    assert f"{folder / 'best.pt'} is still there" in str(caught.value)


# ---------------------------------------------------------------------- names and refusals


def test_runs_are_numbered_and_a_taken_name_is_only_replaced_on_request(tiny):
    folders = [step.train(wanted())[2].name for _ in range(2)]
    assert folders == ["phantom-lesion-001", "phantom-lesion-002"]
    shutil.rmtree(common.runs_dir("phantom-lesion-001"))
    mark = common.runs_dir("phantom-lesion-002") / "mark.txt"
    mark.touch()
    with pytest.raises(UserError, match="phantom-lesion-002 exists.*--overwrite"):
        step.train(wanted(run="phantom-lesion-002"))
    assert mark.exists()
    step.train(wanted(run="phantom-lesion-002", overwrite=True))
    assert not mark.exists() and step.train(wanted())[2].name == "phantom-lesion-003"


@pytest.mark.parametrize("fold", ["3", "-1", "x", "", "0,9", "0.5", "²"])
def test_bad_fold_is_refused_before_anything_is_deleted(tiny, fold):
    mark = common.runs_dir("old") / "mark.txt"
    common.write_json({}, mark)
    with pytest.raises(UserError, match="expected 0 to 2, or all"):
        step.train(wanted(fold=fold, run="old", overwrite=True))
    assert mark.exists()


@pytest.mark.parametrize("name", ["..", ".", "../data", "a/b", "a\\b", " "])
def test_run_name_never_leads_out_of_the_folder_of_runs(tiny, name, monkeypatch):
    common.runs_dir("other").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--run"):
        patch.setattr(step.shutil, "rmtree", lambda path: pytest.fail(f"would delete {path}"))
        step.train(wanted(run=name, overwrite=True))


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_run_that_is_being_trained_is_refused_and_left_alone(tiny, how):
    record = {**dataclasses.asdict(wanted()), "data": step.describe_data(tiny)}
    common.write_json(record, common.runs_dir("busy") / "settings.json")
    with common.locked(common.runs_dir("busy")):
        with pytest.raises(UserError, match="another process|exists"):
            step.train(wanted(run="busy", **how))
        assert common.runs_dir("busy/settings.json").is_file()


def test_run_that_could_not_begin_does_not_take_its_name(tiny):
    with pytest.raises(UserError, match="missing.pth"):
        step.train(wanted(run="mine", weights="missing.pth"))
    assert step.train(wanted(run="mine"))[2].name == "mine"


# ---------------------------------------------------------------------- trouble on the way


def test_loss_that_is_not_finite_stops_with_its_films_named_and_the_state_kept(tiny, monkeypatch):
    whole, epochs = step.Trainer.train_epoch, []

    def poisoned(trainer, progress):
        epochs.append(trainer)
        if len(epochs) == 2:
            monkeypatch.setattr(step, "film_loss", lambda logits, *rest: logits.sum() * np.nan)
        return whole(trainer, progress)

    monkeypatch.setattr(step.Trainer, "train_epoch", poisoned)
    with pytest.raises(UserError, match="nan in epoch 2.*lower --lr") as caught:
        step.train(wanted(run="nan", epochs=3))
    train = tiny.labels["image"].iloc[data.fold_parts(tiny.splits, tiny.labels, 0)["train"]]
    named = re.findall(r"mdb\d+", str(caught.value))
    assert len(named) == 8 and set(named) <= set(train)
    assert load(common.runs_dir("nan"), "last.pt")["epoch"] == 1
    assert load(common.runs_dir("nan"))["epoch"] == 1


def test_state_with_a_validation_loss_that_is_not_finite_is_never_saved(tiny, monkeypatch):
    whole = step.Trainer.validate

    def validate(trainer):
        logits, labels, metrics = whole(trainer)
        value = metrics["val_loss"] if trainer.epoch == 0 else np.nan
        return logits, labels, {**metrics, "val_loss": value}

    monkeypatch.setattr(step.Trainer, "validate", validate)
    with pytest.raises(UserError, match="epoch 2"):
        step.train(wanted(run="nan", epochs=2))
    assert load(common.runs_dir("nan"), "last.pt")["epoch"] == 1


@pytest.mark.parametrize("real", [False, True])
def test_lack_of_memory_names_a_smaller_batch_size(tiny, real, monkeypatch):
    def train_epoch(trainer, progress):
        torch.empty(10**15) if real else None
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(step.Trainer, "train_epoch", train_epoch)
    with pytest.raises(UserError, match="memory.*--batch-size 4"):
        step.train(wanted())


def constant_validation(whole):
    """Return a validate() whose loss never changes."""

    def validate(trainer):
        logits, labels, metrics = whole(trainer)
        return logits, labels, {**metrics, "val_loss": 1.0}

    return validate


def test_rates_are_halved_and_training_stops_without_a_better_validation_loss(tiny, monkeypatch):
    monkeypatch.setattr(step.Trainer, "validate", constant_validation(step.Trainer.validate))
    monkeypatch.setattr(step.Trainer, "train_epoch", lambda trainer, progress: (1.0, 0.5))
    changes = {"epochs": 20, "patience": 5, "lr_patience": 2, "freeze": 4}
    _, table, folder = step.train(wanted(lr=0.5, weights="none", **changes))
    assert table["lr"].tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    rates = [group["lr"] for group in load(folder, "last.pt")["optimizer"]["param_groups"]]
    assert rates == [0.125, 0.125] and load(folder)["epoch"] == 1


# ---------------------------------------------------------------------- machine, command line


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_automatic_precision_is_bf16_only_where_this_processor_multiplies_it(tiny):
    native = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    trainer = step.Trainer(wanted(precision="auto"), tiny, 0, RANDOM)
    assert trainer.dtype == (torch.bfloat16 if native else torch.float32)


def test_bf16_trains_and_is_recorded(tiny):
    _, table, folder = step.train(wanted(precision="bf16", freeze=4))
    assert common.read_json(folder / "settings.json")["precision_used"] == "bfloat16"
    assert np.isfinite(table).all(axis=None)
    assert {v.dtype for v in load(folder)["model"].values()} == {torch.float32, torch.int64}


def test_stopwatch_adds_up_phases_and_puts_the_longest_first(monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(ticks))
    watch = common.Stopwatch()
    for phase in ("backward", "forward", "backward"):
        with watch(phase):
            pass
    found = watch.table()
    assert found.index.tolist() == ["backward", "forward"]
    assert found["seconds"].tolist() == [5, 3] and found["share"].tolist() == [0.625, 0.375]


def test_profile_shows_every_phase_and_is_silent_unless_asked_for(tiny, capsys):
    phases = "batches augmentation forward backward optimiser validation checkpoints".split()
    step.train(wanted())
    assert "where the time" not in capsys.readouterr().out
    start = time.perf_counter()
    step.train(wanted(profile=True))
    limit, printed = time.perf_counter() - start, capsys.readouterr().out
    printed = printed.split("where the time of fold 0 went\n")[1].split("\n\n")[0]
    rows = {
        line.split()[0]: tuple(map(float, line.split()[1:])) for line in printed.split("\n")[1:]
    }
    assert sorted(rows) == sorted(phases) and min(seconds for seconds, _ in rows.values()) >= 0
    assert sum(share for _, share in rows.values()) == pytest.approx(1, abs=0.01)
    assert 0.02 * limit < sum(seconds for seconds, _ in rows.values()) < limit


def test_command_prints_a_line_an_epoch_and_names_the_run_and_the_next_command(tiny, home):
    done = conftest.run_script("04_train.py", "--epochs", 2, "--weights", "none")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert len(re.findall(r"^fold 0 epoch .*val loss", done.stdout, re.MULTILINE)) == 2
    assert "run phantom-lesion-001" in done.stdout
    assert "Next: python 05_evaluate.py --run phantom-lesion-001" in done.stdout
    assert (home / "runs" / "phantom-lesion-001" / "figures" / "history.png").stat().st_size > 1000
