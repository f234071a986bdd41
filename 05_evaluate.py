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
from typing import Literal, NamedTuple, Tuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from torch.nn import functional as F

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

training = importlib.import_module("04_train")
data, network, prepare = training.data, training.network, training.prepare


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """What to judge, and how."""

    run: str = ""  # name under runs/; empty: the newest
    recall: float = 0.95  # wanted malignant recall, for the operating point
    resamples: int = 2000  # of patients, for the 95 % intervals
    seed: int = 0  # of the resampling
    compare: Tuple[str, ...] = ()  # two runs: their difference; more: their mean
    image: Tuple[str, ...] = ()  # films of your own to read, in place of judging the run
    laterality: Literal["", "left", "right"] = ""  # of your (first) film; empty: by the light
    pair: bool = False  # your two films are both breasts of one person: each is judged beside it
    batch_size: int = 8  # films at a time
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware has it


PROBABILITIES = [f"p_{name}" for name in CLASS_NAMES]
ALONE = [f"alone_{name}" for name in CLASS_NAMES]  # the same without the other breast
CLAIM = {"accuracy": 0.82, "malignant recall": 0.95, "macro F1": 0.81}  # seed project, no protocol

if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% Load the run: the best checkpoint of every fold that was trained
class Fold(NamedTuple):
    """A fold's model with the validation films that chose its epoch and set its probabilities."""

    number: int
    model: network.MammogramNet
    prior: torch.Tensor  # (3,), how frequent the classes are in training
    validation: dict  # image, patient, laterality, logits (n, 3) and labels (n,) of the best epoch
    epoch: int

    def temperature(self, beside):
        """Return what divides the logits of films judged beside the other breast, or alone."""
        return network.fit_temperature(
            judged(self.validation["logits"], self.validation, beside),
            self.validation["labels"],
            self.prior,
        )

    def probabilities(self, logits, films, beside):
        """Return calibrated probabilities (n, 3); `films` has each one's patient and laterality."""
        logits = judged(logits, films, beside)
        return network.probabilities(logits, self.temperature(beside), self.prior)


def judged(logits, films, beside):
    """Return logits of films, beside the patient's other breast if that is wanted."""
    if not beside:
        return logits
    return network.beside_other_breast(logits, films["patient"], films["laterality"])


def load_folds(folder, record, device="auto"):
    """Load the best checkpoints of a run.

    Parameters
    ----------
    folder : Path
        runs/<run>.
    record : dict
        Its settings.json.
    device : str
        See the settings.

    Returns
    -------
    folds : list of Fold
        In order, in evaluation mode.
    """
    folds = []
    for path in sorted(folder.glob("fold-*/best.pt")):
        checkpoint = common.read_checkpoint(path)
        if "prior" not in checkpoint:
            raise UserError(f"{path} is of an older version; train the run again")
        model = network.MammogramNet(record["recipe"], record["dropout"])
        try:
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not fit recipe {record['recipe']} ({reason})") from None
        model = model.to(common.choose_device(device), memory_format=torch.channels_last).eval()
        folds.append(Fold(checkpoint["fold"], model, checkpoint["prior"],
                          checkpoint["validation"], checkpoint["epoch"]))  # fmt: skip
    if not folds:
        raise UserError(f"{folder} has no fold-K/best.pt yet; python 04_train.py --resume makes it")
    return folds


def chosen_on_validation(folds):
    """Return a row per fold: the epoch and the temperature that its validation films chose."""
    rows = [(f.number, f.epoch, f.temperature(True), len(f.validation["labels"])) for f in folds]
    return pd.DataFrame(rows, columns=["fold", "best epoch", "temperature", "validation films"])


def find_run(name):
    """Return the folder and the settings.json of a run; by default the newest, or a first one."""
    if not name and not any(common.runs_dir().glob("*/settings.json")):
        print("there is no run yet; training one with the default settings of step 4")
        training.train(training.Settings())
    folder = common.runs_dir(name) if name else training.newest_run()
    if not (folder / "settings.json").is_file():
        found = sorted(p.parent.name for p in common.runs_dir().glob("*/settings.json"))
        raise UserError(
            f"no run {name!r} in {common.runs_dir()}; there are: {common.listing(found)}"
        )
    return folder, common.read_json(folder / "settings.json")


if __name__ == "__main__":
    if settings.compare or settings.image:
        folder = None
    else:
        folder, record = find_run(settings.run)
        folds = load_folds(folder, record, settings.device)
        prepared = data.prepared_source(record["source_used"])
        title = f"run {folder.name}, {record['source_used']}, weights: {record['weights_used']}"
        common.table(chosen_on_validation(folds).round(2), title)


# %% Predict: every film by the model that never saw its patient, and where that model looked
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
    labels = prepared.labels["label"].to_numpy()
    if record["shuffle_labels"]:
        labels = training.shuffled_labels(prepared.labels, record["seed"])
    changed = training.describe_data(prepared) != record["data"]
    if changed:
        raise UserError(
            f"{prepared.folder} holds other films, labels or folds than the run was trained on; "
            "prepare them as they were (step 1), or train again"
        )
    tables, readings = [], []
    dtype = common.choose_precision(settings.precision, common.choose_device(settings.device))
    rows = {f.number: np.flatnonzero(prepared.splits["fold"] == f.number) for f in folds}
    progress = common.Progress(sum(map(len, rows.values())), "predicting")
    for fold in folds:
        test = data.MammogramDataset(prepared, rows[fold.number], labels)
        reading = network.read_films(fold.model, test, settings.batch_size, dtype, progress)
        table = prepared.splits.iloc[test.rows][["image", "patient", "fold"]].copy()
        table["label"] = labels[test.rows]
        films = prepared.labels.iloc[test.rows]
        table[PROBABILITIES] = fold.probabilities(reading.logits, films, beside=True)
        table["predicted"] = table[PROBABILITIES].to_numpy().argmax(1)
        table[ALONE] = fold.probabilities(reading.logits, films, beside=False)
        tables.append(table)
        readings.append(reading)
    progress.close()
    reading = network.Reading(*(np.concatenate(column) for column in zip(*readings)))
    return pd.concat(tables, ignore_index=True), reading


if __name__ == "__main__" and folder:
    predictions, reading = predict_run(folds, prepared, record, settings)
    common.write_csv(predictions.round(6), folder / "predictions.csv")
    common.table(predictions.head(6).round(3), f"the first of n = {len(predictions)} predictions")


# %% Operating point: a threshold that validation patients choose, applied to test patients
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


def above_threshold(predictions, thresholds):
    """Return whether p_malignant of each film lies at or above its fold's threshold, bool (n,)."""
    limits = predictions["fold"].map(thresholds.set_index("fold")["threshold"])
    return (predictions["p_malignant"] >= limits).to_numpy()


def wilson(hits, n):
    """Return the 95 % interval of a share (Wilson, JASA 1927)."""
    if n == 0:
        return math.nan, math.nan
    z, share = 1.959964, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def promise(n, recall):
    """Say what a threshold that n malignant films chose promises of patients to come."""
    if n * (1 - recall) >= 1:
        return f"At least {n} malignant validation films chose each threshold."
    return (
        f"With {n} malignant validation films a recall of {recall} cannot be promised:\n"
        f"even {n} of {n} found leaves it between {wilson(n, n)[0]:.2f} and 1."
    )


if __name__ == "__main__" and folder:
    thresholds = operating_points(folds, settings.recall)
    recalled = above_threshold(predictions, thresholds)
    common.table(thresholds.round(4), f"thresholds for a malignant recall of {settings.recall}")
    print(promise(int(thresholds["malignant"].min()), settings.recall))


# %% Metrics: pooled over the folds, with intervals from resampling patients
def patient_weights(patients, folds, resamples, seed):
    """Return how often each film counts, by resample and by fold.

    Parameters
    ----------
    patients, folds : ndarray, shape (n,)
        Of every film.
    resamples : int
        How many times as many patients as there are are drawn with replacement.
    seed : int
        Of the drawing.

    Returns
    -------
    weights : ndarray of float32, shape (1 + resamples + n_folds, n)
        First all films once, then the resamples, then each fold alone.
    """
    if resamples < 1:
        raise UserError(f"--resamples {resamples}: expected at least 1")
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    alone = [np.asarray(folds) == fold for fold in np.unique(folds)]
    return np.vstack([np.ones((1, len(index))), drawn[:, index], *alone]).astype(np.float32)


def weighted_auc(scores, positive, negative, weights):
    """Return the ROC AUC for every row of weights: the share of pairs in the right order."""
    above = scores[positive][:, None] - scores[negative][None, :]
    right = (np.sign(above) + 1) / 2  # a tie counts half
    w_positive, w_negative = weights[:, positive], weights[:, negative]
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


def measure(predictions, recalled, weights):
    """Compute every metric for every row of weights.

    Parameters
    ----------
    predictions : DataFrame
        As `predict_run` gives it.
    recalled : ndarray of bool, shape (n,)
        Films at or above the threshold of their fold.
    weights : ndarray, shape (rows, n)
        As `patient_weights` gives it.

    Returns
    -------
    values : DataFrame
        A row per row of weights, a column per metric.
    """
    label = predictions["label"].to_numpy()
    p = predictions[PROBABILITIES].to_numpy()
    cell = np.eye(9, dtype=np.float32)[3 * label + predictions["predicted"].to_numpy()]
    counts = (weights @ cell).reshape(-1, 3, 3)  # (rows, true, predicted)
    hits = np.diagonal(counts, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = hits / counts.sum(2), hits / counts.sum(1)
        f1 = np.nan_to_num(2 * hits / (counts.sum(1) + counts.sum(2)))
        values = {"accuracy": hits.sum(1) / counts.sum((1, 2)),
                  "balanced accuracy": np.nanmean(recall, 1), "macro F1": f1.mean(1)}  # fmt: skip
        for code, name in enumerate(CLASS_NAMES):
            values[f"{name} recall"] = recall[:, code]
            values[f"{name} precision"] = np.nan_to_num(precision[:, code])
        one, rest = label == MALIGNANT, label != MALIGNANT
        values["AUC malignant"] = weighted_auc(p[:, MALIGNANT], one, rest, weights)
        abnormal, normal = label != NORMAL, label == NORMAL
        values["AUC abnormal"] = weighted_auc(1 - p[:, NORMAL], abnormal, normal, weights)
        either = p[:, MALIGNANT] + p[:, BENIGN]  # 0 on a film that is surely normal
        ratio = np.divide(p[:, MALIGNANT], either, out=np.full(len(p), 0.5), where=either > 0)
        values["AUC benign/malignant"] = weighted_auc(ratio, one, label == BENIGN, weights)
        each = [weighted_auc(p[:, c], label == c, label != c, weights) for c in range(3)]
        values["AUC macro"] = np.mean(each, axis=0)
        values["specificity at recall 0.95"] = specificity_at(0.95, p[:, MALIGNANT], one, weights)
        values["average precision malignant"] = weighted_precision(p[:, MALIGNANT], one, weights)
        tp, fn = (weights[:, one & recalled].sum(1), weights[:, one & ~recalled].sum(1))
        fp, tn = (weights[:, rest & recalled].sum(1), weights[:, rest & ~recalled].sum(1))
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
    spread = alone.std() if len(alone) > 1 else np.nan
    return pd.DataFrame({"value": values.iloc[0], "low": low, "high": high,
                         "fold mean": alone.mean(), "fold sd": spread})  # fmt: skip


if __name__ == "__main__" and folder:
    weights = patient_weights(
        predictions["patient"], predictions["fold"], settings.resamples, settings.seed
    )
    metrics = summarise(measure(predictions, recalled, weights), settings.resamples)
    scope = (
        f"{'SYNTHETIC PHANTOMS, ' if record['synthetic'] else ''}n = {len(predictions)} films of "
        f"{predictions['patient'].nunique()} patients, {len(folds)} of "
        f"{record['data']['folds']} folds, split seed {record.get('split_seed', 'not noted')}, "
        f"training seed {record['seed']}, weights: {record['weights_used']}"
    )
    common.table(metrics.round(3), f"test metrics, 95 % intervals over patients; {scope}")
    if len(folds) < record["data"]["folds"]:
        print("Not all folds are trained: a figure for the whole database needs --fold all.")


# %% The other breast: what judging a film beside it changes, both ways with their intervals
BOTH_WAYS = ["AUC malignant", "AUC abnormal", "accuracy", "macro F1", "malignant recall",
             "specificity at recall 0.95", "recall at the point",
             "specificity at the point"]  # fmt: skip


def film_alone(predictions):
    """Return the predictions as they are without the patient's other film."""
    own = predictions[ALONE].to_numpy()
    return predictions.assign(**dict(zip(PROBABILITIES, own.T)), predicted=own.argmax(1))


def measure_alone(predictions, folds, weights, settings):
    """Return the metrics, as `summarise` gives them, of every film judged alone."""
    alone = film_alone(predictions)
    recalled = above_threshold(alone, operating_points(folds, settings.recall, beside=False))
    return summarise(measure(alone, recalled, weights), settings.resamples)


def both_ways(alone, beside):
    """Put the main metrics of films alone and beside the other breast next to each other."""
    tables = {"film alone": alone, "beside the other breast": beside}
    kept = {name: table.loc[BOTH_WAYS, ["value", "low", "high"]] for name, table in tables.items()}
    return pd.concat(kept, axis=1)


if __name__ == "__main__" and folder:
    metrics_alone = measure_alone(predictions, folds, weights, settings)
    other_breast = both_ways(metrics_alone, metrics)
    common.table(other_breast.round(3), f"without and with the patient's other film; {scope}")
    print("Part of the gain is how MIAS was collected: most patients have one abnormal breast.")


# %% Check by hand: accuracy, macro-F1 and AUC once more, and scikit-learn must agree
def check_by_hand(predictions, metrics):
    """Count accuracy, macro-F1 and AUC once more.

    Returns
    -------
    check : DataFrame
        by hand, scikit-learn, reported; an assertion holds them together.
    """
    label, predicted = predictions["label"].to_numpy(), predictions["predicted"].to_numpy()
    hits = [((label == c) & (predicted == c)).sum() for c in range(3)]
    named = [(label == c).sum() + (predicted == c).sum() for c in range(3)]
    f1 = [2 * hit / max(count, 1) for hit, count in zip(hits, named)]
    by_hand = {"accuracy": (label == predicted).mean(), "macro F1": np.mean(f1)}
    library = {"accuracy": accuracy_score(label, predicted), "macro F1": macro_f1(label, predicted)}
    score, positive = predictions["p_malignant"].to_numpy(), label == MALIGNANT
    if 0 < positive.sum() < len(label):
        above = score[positive][:, None] - score[~positive][None, :]
        by_hand["AUC malignant"] = (np.sign(above) + 1).mean() / 2
        library["AUC malignant"] = roc_auc_score(positive, score)
    check = pd.DataFrame({"by hand": by_hand, "scikit-learn": library})
    check["reported"] = metrics["value"]
    assert np.allclose(check.sub(check["by hand"], axis=0), 0, atol=1e-5), check
    return check


def macro_f1(label, predicted):
    """Return scikit-learn's macro-F1 over all three classes; one that never occurs counts 0."""
    return f1_score(label, predicted, average="macro", labels=range(3), zero_division=0)


if __name__ == "__main__" and folder:
    check = check_by_hand(predictions, metrics)
    common.table(check.round(4), "counted by hand, by scikit-learn, and as reported above")
    report = pd.DataFrame(
        classification_report(
            predictions["label"], predictions["predicted"], labels=range(3),
            target_names=CLASS_NAMES, output_dict=True, zero_division=0,
        )
    ).T  # fmt: skip
    common.table(report.round(3), f"classification report; {scope}")


# %% Look: the curves of the training, and the confusion matrix
def two_lines(scope):
    """Break a title before the seed, so that it fits the Plots pane."""
    return scope.replace(", split seed", ",\nsplit seed")


def plot_confusion(predictions, scope):
    """Draw the confusion matrix, counts with row percentages."""
    counts = pd.crosstab(predictions["label"], predictions["predicted"])
    counts = counts.reindex(index=range(3), columns=range(3), fill_value=0)
    share = counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
    text = counts.astype(str) + "\n" + (100 * share).round(0).astype(int).astype(str) + " %"
    figure, axis = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
    sns.heatmap(share, annot=text, fmt="", cmap="Blues", vmin=0, vmax=1, ax=axis, square=True,
                xticklabels=CLASS_NAMES, yticklabels=CLASS_NAMES,
                cbar_kws={"label": "share of the true class"})  # fmt: skip
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(two_lines(scope), fontsize=8)
    return figure


if __name__ == "__main__" and folder:
    history = pd.read_csv(folder / "history.csv")
    note = " - SYNTHETIC PHANTOMS" if record["synthetic"] else ""
    figure = training.plot_history(history, f"{folder.name}: dots mark the epochs kept{note}")
    common.show(figure, folder / "figures" / "history.png")
    figure = plot_confusion(predictions, scope)
    common.show(figure, folder / "figures" / "confusion.png")


# %% Look: beside the seed project's claim and beside always answering "normal"
def beside_the_claim(metrics, predictions):
    """Return accuracy, malignant recall and macro-F1 beside the claim and the trivial answer."""
    label = predictions["label"]
    trivial = pd.Series(NORMAL, label.index)
    always = {"accuracy": accuracy_score(label, trivial), "malignant recall": 0.0,
              "macro F1": macro_f1(label, trivial)}  # fmt: skip
    rows = metrics.loc[list(CLAIM), ["value", "low", "high"]]
    return rows.assign(**{"always normal": pd.Series(always), "claim": pd.Series(CLAIM)})


def plot_claim(claim, scope):
    """Draw what `beside_the_claim` returns, with the intervals."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    places = np.arange(len(claim))
    errors = [claim["value"] - claim["low"], claim["high"] - claim["value"]]
    axis.bar(places, claim["value"], 0.5, yerr=errors, capsize=4, color="#0072B2", label="this run")
    axis.plot(places, claim["claim"], "D", color="#D55E00", label="claim, protocol unpublished")
    axis.plot(places, claim["always normal"], "_k", ms=28, mew=2, label="always normal")
    axis.set(xticks=places, xticklabels=claim.index, ylim=(0, 1.35), ylabel="test value")
    axis.set_yticks(np.arange(0, 1.1, 0.2))
    axis.set_title(two_lines(scope), fontsize=8)
    axis.legend(fontsize=8, loc="upper center", ncols=3, markerscale=0.6)
    return figure


if __name__ == "__main__" and folder:
    claim = beside_the_claim(metrics, predictions)
    common.table(claim.round(3), f"the claim has no published protocol; {scope}")
    figure = plot_claim(claim, scope)
    common.show(figure, folder / "figures" / "claim.png")


# %% Look: the ROC curves, with the operating point on the one for malignant
def plot_roc(predictions, metrics, recall, scope):
    """Draw the ROC curves for malignant and abnormal, with chance and the operating point."""
    label = predictions["label"]
    curves = {"malignant": (label == MALIGNANT, predictions["p_malignant"]),
              "abnormal": (label != NORMAL, 1 - predictions["p_normal"])}  # fmt: skip
    figure, axis = plt.subplots(figsize=(5.4, 4.6), layout="constrained")
    for (name, (positive, score)), colour in zip(curves.items(), ("#D55E00", "#0072B2")):
        if 0 < positive.sum() < len(positive):
            fpr, tpr, _ = roc_curve(positive, score)
            value, low, high = metrics.loc[f"AUC {name}", ["value", "low", "high"]]
            text = f"{name}: AUC {value:.2f} ({low:.2f} to {high:.2f})"
            axis.plot(fpr, tpr, color=colour, label=text)
    point = metrics.loc[["specificity at the point", "recall at the point"], "value"]
    axis.plot(1 - point.iloc[0], point.iloc[1], "o", color="black",
              label=f"threshold from validation, wanted recall {recall}")  # fmt: skip
    axis.plot([0, 1], [0, 1], "--", color="#999999", label="chance")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity (recall)", aspect="equal")
    axis.set_title(two_lines(scope), fontsize=8)
    axis.legend(fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__" and folder:
    figure = plot_roc(predictions, metrics, settings.recall, scope)
    common.show(figure, folder / "figures" / "roc.png")


# %% Calibration: do probabilities mean what they say, before and after the temperature
def calibration_errors(probabilities, labels, bins=10):
    """Return the multi-class Brier score and the expected calibration error.

    Parameters
    ----------
    probabilities : ndarray, shape (n, 3)
        Predicted.
    labels : ndarray of int, shape (n,)
        True.
    bins : int
        Equal steps of the highest probability (Guo et al., ICML 2017).

    Returns
    -------
    brier : float
        0 (perfect) to 2; 0.667 for always a third each.
    ece : float
        0 to 1, mean distance of confidence and accuracy.
    """
    brier = float(((probabilities - np.eye(3)[labels]) ** 2).sum(1).mean())
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    part = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[part == b].sum()) for b in range(bins)]
    return brier, float(sum(gaps) / len(labels))


def plot_calibration(versions, labels, title):
    """Draw the reliability diagram of several {name: probabilities (n, 3)}."""
    figure, axis = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    for (name, p), colour in zip(versions.items(), ("#999999", "#0072B2")):
        share, confidence = calibration_curve(p.argmax(1) == labels, p.max(1), n_bins=10)
        brier, ece = calibration_errors(p, labels)
        text = f"{name}: Brier {brier:.2f}, ECE {ece:.2f}"
        axis.plot(confidence, share, "o-", color=colour, label=text)
    axis.plot([0, 1], [0, 1], "--", color="black", lw=1, label="perfect")
    axis.set(xlabel="highest probability", ylabel="share of right answers", xlim=(0.3, 1))
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__" and folder:
    label = predictions["label"].to_numpy()
    versions = {
        "before": network.probabilities(reading.logits, 1.0, torch.ones(3)),
        "after": predictions[PROBABILITIES].to_numpy(),
    }
    errors = {name: calibration_errors(p, label) for name, p in versions.items()}
    calibration = pd.DataFrame(errors, index=["Brier score", "ECE"])
    common.table(calibration.round(3), f"calibration before and after the temperature; {scope}")
    figure = plot_calibration(versions, label, f"Reliability, n = {len(label)} films{note}")
    common.show(figure, folder / "figures" / "calibration.png")


# %% By group: which findings, tissues and sizes are found, and which are missed
def by_group(predictions, prepared):
    """Return the recall by finding type, tissue and lesion radius, with Wilson intervals.

    Returns
    -------
    groups : DataFrame
        group, value, n, called abnormal, right class, low, high (of "called abnormal").
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
        for value, part in frame.groupby(key, observed=True):
            found = int((part["predicted"] != NORMAL).sum())
            right = float((part["predicted"] == part["label"]).mean())
            rows.append((group, value, len(part), found / len(part), right,
                         *wilson(found, len(part))))  # fmt: skip
    columns = ["group", "value", "n", "called abnormal", "right class", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def plot_groups(groups, false_alarms, title):
    """Draw the share called abnormal in each group; the line is that of normal films."""
    figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
    names = [f"{g.group} {g.value} (n = {g.n})" for g in groups.itertuples()][::-1]
    shares = groups["called abnormal"].to_numpy()[::-1]
    spread = np.abs(groups[["low", "high"]].to_numpy()[::-1].T - shares)
    colours = groups["group"].map({"finding": "#0072B2", "tissue": "#009E73", "radius": "#CC79A7"})
    axis.barh(names, shares, xerr=spread, capsize=3, color=colours[::-1])
    axis.axvline(false_alarms, color="black", ls="--", label="normal films")
    axis.set(xlabel="share called abnormal", xlim=(0, 1))
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8, loc="upper right")
    return figure


if __name__ == "__main__" and folder:
    groups = by_group(predictions, prepared)
    common.table(groups.round(2), f"abnormal films and findings, by group; {scope}")
    if len(groups):
        false_alarms = (predictions["predicted"] != NORMAL)[predictions["label"] == NORMAL].mean()
        figure = plot_groups(groups, false_alarms, f"By group, 95 % Wilson intervals{note}")
        common.show(figure, folder / "figures" / "groups.png")


# %% Where it looks: Grad-CAM and the map of places, scored by the pointing game
def peaks(maps, size):
    """Return the canvas pixels (x, y) where maps (n, h, w) are highest, shape (n, 2)."""
    h, w = maps.shape[1:]
    y, x = np.divmod(maps.reshape(len(maps), -1).argmax(1), w)
    points = np.stack([(x + 0.5) * size[1] / w - 0.5, (y + 0.5) * size[0] / h - 0.5], 1)
    points[np.ptp(maps, axis=(1, 2)) == 0] = np.nan  # a map that is the same everywhere: no hit
    return points


def pointing_game(predictions, reading, prepared):
    """Score whether the highest place of a map lies in the radiologists' circle.

    After Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016. Hits within
    half a place of the last stage (16 px of the canvas) beyond the circle count: a place is no
    sharper than that.

    Returns
    -------
    points : DataFrame
        A row per usable circle: image, type, cam, places (hit or not), chance (share of the
        breast's pixels that would be a hit).
    """
    tolerance, size = 16, prepared.films.shape[1:]
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


def draw_film(axis, image, overlay, prepared):
    """Draw a film with a map over its breast and the radiologists' circles, in film pixels.

    Parameters
    ----------
    axis : matplotlib Axes
        Where to draw.
    image : str
        Name of the film in `prepared`; the original is read again.
    overlay : ndarray of float, shape (h, w)
        Over the canvas.
    prepared : Prepared
        The films, the geometry and the circles.
    """
    row = prepared.table[prepared.table["image"] == image].iloc[0]
    g = prepare.Geometry(*row[list(prepare.Geometry._fields)])
    size = prepared.films.shape[1:]
    try:
        film = common.read_film(row["file"])
    except UserError:  # the originals were moved; the canvas still has the breast
        film = canvas_on_film(prepared.films[row.name], g, size)
    draw_heat(axis, film, canvas_on_film(overlay, g, size))
    for c in prepared.findings[prepared.findings["image"] == image].dropna().itertuples():
        axis.add_patch(plt.Circle((c.x, c.y), c.radius, fill=False, color="#56B4E9", lw=1.2))


def draw_heat(axis, film, heat):
    """Draw a heat map over a film of the same shape, clearer where it is cold."""
    axis.imshow(film, cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat, cmap="inferno", alpha=0.6 * np.clip(heat / max(heat.max(), 1e-9), 0, 1))
    axis.set(xticks=[], yticks=[])


def canvas_on_film(values, g, size):
    """Carry an array over the canvas (h, w) back to the film, (film_height, film_width)."""
    tensor = torch.as_tensor(np.asarray(values, np.float32))[None, None]
    sides = [max(round(side / g.scale), 1) for side in size]
    crop = F.interpolate(tensor, sides, mode="bilinear", align_corners=False)[0, 0]
    crop = crop[: g.crop_height, : g.crop_width].numpy()
    crop = np.pad(crop, [(0, g.crop_height - crop.shape[0]), (0, g.crop_width - crop.shape[1])])
    film = np.zeros((g.film_height, g.film_width), np.float32)
    box = np.s_[g.crop_top : g.crop_top + g.crop_height, g.crop_left : g.crop_left + g.crop_width]
    film[box] = crop[:, ::-1] if g.mirrored else crop
    return film


def pointing_table(points):
    """Return the share of hits of each map with its Wilson interval, beside chance."""
    rows = {}
    for name in ("cam", "places"):
        low, high = wilson(int(points[name].sum()), len(points))
        rows[name] = {"n": len(points), "hits": points[name].mean(), "low": low, "high": high,
                      "chance": points["chance"].mean()}  # fmt: skip
    return pd.DataFrame(rows).T


if __name__ == "__main__" and folder:
    points = pointing_game(predictions, reading, prepared)
    pointing = pointing_table(points)
    common.table(pointing.round(3), f"pointing game over {len(points)} usable circles")


# %% Look: the surest hits, the worst misses and the false alarms
def plot_sheet(predictions, maps, prepared, title):
    """Draw maps (n, h, w) of the predicted films over the five most telling ones of each kind."""
    malignant = predictions[predictions["label"] == MALIGNANT].sort_values("p_malignant")
    normal = predictions[predictions["label"] == NORMAL].sort_values("p_malignant")
    sheet = {
        "surest hits": malignant[::-1],
        "worst misses": malignant,
        "false alarms": normal[::-1],
    }
    figure, axes = plt.subplots(3, 5, figsize=(9, 6.6), layout="constrained")
    for (kind, films), line in zip(sheet.items(), axes):
        for axis in line:
            axis.axis("off")
        for axis, (n, row) in zip(line, films.head(5).iterrows()):
            axis.axis("on")
            draw_film(axis, row["image"], maps[n], prepared)
            axis.set_title(f"{row['image']}  p = {row['p_malignant']:.2f}", fontsize=8)
        line[0].set_ylabel(kind)
    figure.suptitle(title, fontsize=10)
    return figure


if __name__ == "__main__" and folder:
    title = f"p of malignant; blue: the radiologists' circles{note}"
    figure = plot_sheet(predictions, reading.cams, prepared, f"Grad-CAM, {title}")
    common.show(figure, folder / "figures" / "gradcam.png")
    figure = plot_sheet(predictions, reading.places, prepared, f"Places, {title}")
    common.show(figure, folder / "figures" / "places.png")


# %% Your own film: put its path between the quotes and run this cell
def read_own_films(paths, folder, record, settings):
    """Read films that are in no database: probabilities, decision, and where the models looked.

    Parameters
    ----------
    paths : sequence of str or Path
        PGM, PNG, JPEG or TIFF, 8 or 16 bit, any size; ``.dcm`` where pydicom is installed.
    folder : Path
        runs/<run>; the probabilities are the mean over its folds' models.
    record : dict
        Its settings.json.
    settings : Settings
        laterality, pair and recall count.

    Returns
    -------
    own : DataFrame
        image, p_benign, p_normal, p_malignant (calibrated), predicted, threshold, recalled, note.
    figures : list of Figure
        One a film: the film, Grad-CAM and the map of places over it.
    """
    if settings.pair and len(paths) != 2:
        raise UserError(f"--pair takes the two films of one person, found {len(paths)}")
    folds = load_folds(folder, record, settings.device)
    size = tuple(record["data"]["size"])
    films = [common.read_film(path) for path in paths]
    sides, placed = [settings.laterality] * len(films), []
    if settings.pair and settings.laterality:
        sides[1] = "left" if settings.laterality == "right" else "right"
    for path, film, side in zip(paths, films, sides):
        try:
            placed.append(prepare.place_film(film, side, size)[:2])
        except ValueError as error:
            raise UserError(f"{path}: {error}; is it a mammogram of one breast?") from None
    if settings.pair and placed[0][1].mirrored == placed[1][1].mirrored:
        common.warn("both films look like the same breast; name the first one's --laterality")
    canvases = np.stack([canvas for canvas, _ in placed])
    dataset = data.MammogramDataset.of_canvases(canvases)
    progress = common.Progress(len(folds) * len(films), "reading")
    readings = [network.read_films(f.model, dataset, 1, torch.float32, progress) for f in folds]
    progress.close()
    couple = {"patient": [0] * len(films), "laterality": ["left", "right"][: len(films)]}
    p = np.mean(
        [f.probabilities(r.logits, couple, settings.pair) for f, r in zip(folds, readings)], axis=0
    )
    own = pd.DataFrame(p, columns=PROBABILITIES)
    own.insert(0, "image", [str(path) for path in paths])
    own["predicted"] = [CLASS_NAMES[code] for code in p.argmax(1)]
    own["threshold"] = operating_points(folds, settings.recall, settings.pair)["threshold"].mean()
    own["recalled"] = own["p_malignant"] >= own["threshold"]
    odd = [unlike(canvas, record["film_statistics"]) for canvas in canvases]
    own["note"] = [f"unlike the training films: {what}" if what else "" for what in odd]
    for row in own[own["note"] != ""].itertuples():
        common.warn(f"{row.image} is {row.note}; the models were never tried on such films")
    cams, places = (np.mean([r[part] for r in readings], axis=0) for part in (1, 2))
    figures = []
    for n, (film, (_, g)) in enumerate(zip(films, placed)):
        figure, axes = plt.subplots(1, 3, figsize=(9, 4.2), layout="constrained")
        draw_heat(axes[0], film, np.zeros(film.shape))
        draw_heat(axes[1], film, canvas_on_film(cams[n], g, size))
        draw_heat(axes[2], film, canvas_on_film(places[n], g, size))
        titles = [Path(paths[n]).name, "Grad-CAM", "lesion, place by place"]
        for axis, title in zip(axes, titles):
            axis.set_title(title, fontsize=9)
        said = ", ".join(f"{name} {value:.2f}" for name, value in zip(CLASS_NAMES, p[n]))
        figure.suptitle(f"{said}. {common.DISCLAIMER}", fontsize=8)
        figures.append(figure)
    return own, figures


def unlike(canvas, statistics):
    """Name the measures of a film that lie outside the range of 99 % of the training films.

    The measures are those of `film_statistics` in step 2: the share of the canvas that the
    breast covers, and the mean and the standard deviation of its grey values.
    """
    own = data.film_statistics(canvas[None]).iloc[0]
    return ", ".join(
        f"{name} {own[name]:.2f} (theirs {low:.2f} to {high:.2f})"
        for name, (low, high) in statistics.items()
        if not low <= own[name] <= high
    )


if __name__ == "__main__":
    own_film = ""  # the path of your film
    if settings.image or own_film:
        own_folder, own_record = find_run(settings.run)
        own, figures = read_own_films(
            settings.image or (own_film,), own_folder, own_record, settings
        )
        for number, (path, figure) in enumerate(zip(own["image"], figures), start=1):
            name = f"{number:02d}-{Path(path).stem}.png"  # numbered: two films may share a name
            common.show(figure, own_folder / "own-films" / name)
        common.write_csv(own, own_folder / "own-films" / "predictions.csv")
        common.table(own.round(3).T, f"read by run {own_folder.name}. {common.DISCLAIMER}")
        if own_record["synthetic"]:
            common.banner("THIS RUN WAS TRAINED ON SYNTHETIC PHANTOMS: its reading means nothing.")


# %% Compare runs: name two of them, or more that repeat one another, in settings.compare
def compare_runs(names, resamples, seed):
    """Put evaluated runs side by side, film by film.

    Parameters
    ----------
    names : sequence of str
        Two runs with a predictions.csv, or more that repeat one another on other splits or seeds.
    resamples, seed : int
        Of the bootstrap over patients; every run takes the same ones.

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
        names_as_text = {"dtype": {"image": str, "patient": str}, "keep_default_na": False}
        tables.append(pd.read_csv(path, **names_as_text).set_index("image"))
    films = sorted(set.intersection(*(set(table.index) for table in tables)))
    tables = [table.loc[films].reset_index() for table in tables]
    if not films or any((t["label"] != tables[0]["label"]).any() for t in tables):
        raise UserError("the runs have no test films in common, or other labels for them")
    weights = patient_weights(tables[0]["patient"], np.zeros(len(films)), resamples, seed)
    none = np.zeros(len(films), bool)
    values = [measure(table, none, weights) for table in tables]
    kept = [name for name in values[0] if "point" not in name and "per cancer" not in name]
    two = len(names) == 2
    summary = values[1] - values[0] if two else sum(values) / len(values)
    drawn = summary[kept].iloc[1 : 1 + resamples]
    comparison = pd.DataFrame({name: v[kept].iloc[0] for name, v in zip(names, values)}).assign(
        **{"difference" if two else "mean": summary[kept].iloc[0]},
        low=drawn.quantile(0.025),
        high=drawn.quantile(0.975),
    )
    if not two:
        return comparison, None
    right = [(table["label"] == table["predicted"]).to_numpy() for table in tables]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return comparison, (*only, mcnemar(*only))


def mcnemar(b, c):
    """Return the exact two-sided p value of b against c discordant films (McNemar 1947)."""
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    return min(1.0, 2 * tail)


if __name__ == "__main__" and settings.compare:
    comparison, discordant = compare_runs(settings.compare, settings.resamples, settings.seed)
    last = comparison.columns[-3]
    common.table(comparison.round(3), f"over the same patients, 95 % intervals of the {last}")
    if discordant:
        print(
            f"right only in the first {discordant[0]}, only in the second {discordant[1]} films; "
            f"McNemar p = {discordant[2]:.3f}"
        )
    records = [common.read_json(common.runs_dir(run) / "settings.json") for run in settings.compare]
    if any(record["synthetic"] for record in records):
        common.banner("SYNTHETIC PHANTOMS: this comparison says nothing about mammograms.")
    print(common.DISCLAIMER)


# %% Report: metrics.json and one HTML file with everything in it
MODEL_CARD = """
<p>{disclaimer}</p>
<ul><li>Data: {source}. {scope}</li>
<li>Protocol: patients, never films, are split; validation patients choose the epoch, the rates,
the temperature and the threshold; every test film is read once, by the model of its fold, which
never saw its patient; intervals are 95 % percentiles over resampled patients.</li>
<li>Model: ResNet18, recipe {recipe}, weights: {weights}. A film is judged beside the same patient's
other breast where that is there; the figures of each film alone stand in a table of their own.</li>
<li>Intended use: teaching and research on method. Not for decisions about people.</li>
<li>Limits: one small database of digitised film from the 1990s; labels of films, not of biopsies;
few malignant films, hence wide intervals; no other hospital or scanner was tried.</li></ul>"""


def metrics_json(metrics, alone, predictions, record, thresholds, calibration, pointing, settings):
    """Return what metrics.json holds: the headline figures, then every table."""
    counts = pd.crosstab(predictions["label"], predictions["predicted"])
    counts = counts.reindex(index=range(3), columns=range(3), fill_value=0)
    value = metrics["value"]
    return {
        "synthetic": record["synthetic"], "run": record["run"], "source": record["source_used"],
        "weights": record["weights_used"], "recipe": record["recipe"], "seed": record["seed"],
        "split_seed": record.get("split_seed"),
        "n": len(predictions), "patients": predictions["patient"].nunique(),
        "folds": sorted(int(f) for f in predictions["fold"].unique()),
        "folds_of_the_split": record["data"]["folds"], "shuffled_labels": record["shuffle_labels"],
        "accuracy": value["accuracy"], "macro_f1": value["macro F1"],
        "malignant_recall": value["malignant recall"],
        "recall_per_class": {c: value[f"{c} recall"] for c in CLASS_NAMES},
        "confusion_matrix": counts.to_numpy(), "metrics": metrics.T.to_dict(),
        "metrics_film_alone": alone.T.to_dict(),
        "resamples": settings.resamples, "wanted_recall": settings.recall,
        "thresholds": thresholds.to_dict("records"), "calibration": calibration.to_dict(),
        "pointing_game": pointing.T.to_dict(), "disclaimer": common.DISCLAIMER,
    }  # fmt: skip


def write_report(folder, record, scope, tables):
    """Write report.html: the model card, tables and figures in one file without links.

    Parameters
    ----------
    folder : Path
        runs/<run>, with its figures.
    record : dict
        settings.json.
    scope : str
        n, folds, seed and weights in words.
    tables : dict of str to DataFrame
        By title.
    """
    card = MODEL_CARD.format(
        disclaimer=common.DISCLAIMER,
        source=record["source_used"],
        scope=html.escape(scope),
        recipe=record["recipe"],
        weights=html.escape(record["weights_used"]),
    )
    parts = [f"<h1>{html.escape(folder.name)}</h1>", card]
    for title, frame in tables.items():
        rows = frame.round(3).to_html(border=0, na_rep="")
        parts.append(f"<h2>{html.escape(title)}</h2>{rows}")
    for path in sorted((folder / "figures").glob("*.png")):
        picture = base64.b64encode(path.read_bytes()).decode()
        alt = path.stem
        parts.append(f'<h2>{alt}</h2><img alt="{alt}" src="data:image/png;base64,{picture}">')
    parts.append(f"<h2>Settings</h2><pre>{html.escape(str(pd.Series(record).to_string()))}</pre>")
    style = (
        "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td,th{padding:.2em .8em;text-align:right}img{max-width:100%}pre{overflow-x:auto}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{folder.name}</title>'
        f"<style>{style}</style><body>{''.join(parts)}</body></html>"
    )
    with common.replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__" and folder:
    values = metrics_json(
        metrics, metrics_alone, predictions, record, thresholds, calibration, pointing, settings
    )
    common.write_json(values, folder / "metrics.json")
    tables = {
        "Metrics": metrics,
        "Without and with the other breast": other_breast,
        "Beside the claim": claim,
        "Classification report": report,
        "Thresholds": thresholds,
        "Calibration": calibration,
        "By group": groups,
        "Pointing game": pointing,
    }
    write_report(folder, record, scope, tables)
    print(f"wrote predictions.csv, metrics.json and report.html in {folder}")
    print(common.DISCLAIMER)
