"""Step 5: judge a run on patients that its models never saw, or read a film of your own.

In:  a run of step 4 and the films that step 1 prepared.
Out: runs/<run>/predictions.csv, metrics.json, report.html and figures/.

    python 05_evaluate.py                                     the newest run
    python 05_evaluate.py --run mias-lesion-001 --recall 0.9  another one, another operating point
    python 05_evaluate.py --compare RUN1 RUN2                 two runs, and their difference
    python 05_evaluate.py --compare RUN1 RUN2 RUN3            repeats, and their mean
    python 05_evaluate.py --image film.png --laterality left  a film of yours
    python 05_evaluate.py --image left.png right.png --pair   both breasts of one person
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import base64
import html
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Tuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    classification_report,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from torch.nn import functional as F

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

prepare = importlib.import_module("01_prepare_data")
data = importlib.import_module("02_dataset")
network = importlib.import_module("03_model")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(common.RunSettings):
    """What to judge, and how."""

    script = "05_evaluate.py"
    recall: float = 0.95  # wanted share of malignant films found, for the operating point
    tempering: float = 0.33  # how far rare classes are favoured in what a film is called, 0 to 1
    resamples: int = 2000  # of patients, for the 95 % intervals
    compare: Tuple[str, ...] = ()  # two runs: their difference; more: their mean
    image: Tuple[str, ...] = ()  # films of your own to read, in place of judging the run
    laterality: str = ""  # left or right, of your (first) film; empty: guessed, its brighter side
    pair: bool = False  # your two films are both breasts of one person, judged beside each other


PROBABILITIES = [f"p_{name}" for name in CLASS_NAMES]
ALONE = [f"alone_{name}" for name in CLASS_NAMES]  # the same without the other breast
CLAIM = {"accuracy": 0.82, "malignant recall": 0.95, "macro F1": 0.81}  # seed project, no protocol

if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% Load the run: the best checkpoints of every fold that was trained
# A fold has a network for each look, whose logits are averaged. Validation films chose their
# epochs; the checkpoints keep these films' logits, and from them come the other breast's weight and
# the temperature.
class FoldModel(NamedTuple):
    """A fold's networks, in evaluation mode, with what turns their logits into probabilities."""

    number: int
    models: list
    reduce: list  # how many times each of them has films reduced
    prior: torch.Tensor  # (3,), how frequent the classes are in training
    calibration: dict  # temperatures "beside" the other breast and "alone", its "weight"
    validation: dict  # image, patient, laterality, logits (n, 3) and labels (n,) of the best epochs
    epochs: list

    def read(self, dataset, *arguments, **options):
        """Return the Reading of a dataset, of all looks together; see `network.predict`."""
        readings = [
            network.predict(model, dataset.reduced(times), *arguments, maps=True, **options)
            for model, times in zip(self.models, self.reduce)
        ]
        return network.mean_reading(readings)

    def probabilities(self, logits, films, beside):
        """Return calibrated probabilities (n, 3); `films` has each one's patient and laterality."""
        if beside:
            logits = network.beside_other_breast(logits, films, self.calibration["weight"])
        temperature = self.calibration["beside" if beside else "alone"]
        return network.probabilities(logits, temperature, self.prior)


def load_folds(folder, record, device="auto"):
    """Return the FoldModels of a run (folder runs/<run>, record its settings.json), in order."""
    found = {}
    for path in sorted(folder.glob("fold-*/best.pt")):
        checkpoint = common.read_checkpoint(path)
        if "reduce" not in checkpoint:
            raise UserError(f"{path} was made by an earlier version; train again")
        model = network.MammogramNet(record["recipe"], record["dropout"])
        try:
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not fit recipe {record['recipe']} ({reason})") from None
        model = model.to(common.choose_device(device), memory_format=torch.channels_last)
        checkpoint["model"] = model.eval().requires_grad_(False)  # Grad-CAM asks for its own
        found.setdefault(checkpoint["fold"], {})[checkpoint["reduce"]] = checkpoint
    shared, folds = set.intersection(*map(set, found.values())) if found else set(), []
    if not shared:
        raise UserError(f"{folder} has no fold-K/best.pt yet; python 04_train.py --resume makes it")
    if len(shared) < len(record["looks"]):
        common.warn(
            f"not every fold of {folder.name} is trained with both looks yet, so that one look "
            "alone is judged; python 04_train.py --resume trains the rest"
        )
    for number, by_reduction in found.items():
        looks = [by_reduction[times] for times in sorted(shared, reverse=True)]
        logits = torch.stack([look["validation"]["logits"] for look in looks]).mean(0)
        validation, prior = {**looks[0]["validation"], "logits": logits}, looks[0]["prior"]
        weight, beside = network.fit_calibration(logits, validation, validation["labels"], prior)
        alone = network.fit_temperature(logits, validation["labels"], prior)[1]
        fitted = {"beside": beside, "alone": alone, "weight": weight}
        models, reduce, epochs = ([look[n] for look in looks] for n in ("model", "reduce", "epoch"))
        folds.append(FoldModel(number, models, reduce, prior, fitted, validation, epochs))
    return folds


# %% The run: its folds, and the films that it was trained on
# The newest run, or the one in settings.run. Without any, step 4 is run first. `model` is the first
# fold's, to look at.
def open_run(name):
    """Return the folder and the settings.json of a run; by default the newest, or a first one."""
    if not name and not any(common.runs_dir().glob("*/settings.json")):
        print("there is no run yet; running 04_train.py", flush=True)
        common.run_step("04_train.py")
    folder = common.find_run(name)
    return folder, common.read_record(folder)


judging = False
if __name__ == "__main__":
    common.check_settings(settings, "05_evaluate.py")
    judging = not (settings.compare or settings.image)
    if judging:
        judged_run, judged_record = open_run(settings.run)
        fold_models = load_folds(judged_run, judged_record, settings.device)
        model = fold_models[0].models[0]
        run_data = common.open_prepared(judged_record["source_used"])
        chosen_on_validation = pd.DataFrame(
            [(f.number, common.listing(f.epochs), *f.calibration.values(),
              len(f.validation["labels"])) for f in fold_models],
            columns=["fold", "best epochs", "temperature", "temperature alone",
                     "weight of the other breast", "validation films"],
        )  # fmt: skip
        common.table(chosen_on_validation.round(2), f"run {judged_run.name}")


# %% Predict: every film by the model that never saw its patient, and where that model looked
# A film is predicted once, by the model of the fold that it was the test film of. The films, labels
# and folds must be those of the training: they are compared by digests.
def predict_run(folds, prepared, record, settings):
    """Predict the test films of every fold.

    Returns
    -------
    predictions : DataFrame
        image, patient, fold, label, p_benign, p_normal, p_malignant (calibrated, judged beside the
        patient's other breast), predicted, and the probabilities of each film alone.
    reading : Reading
        In the same order.
    """
    if prepared.identity() != record["data"]:
        raise UserError(
            f"{prepared.folder} holds other films, labels or folds than the run was trained on; "
            "prepare them as they were (step 1), or train again"
        )
    shuffled = record["shuffle_labels"]
    labels = data.shuffled_labels(prepared.labels, record["seed"]) if shuffled else None
    dtype = common.choose_precision(settings.precision, common.choose_device(settings.device))
    parts = [np.flatnonzero(prepared.splits["fold"] == fold.number) for fold in folds]
    progress = common.Progress(len(folds[0].models) * sum(map(len, parts)), "predicting")
    tables, readings = [], []
    for fold, rows in zip(folds, parts):
        test = data.MammogramDataset(prepared, rows, labels)
        read = fold.read(test, settings.batch_size, dtype, progress)
        table = prepared.splits.iloc[rows][["image", "patient", "fold"]].copy()
        table["label"] = test.labels.numpy()
        table[PROBABILITIES] = fold.probabilities(read.logits, test.table(), beside=True)
        p = table[PROBABILITIES].to_numpy()
        table["predicted"] = network.decide(p, fold.prior, settings.tempering)
        table[ALONE] = fold.probabilities(read.logits, test.table(), beside=False)
        tables.append(table)
        readings.append(read)
    progress.close()
    reading = network.Reading(*(np.concatenate(column) for column in zip(*readings)))
    return pd.concat(tables, ignore_index=True), reading


if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    predictions, reading = predict_run(fold_models, run_data, judged_record, settings)
    common.write_csv(predictions.round(6), judged_run / "predictions.csv")
    common.table(predictions.head(6).round(3), f"the first of n = {len(predictions)} predictions")
    note = f"{judged_record['note']}, " if judged_record["note"] else ""
    if judged_record.get("train_share", 1) < 1:
        note += f"{judged_record['train_share']:.0%} of the training patients, "
    if len(fold_models[0].models) < len(judged_record["looks"]):
        note += "one look of two, "
    scope = (
        f"{'SYNTHETIC PHANTOMS, ' if judged_record['synthetic'] else ''}{note}n = "
        f"{len(predictions)} films of {predictions['patient'].nunique()} patients, "
        f"{len(fold_models)} of {judged_record['data']['folds']} folds, split seed "
        f"{judged_record['split_seed']},\ntraining seed {judged_record['seed']}, weights: "
        f"{judged_record['weights_used']}"
    )
    print(scope)


# %% Operating point: a threshold that validation patients choose, applied to test patients
# Screening asks for a recall, and takes the specificity that comes with it. The threshold is chosen
# on validation films, so that the recall on test films is a result, not a choice.
def choose_threshold(scores, positive, recall):
    """Return the highest threshold at which the wanted share of positives lies at or above it.

    Parameters
    ----------
    scores : ndarray of float, shape (n,)
        p_malignant of validation films.
    positive : ndarray of bool, shape (n,)
        Which are malignant.
    recall : float
        0 to 1.

    Returns
    -------
    threshold : float
        0 (recall every film) if no film is positive.
    """
    ranked = np.sort(scores[positive])[::-1]
    needed = math.ceil(recall * len(ranked) - 1e-9)
    return float(ranked[max(needed, 1) - 1]) if len(ranked) else 0.0


def operating_points(folds, recall, beside=True):
    """Return a row per fold: its threshold and the malignant validation films that chose it."""
    if not 0 <= recall <= 1:
        raise UserError(f"--recall {recall}: expected a share, 0 to 1")
    rows = []
    for fold in folds:
        scores = fold.probabilities(fold.validation["logits"], fold.validation, beside)
        positive = fold.validation["labels"].numpy() == MALIGNANT
        threshold = choose_threshold(scores[:, MALIGNANT], positive, recall)
        rows.append((fold.number, threshold, int(positive.sum()), len(positive)))
    return pd.DataFrame(rows, columns=["fold", "threshold", "malignant", "films"])


# %% The interval of a share
# Nine of ten found sounds like 90 %, and may be 60 %. Wilson's interval is right for small numbers
# too, where the textbook one leaves 0 to 1.
def wilson(hits, n):
    """Return the 95 % interval of a share (Wilson, JASA 1927)."""
    if n == 0:
        return math.nan, math.nan
    z, share = 1.959964, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


# %% The operating point of each fold
# A film at or above its fold's threshold is recalled: called back for a second look. With few
# malignant validation films no recall can be promised; how few is said.
def above_threshold(predictions, thresholds):
    """Return whether p_malignant of each film lies at or above its fold's threshold, bool (n,)."""
    limits = predictions["fold"].map(thresholds.set_index("fold")["threshold"])
    return (predictions["p_malignant"] >= limits).to_numpy()


if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    thresholds = operating_points(fold_models, settings.recall)
    recalled = above_threshold(predictions, thresholds)
    common.table(thresholds.round(4), f"thresholds for a malignant recall of {settings.recall}")
    fewest = int(thresholds["malignant"].min())
    if not fewest:
        print(
            "Without malignant validation films no threshold can be chosen: every film is recalled."
        )
    elif fewest * (1 - settings.recall) < 1:
        print(f"With {fewest} malignant validation films a recall of {settings.recall} cannot be")
        print(f"promised: even {fewest} of {fewest} found leaves it between "
              f"{wilson(fewest, fewest)[0]:.2f} and 1.")  # fmt: skip


# %% Resampled patients: each row of weights counts every film as often as its patient was drawn
# Films of one patient are alike, so patients are resampled, never films: resampled films would give
# intervals that are too narrow.
def patient_weights(patients, folds, resamples, seed):
    """Return how often each film counts, float32 (1 + resamples + n_folds, n).

    First all films once, then the resamples (as many patients as there are, with replacement), then
    each fold alone.
    """
    if resamples < 1:
        raise UserError(f"--resamples {resamples}: expected at least 1")
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    alone = [np.asarray(folds) == fold for fold in np.unique(folds)]
    return np.vstack([np.ones((1, len(index))), drawn[:, index], *alone]).astype(np.float32)


# %% Metrics of weighted films: for all rows of weights at once
# 2,000 calls of a library would take minutes, matrix products take a second. The cell after the
# next checks them against scikit-learn.
def weighted_auc(scores, positive, weights):
    """Return the ROC AUC for every row of weights: the share of pairs in the right order."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    right = (np.sign(above) + 1) / 2  # a tie counts half
    w_positive, w_negative = weights[:, positive], weights[:, ~positive]
    pairs = w_positive.sum(1) * w_negative.sum(1)
    return np.divide(((w_positive @ right.astype(np.float32)) * w_negative).sum(1), pairs,
                     out=np.full(len(weights), np.nan), where=pairs > 0)  # fmt: skip


def weighted_precision(scores, positive, weights):
    """Return the average precision for every row of weights (ties in the order of the films)."""
    order = np.argsort(-scores, kind="stable")
    w, hit = weights[:, order], positive[order]
    found, seen = np.cumsum(w * hit, axis=1), np.cumsum(w, axis=1)
    precision = found / np.maximum(seen, 1e-9)
    return (precision * w * hit).sum(1) / np.maximum(found[:, -1], 1e-9)


def specificity_at(recall, scores, positive, weights):
    """Return the specificity where the ROC curve reaches a recall, for every row of weights."""
    order = np.argsort(-scores, kind="stable")
    w, hit = weights[:, order], positive[order]
    found, passed = np.cumsum(w * hit, axis=1), np.cumsum(w * ~hit, axis=1)
    # the first film at which enough are found, and those that tie with it
    first = (found >= recall * found[:, -1:] - 1e-6).argmax(1)
    last = np.searchsorted(-scores[order], -scores[order][first], side="right") - 1
    known = (found[:, -1] > 0) & (passed[:, -1] > 0)
    return np.divide(passed[:, -1] - passed[np.arange(len(w)), last], passed[:, -1],
                     out=np.full(len(w), np.nan), where=known)  # fmt: skip


# %% Metrics: pooled over the folds, with intervals from resampling patients
# With 52 malignant films one fold says little, so predictions of all folds are pooled. AUC asks how
# films are ranked, recall and precision what they are called. Specificity at recall 0.95 is read
# off the test films' own curve, to compare runs; "at the point" is the threshold that validation
# chose.
def measure(predictions, recalled, weights):
    """Return every metric (column) for every row of weights.

    `recalled` is bool (n,), or None: without what it takes a threshold for.
    """
    label = predictions["label"].to_numpy()
    p = predictions[PROBABILITIES].to_numpy()
    cell = np.eye(9, dtype=np.float32)[3 * label + predictions["predicted"].to_numpy()]
    counts = (weights @ cell).reshape(-1, 3, 3)  # (rows, true, predicted)
    hits = np.diagonal(counts, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = hits / counts.sum(2), hits / counts.sum(1)
        f1 = np.nan_to_num(2 * hits / (counts.sum(1) + counts.sum(2)))
        f1 = f1[:, np.unique(label)]  # a class that the database has not is no mistake
        values = {"accuracy": hits.sum(1) / counts.sum((1, 2)),
                  "balanced accuracy": np.nanmean(recall, 1), "macro F1": f1.mean(1)}  # fmt: skip
        for code, name in enumerate(CLASS_NAMES):
            values[f"{name} recall"] = recall[:, code]
            named = np.nan_to_num(precision[:, code])  # 0 if no film is called so
            values[f"{name} precision"] = np.where(recall[0, code] >= 0, named, np.nan)
        one, lesion = label == MALIGNANT, label != NORMAL
        values["AUC malignant"] = weighted_auc(p[:, MALIGNANT], one, weights)
        values["AUC abnormal"] = weighted_auc(1 - p[:, NORMAL], lesion, weights)
        either = p[:, MALIGNANT] + p[:, BENIGN]  # 0 on a film that is surely normal
        ratio = np.where(either > 0, p[:, MALIGNANT] / either, 0.5)[lesion]
        values["AUC benign/malignant"] = weighted_auc(ratio, one[lesion], weights[:, lesion])
        each = [weighted_auc(p[:, c], label == c, weights) for c in np.unique(label)]
        values["AUC macro"] = np.mean(each, axis=0)
        values["specificity at recall 0.95"] = specificity_at(0.95, p[:, MALIGNANT], one, weights)
        values["average precision malignant"] = weighted_precision(p[:, MALIGNANT], one, weights)
        if recalled is None:
            return pd.DataFrame(values)
        tn, fp, fn, tp = (weights @ np.eye(4, dtype=np.float32)[2 * one + recalled]).T
        values["recall at the point"] = tp / (tp + fn)
        values["specificity at the point"] = tn / (tn + fp)
        values["PPV at the point"] = tp / (tp + fp)
        values["NPV at the point"] = tn / (tn + fn)
        values["films recalled per cancer found"] = np.where(tp > 0, (tp + fp) / tp, np.nan)
    return pd.DataFrame(values)


def summarise(values, resamples):
    """Return value, low, high (95 %), fold mean and fold standard deviation of every metric."""
    drawn, alone = values.iloc[1 : 1 + resamples], values.iloc[1 + resamples :]
    low, high = drawn.quantile(0.025), drawn.quantile(0.975)
    return pd.DataFrame({"value": values.iloc[0], "low": low, "high": high,
                         "fold mean": alone.mean(), "fold sd": alone.std()})  # fmt: skip


if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    draws = patient_weights(
        predictions["patient"], predictions["fold"], settings.resamples, settings.seed
    )
    metrics = summarise(measure(predictions, recalled, draws), settings.resamples)
    defined = metrics["value"].notna()
    common.table(metrics[defined].round(3), f"test metrics, 95 % intervals over patients; {scope}")
    absent = [c for code, c in enumerate(CLASS_NAMES) if code not in set(predictions["label"])]
    if absent:
        print(f"No test film is {' or '.join(absent)}, so that these say nothing and are left out: "
              f"{common.listing(metrics.index[~defined], 20)}")  # fmt: skip
    if len(fold_models) < judged_record["data"]["folds"]:
        print("Not all folds are trained: a figure for the whole database needs --fold all.")


# %% A witness: accuracy, macro-F1 and AUC malignant by scikit-learn, which must agree
# Metrics of one's own making need a witness. The classification report has precision, recall and F1
# of each class once more.
if __name__ == "__main__" and judging:
    label, named = predictions["label"], predictions["predicted"]
    there = np.unique(label)
    by_library = {
        "accuracy": accuracy_score(label, named),
        "macro F1": f1_score(label, named, average="macro", labels=there),
    }
    if 0 < (label == MALIGNANT).sum() < len(label):
        by_library["AUC malignant"] = roc_auc_score(label == MALIGNANT, predictions["p_malignant"])
    check = pd.DataFrame({"scikit-learn": by_library}).assign(reported=metrics["value"])
    assert np.allclose(check["scikit-learn"], check["reported"], atol=1e-5), check
    report = pd.DataFrame(classification_report(
        label, named, labels=there, target_names=np.take(CLASS_NAMES, there), output_dict=True,
        zero_division=0,
    )).T  # fmt: skip
    common.table(report.round(3), f"classification report; {scope}")


# %% The other breast: what judging a film beside it changes, both ways with their intervals
# Part of the gain is how MIAS was collected: most patients have exactly one abnormal breast. So
# both figures are reported, always.
BOTH_WAYS = ["AUC malignant", "AUC abnormal", "accuracy", "macro F1", "malignant recall",
             "specificity at recall 0.95", "recall at the point",
             "specificity at the point"]  # fmt: skip


def side_by_side(ways, names):
    """Return the values and intervals of some metrics, for each of the ways {name: metrics}."""
    kept = {way: metrics.loc[names, ["value", "low", "high"]] for way, metrics in ways.items()}
    return pd.concat(kept, axis=1).dropna(how="all")


def film_alone(predictions, folds, tempering):
    """Return the predictions as they are without the patient's other film."""
    p, prior = predictions[ALONE].to_numpy(), {fold.number: fold.prior for fold in folds}
    priors = np.stack([prior[fold] for fold in predictions["fold"]])  # (n, 3)
    named = network.decide(p, priors, tempering)
    return predictions.assign(**dict(zip(PROBABILITIES, p.T)), predicted=named)


if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    alone = film_alone(predictions, fold_models, settings.tempering)
    thresholds_alone = operating_points(fold_models, settings.recall, beside=False)
    recalled_alone = above_threshold(alone, thresholds_alone)
    metrics_alone = summarise(measure(alone, recalled_alone, draws), settings.resamples)
    ways = {"film alone": metrics_alone, "beside the other breast": metrics}
    other_breast = side_by_side(ways, BOTH_WAYS)
    common.table(other_breast.round(3), f"without and with the patient's other film; {scope}")


# %% The decision: rare classes are favoured, or nearly every film is called normal
# The likeliest class is right most often, and useless: benign is hardly ever said. Dividing the
# probabilities by a power of the classes' frequencies, which was chosen on split seed 0, costs
# little accuracy. settings.tempering = 0 gives the likeliest class.
DECIDED = ["accuracy", "balanced accuracy", "macro F1", *(f"{name} recall" for name in CLASS_NAMES)]


if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    likeliest = predictions.assign(predicted=predictions[PROBABILITIES].to_numpy().argmax(1))
    ways = {"likeliest class": summarise(measure(likeliest, None, draws), settings.resamples)}
    ways[f"tempering {settings.tempering}"] = metrics
    decision = side_by_side(ways, DECIDED)
    common.table(decision.round(3), f"what films are called, in two ways; {scope}")


# %% The confusion matrix: what is taken for what
# Where do the errors go? On MIAS most benign and many malignant films are called normal, since two
# of three films are.
if __name__ == "__main__" and judging:
    figure, axis = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
    shown = np.unique(predictions[["label", "predicted"]])
    confusion = ConfusionMatrixDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=shown,
        display_labels=np.take(CLASS_NAMES, shown), cmap="Blues", ax=axis,
    )  # fmt: skip
    axis.set_title(scope, fontsize=8)
    common.show(figure, judged_run / "figures" / "confusion.png")


# %% The claim: the seed project's figures, and those of always answering "normal"
# Always answering normal has an accuracy of 0.64 on MIAS: a figure means something only beside
# that. The claim is the one that the project began with; nobody has shown how it was measured.
if __name__ == "__main__" and judging:
    always_normal = measure(predictions.assign(predicted=NORMAL), None, draws[:1]).iloc[0]
    claim = metrics.loc[list(CLAIM), ["value", "low", "high"]].dropna()
    claim = claim.assign(**{"always normal": always_normal, "claim": pd.Series(CLAIM)})
    common.table(claim.round(3), f"the claim has no published protocol; {scope}")
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    places = list(claim.index)
    errors = [claim["value"] - claim["low"], claim["high"] - claim["value"]]
    axis.bar(places, claim["value"], 0.5, yerr=errors, capsize=4, color="#0072B2", label="this run")
    axis.plot(places, claim["claim"], "D", color="#D55E00", label="claim, protocol unpublished")
    axis.plot(places, claim["always normal"], "_k", ms=28, mew=2, label="always normal")
    axis.set(ylim=(0, 1.35), yticks=np.arange(0, 1.1, 0.2), ylabel="test value")
    axis.set_title(scope, fontsize=8)
    axis.legend(fontsize=8, loc="upper center", ncols=3, markerscale=0.6)
    common.show(figure, judged_run / "figures" / "claim.png")


# %% Look: the ROC curves, with the operating point on the one for malignant
# Every threshold at once. The dot is the one that validation films chose; it lies on the curve only
# roughly, since each fold has its own.
if __name__ == "__main__" and judging:
    label = predictions["label"]
    curves = {"malignant": (label == MALIGNANT, predictions["p_malignant"], "#D55E00"),
              "abnormal": (label != NORMAL, 1 - predictions["p_normal"], "#0072B2")}  # fmt: skip
    figure, axis = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
    for name, (positive, score, colour) in curves.items():
        if 0 < positive.sum() < len(positive):
            fpr, tpr, _ = roc_curve(positive, score)
            value, low, high = metrics.loc[f"AUC {name}", ["value", "low", "high"]]
            text = f"{name}: AUC {value:.2f} ({low:.2f} to {high:.2f})"
            axis.plot(fpr, tpr, color=colour, label=text)
    point = metrics.loc[["specificity at the point", "recall at the point"], "value"]
    if point.notna().all():
        axis.plot(1 - point.iloc[0], point.iloc[1], "ok", label="threshold from validation")
    axis.plot([0, 1], [0, 1], "--", color="#999999", label="chance")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity (recall)", aspect="equal")
    axis.set_title(scope, fontsize=8)
    axis.legend(fontsize=8, loc="lower right")
    common.show(figure, judged_run / "figures" / "roc.png")


# %% Calibration: do probabilities mean what they say, before and after the temperature
# Of films whose highest probability is 0.7, seven in ten should be right. Before: logits as
# trained, twice a film's own minus the other breast's. After: with that one's fitted weight, class
# frequencies and temperature (Guo et al., ICML 2017).
def calibration_errors(probabilities, labels, bins=10):
    """Return the multi-class Brier score and the expected calibration error (Guo et al., 2017).

    Of probabilities (n, 3) and labels (n,); 0 is perfect, a third each has a Brier score of 0.667.
    """
    brier = float(((probabilities - np.eye(3)[labels]) ** 2).sum(1).mean())
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    part = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[part == b].sum()) for b in range(bins)]
    return brier, float(sum(gaps) / len(labels))


if __name__ == "__main__" and judging:
    label = predictions["label"].to_numpy()
    rows = run_data.labels.set_index("image").loc[predictions["image"]]
    paired = network.beside_other_breast(reading.logits, rows)
    untempered = network.probabilities(paired, 1.0, torch.ones(3))
    versions = {"before": untempered, "after": predictions[PROBABILITIES].to_numpy()}
    errors = {name: calibration_errors(p, label) for name, p in versions.items()}
    calibration = pd.DataFrame(errors, index=["Brier score", "ECE"])
    common.table(calibration.round(3), f"calibration before and after; {scope}")
    figure, axis = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    for (name, p), colour in zip(versions.items(), ("#999999", "#0072B2")):
        share, confidence = calibration_curve(p.argmax(1) == label, p.max(1), n_bins=10)
        text = f"{name}: Brier {errors[name][0]:.2f}, ECE {errors[name][1]:.2f}"
        axis.plot(confidence, share, "o-", color=colour, label=text)
    axis.plot([0, 1], [0, 1], "--", color="black", lw=1, label="perfect")
    axis.set(xlabel="highest probability", ylabel="share of right answers", xlim=(0.3, 1))
    axis.set_title(f"Reliability; {scope}", fontsize=8)
    axis.legend(fontsize=8)
    common.show(figure, judged_run / "figures" / "calibration.png")


# %% By group: which findings, tissues and sizes are found, and which are missed
# One average hides much: small lesions, calcifications and dense tissue are what is missed. A
# finding counts as found if its film is called abnormal, wherever the network looked. n is small in
# each group, so the intervals are wide.
def by_group(predictions, prepared):
    """Return the recall by finding type, tissue and lesion radius, with Wilson intervals.

    Columns group, value, n, called abnormal, right class, low, high (of "called abnormal").
    """
    films = predictions.merge(prepared.labels[["image", "tissue"]], on="image")
    films = films[films["label"] != NORMAL]
    findings = prepared.findings.merge(films[["image", "label", "predicted"]], on="image")
    size = pd.cut(findings["radius"], [0, 25, 50, 100, np.inf],
                  labels=["to 25 px", "26 to 50 px", "51 to 100 px", "over 100 px"])  # fmt: skip
    keys = [("finding", findings, findings["type"]), ("tissue", films, films["tissue"]),
            ("radius", findings, size)]  # fmt: skip
    rows = []
    for group, frame, key in keys:
        for value, part in frame[key.astype(str) != ""].groupby(key, observed=True):
            found, n = int((part["predicted"] != NORMAL).sum()), len(part)
            right = float((part["predicted"] == part["label"]).mean())
            rows.append((group, value, n, found / n, right, *wilson(found, n)))
    columns = ["group", "value", "n", "called abnormal", "right class", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


if __name__ == "__main__" and judging:
    groups = by_group(predictions, run_data)
    common.table(groups.round(2), f"abnormal films and findings, by group; {scope}")
    false_alarms = (predictions["predicted"] != NORMAL)[predictions["label"] == NORMAL].mean()
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    shown = groups[::-1]
    bars = [f"{g.group} {g.value} (n = {g.n})" for g in shown.itertuples()]
    spread = np.abs(shown[["low", "high"]].to_numpy().T - shown["called abnormal"].to_numpy())
    colours = shown["group"].map({"finding": "#0072B2", "tissue": "#009E73", "radius": "#CC79A7"})
    axis.barh(bars, shown["called abnormal"], xerr=spread, capsize=3, color=colours)
    axis.axvline(false_alarms, color="black", ls="--", label="normal films")
    axis.set(xlabel="share called abnormal, 95 % Wilson intervals", xlim=(0, 1))
    axis.set_title(scope, fontsize=8)
    axis.legend(fontsize=8, loc="upper right")
    common.show(figure, judged_run / "figures" / "groups.png")


# %% Where it looks: Grad-CAM and the places' map, scored by the pointing game
# After Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016: is the highest
# place of a map in a radiologist's circle, or within 16 px of a canvas of 512 rows, half a place of
# the last stage, beyond it? A place is no sharper than that.
def peaks(maps, size):
    """Return the canvas pixels (x, y) where maps (n, h, w) are highest, shape (n, 2)."""
    h, w = maps.shape[1:]
    y, x = np.divmod(maps.reshape(len(maps), -1).argmax(1), w)
    points = np.stack([(x + 0.5) * size[1] / w - 0.5, (y + 0.5) * size[0] / h - 0.5], 1)
    points[np.ptp(maps, axis=(1, 2)) == 0] = np.nan  # a map that is the same everywhere: no hit
    return points


# %% The pointing game: hits, beside what chance would hit
# Chance is the share of the breast that would be a hit, so that a large circle is no merit. Two
# maps are scored: Grad-CAM, and the places' own probabilities.
def pointing_game(predictions, reading, prepared):
    """Return a row per usable circle: image, type, cam and places (hit or not), and chance.

    Chance is the share of the breast's pixels that would be a hit.
    """
    size = prepared.films.shape[1:]
    tolerance = max(16, size[0] // 32)  # px
    found = {"cam": peaks(reading.cams, size), "places": peaks(reading.places, size)}
    number = {image: n for n, image in enumerate(prepared.labels["image"])}
    place = {image: n for n, image in enumerate(predictions["image"])}
    ys, xs = np.mgrid[: size[0], : size[1]]
    rows = []
    usable = prepared.findings.dropna(subset=["canvas_radius"])
    for c in usable[usable["image"].isin(place)].itertuples():
        reach, n = c.canvas_radius + tolerance, place[c.image]
        hits = [bool(np.hypot(*(p[n] - (c.canvas_x, c.canvas_y))) <= reach) for p in found.values()]
        near = np.hypot(xs - c.canvas_x, ys - c.canvas_y) <= reach
        breast = prepared.films[number[c.image]] > 0
        rows.append((c.image, c.type, *hits, float(near[breast].mean())))
    return pd.DataFrame(rows, columns=["image", "type", "cam", "places", "chance"])


if __name__ == "__main__" and judging:
    points = pointing_game(predictions, reading, run_data)
    pointing = pd.DataFrame(
        {name: [len(points), points[name].mean(), *wilson(int(points[name].sum()), len(points)),
                points["chance"].mean()] for name in ("cam", "places")},
        index=["n", "hits", "low", "high", "chance"],
    ).T  # fmt: skip
    if len(points):
        common.table(pointing.round(3), f"pointing game over {len(points)} usable circles")


# %% From canvas to film: a map over a film
# Maps are computed on the canvas and shown on the film as the radiologist knows it, unmirrored and
# uncropped.
def canvas_on_film(values, g, size):
    """Carry an array over the canvas (h, w) back to the film, (film_height, film_width)."""
    tensor = torch.as_tensor(np.asarray(values, np.float32))[None, None]
    sides = [max(round(side / g.scale), 1) for side in size]
    crop = F.interpolate(tensor, sides, mode="bilinear")[0, 0, : g.crop_height, : g.crop_width]
    film = np.zeros((g.film_height, g.film_width), np.float32)
    box = film[g.crop_top :, g.crop_left :][: g.crop_height, : g.crop_width]
    box = box[:, ::-1] if g.mirrored else box
    box[: crop.shape[0], : crop.shape[1]] = crop.numpy()
    return film


def draw_heat(axis, film, heat):
    """Draw a heat map over a film of the same shape, clearer where it is cold."""
    axis.imshow(film, cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat, cmap="inferno", alpha=0.6 * np.clip(heat / max(heat.max(), 1e-9), 0, 1))
    axis.set(xticks=[], yticks=[])


# %% Look: the surest hits, the worst misses and the false alarms, with Grad-CAM and places
# The films that a reader should see first: what it found, what it missed, and where it cried wolf.
def draw_film(axis, image, overlay, prepared):
    """Draw a prepared film, a map (h, w) over its canvas and its circles, in film pixels."""
    row = prepared.table[prepared.table["image"] == image].iloc[0]
    g = prepare.Geometry(*row[list(prepare.Geometry._fields)])
    size = prepared.films.shape[1:]
    try:
        film = common.read_film(row["file"], row["bits"], [])
    except UserError:  # the originals were moved; the canvas still has the breast
        film = canvas_on_film(prepared.films[row.name], g, size)
    draw_heat(axis, film, canvas_on_film(overlay, g, size))
    for c in prepared.findings[prepared.findings["image"] == image].dropna().itertuples():
        axis.add_patch(plt.Circle((c.x, c.y), c.radius, fill=False, color="#56B4E9", lw=1.2))


if __name__ == "__main__" and judging:
    ranked = predictions.sort_values("p_malignant")
    malignant, normal = (ranked[ranked["label"] == code] for code in (MALIGNANT, NORMAL))
    sheet = {"surest hits": malignant[::-1], "worst misses": malignant,
             "false alarms": normal[::-1]}  # fmt: skip
    sheet = {name: films for name, films in sheet.items() if len(films)}
    for kind, maps in {"Grad-CAM": reading.cams, "Places": reading.places}.items():
        figure, axes = plt.subplots(len(sheet) or 1, 5, figsize=(9, 6.6), layout="constrained",
                                    squeeze=False)  # fmt: skip
        for (name, films), line in zip(sheet.items(), axes):
            for axis, (n, row) in zip(line, films.head(5).iterrows()):
                draw_film(axis, row["image"], maps[n], run_data)
                axis.set_title(f"{row['image']}  p = {row['p_malignant']:.2f}", fontsize=8)
            for axis in line[len(films) :]:
                axis.axis("off")
            line[0].set_ylabel(name)
        title = f"{kind}, p of malignant, blue: the radiologists' circles; {scope}"
        figure.suptitle(title, fontsize=8)
        file_name = {"Grad-CAM": "gradcam.png", "Places": "places.png"}[kind]
        common.show(figure, judged_run / "figures" / file_name)


# %% Your own films: like those that the models know, or not
# A film from another scanner may look like nothing that the network knows, and it would answer all
# the same. That cannot be forbidden, but it can be said.
def unlike(canvas, statistics):
    """Name the measures of a film that lie outside the range of 99 % of the run's films."""
    own = prepare.film_statistics(canvas)
    return ", ".join(
        f"{name} {own[name]:.2f} (theirs {low:.2f} to {high:.2f})"
        for name, (low, high) in statistics.items()
        if not low <= own[name] <= high
    )


# %% Your own films: on the canvas, as those that the run was trained on
# The same crop and the same canvas as in step 1. Of a pair, the first film's laterality settles the
# second's.
def place_own_films(paths, settings, record):
    """Return the films of paths, their canvases and their Geometries."""
    if settings.pair and len(paths) != 2:
        raise UserError(f"--pair takes the two films of one person, found {len(paths)}")
    size, crop = tuple(record["data"]["size"]), record["data"]["crop"]
    bits = record["film_bits"] if record["film_bits"] > 8 else None
    films = [common.read_film(path, bits) for path in paths]
    side = str(prepare.sides_of(pd.Series([str(settings.laterality)]), "--laterality")[0])
    other = {"left": "right", "right": "left", "": ""}[side]
    sides, placed = [side, other] if settings.pair else [side] * len(films), []
    for path, film, side in zip(paths, films, sides):
        for what in prepare.oddities(film, side) if crop == "breast" else ():
            common.warn(f"{path}: {what}")
        try:
            placed.append(prepare.place_film(film, side, size, crop)[:2])
        except ValueError as error:
            raise UserError(f"{path}: {error}; is it a mammogram of one breast?") from None
    if settings.pair and placed[0][1].mirrored == placed[1][1].mirrored:
        common.warn("both films look like the same breast; name the first one's --laterality")
    return (films, *zip(*placed))


# %% Your own films: read by the models of all folds, whose probabilities are averaged
# No model is better than the others, so their probabilities are averaged, and so are their
# thresholds. A film that comes alone is judged alone.
def read_own_films(paths, folder, record, settings):
    """Read films that are in no database by a run (its folder and settings.json).

    Returns
    -------
    own : DataFrame
        image, p_benign, p_normal, p_malignant (calibrated), predicted, threshold, recalled, note.
    figures : list of Figure
        One a film: the film, Grad-CAM and the map of places over it.
    """
    paths = common.named_films(paths)
    folds = load_folds(folder, record, settings.device)
    films, canvases, geometries = place_own_films(paths, settings, record)
    dataset = data.MammogramDataset.of_canvases(np.stack(canvases))
    bar = common.Progress(sum(len(fold.models) for fold in folds) * len(films), "reading")
    readings = [fold.read(dataset, 1, progress=bar) for fold in folds]
    bar.close()
    couple = {"patient": [0, 0], "laterality": ["left", "right"]}
    each = [f.probabilities(r.logits, couple, settings.pair) for f, r in zip(folds, readings)]
    p = np.mean(each, axis=0)
    own = pd.DataFrame(p, columns=PROBABILITIES)
    own.insert(0, "image", [str(path) for path in paths])
    prior = torch.stack([fold.prior for fold in folds]).mean(0)
    own["predicted"] = np.take(CLASS_NAMES, network.decide(p, prior, settings.tempering))
    own["threshold"] = operating_points(folds, settings.recall, settings.pair)["threshold"].mean()
    own["recalled"] = own["p_malignant"] >= own["threshold"]
    odd = [unlike(canvas, record["film_statistics"]) for canvas in canvases]
    own["note"] = [f"unlike the training films: {what}" if what else "" for what in odd]
    for row in own[own["note"] != ""].itertuples():
        common.warn(f"{row.image} is {row.note}; the models were never tried on such films")
    _, cams, places = network.mean_reading(readings)
    films_of = zip(own.to_dict("records"), films, canvases, geometries, cams, places)
    return own, [plot_own_film(*parts) for parts in films_of]


# %% Your own films: the picture, and the reading; settings.image = "film.png", then run this cell
# For settings.laterality and settings.pair see the Settings cell. Probabilities of a model are no
# diagnosis.
def plot_own_film(row, film, canvas, geometry, cam, places):
    """Draw a film of one's own, Grad-CAM and the map of places over it."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 4.2), layout="constrained")
    heats = {Path(row["image"]).name: np.zeros_like(canvas), "Grad-CAM": cam, "places": places}
    for axis, (title, heat) in zip(axes, heats.items()):
        draw_heat(axis, film, canvas_on_film(heat, geometry, canvas.shape))
        axis.set_title(title, fontsize=9)
    said = ", ".join(f"{name} {row[f'p_{name}']:.2f}" for name in CLASS_NAMES)
    figure.suptitle(f"{said}. {common.DISCLAIMER}", fontsize=8)
    return figure


if __name__ == "__main__":
    common.check_settings(settings, "05_evaluate.py")
    if settings.image:
        own_folder, own_record = open_run(settings.run)
        own, own_figures = read_own_films(settings.image, own_folder, own_record, settings)
        for number, (path, figure) in enumerate(zip(own["image"], own_figures), start=1):
            name = f"{number:02d}-{Path(path).stem}.png"  # numbered: two films may share a name
            common.show(figure, own_folder / "own-films" / name)
        common.write_csv(own, own_folder / "own-films" / "predictions.csv")
        common.table(own.round(3).T, f"read by run {own_folder.name}. {common.DISCLAIMER}")
        if own_record["synthetic"]:
            common.banner("THIS RUN WAS TRAINED ON SYNTHETIC PHANTOMS: its reading means nothing.")


# %% Compare runs: name two of them, or more that repeat one another, in settings.compare
# settings.compare = ("RUN1", "RUN2"), then run the next cell. The interval of a difference, over
# the same resampled patients, is much narrower than two intervals side by side.
def compare_runs(names, resamples, seed):
    """Put evaluated runs side by side, film by film, over the same resampled patients.

    Returns
    -------
    comparison : DataFrame
        A row per metric: each run's value, then the difference (second minus first) of two runs, or
        the mean of more, with its 95 % interval.
    discordant : tuple or None
        Films that only the first and only the second got right, and McNemar's exact p value; of
        two runs only.
    """
    if len(names) < 2:
        raise UserError(f"--compare takes two runs or more, found {len(names)}")
    tables = []
    for name in names:
        path = common.runs_dir(name) / "predictions.csv"
        if not path.is_file():
            raise UserError(f"{path} is not there; python 05_evaluate.py --run {name} makes it")
        tables.append(common.read_table(path).set_index("image"))
    films = sorted(set.intersection(*(set(table.index) for table in tables)))
    tables = [table.loc[films].reset_index() for table in tables]
    if not films or any((t["label"] != tables[0]["label"]).any() for t in tables):
        raise UserError("the runs have no test films in common, or other labels for them")
    weights = patient_weights(tables[0]["patient"], np.zeros(len(films)), resamples, seed)
    values = [measure(table, None, weights) for table in tables]
    two = len(names) == 2
    last = summarise(values[1] - values[0] if two else sum(values) / len(values), resamples)
    comparison = pd.DataFrame({name: v.iloc[0] for name, v in zip(names, values)}).assign(
        **{"difference" if two else "mean": last["value"]}, low=last["low"], high=last["high"]
    )
    comparison = comparison.dropna(how="all")  # of classes that the films have not
    if not two:
        return comparison, None
    right = [(table["label"] == table["predicted"]).to_numpy() for table in tables]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return comparison, (*only, mcnemar(*only))


# %% Two runs on the same films: McNemar's test
# It asks of the films that only one run got right whether that could be a coin's work. It takes
# films for independent, so that its p is a little too small where both breasts are alike.
def mcnemar(b, c):
    """Return the exact two-sided p value of b against c discordant films (McNemar 1947)."""
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1.0, 2 * tail)


if __name__ == "__main__":
    common.check_settings(settings, "05_evaluate.py")
    if settings.compare:
        comparison, discordant = compare_runs(settings.compare, settings.resamples, settings.seed)
        last = comparison.columns[-3]
        common.table(comparison.round(3), f"over the same patients, 95 % intervals of the {last}")
        if discordant:
            print(f"right only in the first {discordant[0]}, only in the second {discordant[1]} "
                  f"films; McNemar p = {discordant[2]:.3f}")  # fmt: skip
        compared = [common.read_record(common.runs_dir(run)) for run in settings.compare]
        for edited in sorted({r["note"] for r in compared} - {""}):
            common.warn(f"compared on edited data: {edited}")
        if any(r["synthetic"] for r in compared):
            common.banner("SYNTHETIC PHANTOMS: this comparison says nothing about mammograms.")
        print(common.DISCLAIMER)


# %% metrics.json: the headline figures, then every table
# For programs: what was measured, on how many films and patients, with which seeds and weights.
if __name__ == "__main__" and judging:
    common.check_settings(settings, "05_evaluate.py")
    value = metrics["value"]
    summary = {
        "synthetic": judged_record["synthetic"], "run": judged_record["run"],
        "source": judged_record["source_used"], "weights": judged_record["weights_used"],
        "recipe": judged_record["recipe"], "seed": judged_record["seed"],
        "split_seed": judged_record["split_seed"], "note": judged_record["note"],
        "n": len(predictions), "patients": predictions["patient"].nunique(),
        "folds": sorted(int(f) for f in predictions["fold"].unique()),
        "folds_of_the_split": judged_record["data"]["folds"],
        "shuffled_labels": judged_record["shuffle_labels"],
        "accuracy": value["accuracy"], "macro_f1": value["macro F1"],
        "malignant_recall": value["malignant recall"],
        "recall_per_class": {c: value[f"{c} recall"] for c in CLASS_NAMES},
        "confusion_matrix": confusion.confusion_matrix,
        "classes_of_the_confusion_matrix": confusion.display_labels,
        "metrics": metrics.T.to_dict(),
        "metrics_film_alone": metrics_alone.T.to_dict(),
        "metrics_likeliest_class": decision["likeliest class"].T.to_dict(),
        "tempering": settings.tempering,
        "resamples": settings.resamples, "wanted_recall": settings.recall,
        "thresholds": thresholds.to_dict("records"),
        "temperatures": [{"fold": f.number, **f.calibration} for f in fold_models],
        "calibration": calibration.to_dict(), "pointing_game": pointing.T.to_dict(),
        "disclaimer": common.DISCLAIMER,
    }  # fmt: skip
    common.write_json(summary, judged_run / "metrics.json")


# %% Report: one HTML file with everything in it
# For people: the model card, all tables and all figures, to be sent or printed as it is. It names
# the limits before the figures.
MODEL_CARD = """
<p>{disclaimer}</p>
<ul><li>Data: {source}. {scope}</li>
<li>Protocol: patients, never films, are split; validation patients choose the epoch, the rates,
the temperature, the other breast's weight and the threshold; every test film is read once, by the
networks of its fold, which never saw its patient; intervals are 95 % percentiles over resampled
patients.</li>
<li>Model: ResNet18, recipe {recipe}, looks: {looks}, weights: {weights}. A film is judged beside
the same patient's other breast where that is there; the figures of each film alone stand in a table
of their own.</li>
<li>Intended use: teaching and research on method. Not for decisions about people.</li>
<li>Limits: one small database of digitised film from the 1990s; labels of films, not of biopsies;
few malignant films, hence wide intervals; no other hospital or scanner was tried.</li></ul>"""


STYLE = """body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}
td,th{padding:.2em .8em;text-align:right}img{max-width:100%}pre{overflow-x:auto}"""

if __name__ == "__main__" and judging:
    card = MODEL_CARD.format(
        disclaimer=common.DISCLAIMER, source=judged_record["source_used"],
        scope=html.escape(scope), recipe=judged_record["recipe"],
        looks=" and ".join(judged_record["looks"][: len(fold_models[0].models)]),
        weights=html.escape(judged_record["weights_used"]),
    )  # fmt: skip
    sections = [f"<h1>{html.escape(judged_run.name)}</h1>", card]
    for title, frame in {
        "Metrics": metrics[defined], "Without and with the other breast": other_breast,
        "Likeliest class and decision": decision, "Beside the claim": claim,
        "Classification report": report, "Thresholds": thresholds,
        "Chosen on validation": chosen_on_validation, "Calibration": calibration,
        "By group": groups, "Pointing game": pointing,
    }.items():  # fmt: skip
        sections.append(f"<h2>{title}</h2>{frame.round(3).to_html(border=0, na_rep='')}")
    for path in sorted((judged_run / "figures").glob("*.png")):
        picture = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{path.stem}" src="data:image/png;base64,{picture}">'
        sections.append(f"<h2>{path.stem}</h2>{image}")
    listed = html.escape(pd.Series(judged_record).to_string())
    sections.append(f"<h2>Settings</h2><pre>{listed}</pre>")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{judged_run.name}</title>'
        f"<style>{STYLE}</style><body>{''.join(sections)}</body></html>"
    )
    with common.replacing(judged_run / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"wrote predictions.csv, metrics.json and report.html in {judged_run}")
    print(common.DISCLAIMER)
