"""Step 4 under torchrun: two processes share the folds, or train a single one together."""

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import conftest
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from conftest import run_main
from scripts import flags
from test_train import differences, history, load

import common
from common import UserError

step = scripts.definitions("04_train")
data, network = step.data, step.network
MACHINE = {"device": "cpu", "precision": "fp32", "weights": "none"}
DEALT = {"source": "phantom", "fold": "all", "freeze": 4, "patience": 9, **MACHINE}
# The head alone is trained, so that batch-norm is the same for a half and for the whole batch.
TOGETHER = {"source": "phantom", "recipe": "plain", "freeze": 5, "augment": 0.0, "dropout": 0.0,
            "balance": "none", "batch_size": 4, "max_norm": 1e9, **MACHINE}  # fmt: skip

LAUNCHED = ("torchrun", "--nproc-per-node", "2", "--")  # before the script, as README has it

# One team runs the script again and again, since a start costs seconds. Each line of the plan is a
# command line, or a file that is damaged. Noted is what every process trains on.
TEAM = """
import importlib, json, os, runpy, sys
project, home, plan = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, project)
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet
data, network = (importlib.import_module(name) for name in ("02_dataset", "03_model"))
torchvision.models.resnet18 = lambda weights=None: ResNet(BasicBlock, [1] * 4)
whole, number = data.batches, 0

def note(batch):
    with open(f"{home}/rows-{os.environ['RANK']}.txt", "a") as notes:
        notes.write(json.dumps([number, batch[2].tolist()]) + "\\n")
    return batch

def noting(dataset, batch_size, sampler=None):
    loader = whole(dataset, batch_size, sampler)
    loader.collate_fn = loader.collate_fn if sampler is None else note
    return loader

data.batches = noting
for number, line in enumerate(plan):
    if isinstance(line, str):
        os.environ["RANK"] == "0" and os.truncate(line, 1000)
    else:
        sys.argv = [f"{project}/04_train.py", *line]
        runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """Let two processes train, go on, and fail; give what they left."""
    home = tmp_path_factory.mktemp("torchrun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(home / "data"))
        patch.setenv("BCD_RUNS_DIR", str(home / "runs"))
        conftest.small_network(patch)
        patch.setattr(common, "show", lambda figure, path=None, title="": plt.close(figure))
        small = {"patients": 20, "phantom_size": 128, "size": "64x64", "folds": 4}
        prepared = conftest.prepare_data(source="phantom", **small)
        plan = [
            flags(**TOGETHER, run="together", epochs=1),
            flags(resume=True, run="together", epochs=2),
            flags(**DEALT, run="dealt", epochs=1),
            str(home / "runs" / "dealt" / "fold-1" / "last.pt"),
            flags(resume=True, run="dealt", epochs=2),
        ]
        (home / "team.py").write_text(TEAM)
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *LAUNCHED[1:]]
            + [str(home / "team.py"), str(conftest.PROJECT), str(home), json.dumps(plan)],
            capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"},  # takes a free port
        )  # fmt: skip
        read = [(home / f"rows-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
        yield SimpleNamespace(
            prepared=prepared,
            done=done,
            runs=home / "runs",
            rows=[[json.loads(line) for line in lines] for lines in read],
        )


def trained_on(team, number):
    """Return the batches of each process in a line of the plan, without the one looked at."""
    return [[rows for n, rows in lines if n == number][1:] for lines in team.rows]


def test_damaged_fold_is_named_the_others_finish_and_the_status_is_1(team):
    assert team.done.returncode != 0
    said = [line for line in team.done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, team.done.stderr
    damaged = team.runs / "dealt" / "fold-1"
    assert "fold 1: " in said[0] and f"delete {damaged}" in said[0] and "fold 3" not in said[0]
    epochs = {fold: load(team.runs / "dealt", "last.pt", fold)["epoch"] for fold in (0, 2, 3)}
    assert epochs == {0: 2, 2: 2, 3: 2}
    table = history(team.runs / "dealt")
    assert table.groupby("fold")["epoch"].max().to_dict() == {0: 2, 1: 1, 2: 2, 3: 2}


def test_dealt_folds_equal_those_of_one_process_bit_for_bit(team):
    """Follows the test above: fold 1 is deleted and trained anew."""
    dealt = team.runs / "dealt"
    for path in (dealt / "fold-1").glob("*"):
        path.unlink()
    run_main("04_train.py", resume=True, run="dealt")
    assert len(history(dealt)) == 8, "not only fold 1 was trained"
    whole = run_main("04_train.py", run="whole", epochs=2, **DEALT).run_folder
    pd.testing.assert_frame_equal(history(whole), history(dealt))
    for fold in range(4):
        for name in ("best.pt", "last.pt"):
            assert differences(load(whole, name, fold), load(dealt, name, fold)) == []
    files = [
        {str(p.relative_to(f)) for p in f.rglob("*") if "figures" not in str(p)}
        for f in (whole, dealt)
    ]
    assert files[0] == files[1] and "fold-3/history.csv" in files[0]
    assert all(trained_on(team, 2)), "one process trained everything"
    told = [f"fold {fold} epoch  1/1" in team.done.stdout for fold in range(4)]
    assert told == [True, False, True, False], "not the first process alone"


def test_two_processes_see_disjoint_halves_of_every_batch(team):
    train = data.fold_parts(team.prepared, 0)["train"]
    orders = []
    for number in (0, 1):
        halves = trained_on(team, number)
        assert len(halves[0]) == len(halves[1]) == len(train) // 8
        assert all(len(rows) == 4 for half in halves for rows in half)
        seen = np.array(halves).flatten().tolist()
        assert len(set(seen)) == len(seen) and set(seen) <= set(train.tolist())
        orders.append(seen)
    assert orders[0] != orders[1], "the resumed epoch repeats the first"


def test_two_processes_learn_what_one_learns_from_the_whole_batches(team, monkeypatch):
    random = network.Weights(None, "none (random start)")  # what load_weights returns for "none"
    settings = step.Settings(**TOGETHER, epochs=2)
    schedule = step.schedule_of(step.filled_in(settings, team.prepared, random))
    waits, films = schedule.loc["whole"], step.fold_films(team.prepared, 0, settings)
    made = step.network_and_optimizer(settings, random)
    state, whole = step.FoldState(0, "whole", settings, waits, films, made), data.batches
    scheduler = step.falling_rates(state)
    place = {row: n for n, row in enumerate(state.train_films.rows.tolist())}
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    table, last = history(team.runs / "together"), load(team.runs / "together", "last.pt")
    for number in (0, 1):
        pairs = zip(*trained_on(team, number))
        steps = [[place[row] for half in pair for row in half] for pair in pairs]

        def batches(dataset, batch_size, sampler=None, steps=steps):
            if sampler is None:
                return whole(dataset, batch_size)
            return (dataset.__getitems__(numbers) for numbers in steps)

        monkeypatch.setattr(data, "batches", batches)
        loss, accuracy = step.train_epoch(state, common.Progress(1, ""))
        _, metrics = step.validate(state)
        scheduler.step()
        row = table.iloc[number]
        assert row["train_loss"] == pytest.approx(loss, rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(accuracy)
        for name, value in metrics.items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
    moments = state.optimizer.state_dict()["state"]
    assert moments and set(moments) == set(last["optimizer"]["state"])
    for key, moment in moments.items():
        found = last["optimizer"]["state"][key]
        assert found["step"] == moment["step"] >= 4
        for name in ("exp_avg", "exp_avg_sq"):  # the gradients, and their squares
            limit = 1e-4 * moment[name].abs().max().item()
            assert limit > 0 and torch.allclose(found[name], moment[name], 0, limit)
    changed = 0
    for name, value in state.model.state_dict().items():
        assert torch.allclose(last["model"][name], value, 1e-3, 1e-5), name
        changed += not value.equal(before[name])
    assert changed == 3, "head and film bias"


def test_fold_trained_together_can_be_evaluated(team):
    machine = {"device": "cpu", "precision": "fp32"}
    found = run_main("05_evaluate.py", run="together", resamples=20, **machine)
    (fold,) = found.fold_models
    assert all(torch.isfinite(value).all() for value in fold.models[0].state_dict().values())
    parts = data.fold_parts(team.prepared, 0)
    validation = data.MammogramDataset(team.prepared, parts["validation"])
    again = network.predict(fold.models[0], validation).logits
    assert torch.allclose(again, fold.validation["logits"], 1e-4, 1e-4), "out of order"
    assert again.std(0).min() > 1e-4
    test = team.prepared.labels["image"].iloc[parts["test"]]
    assert sorted(found.predictions["image"]) == sorted(test)
    assert np.isfinite(found.predictions[found.PROBABILITIES]).all(axis=None)


def test_when_every_fold_fails_each_is_named_also_before_the_first_epoch(team, monkeypatch):
    def fail(loss):
        raise UserError("no good")

    monkeypatch.setattr(common, "processes", lambda: (0, 2))  # the first of two, and alone
    monkeypatch.setattr(common, "collect", lambda value: [value])
    monkeypatch.setattr(common, "first_process_first", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "backward", fail)
    with pytest.raises(UserError, match="fold 0: no good; fold 2: no good"):
        run_main("04_train.py", run="hopeless", epochs=1, **DEALT)
