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

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

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
    laterality: str = ""  # left or right, of your (first) film; used if its halves are alike
    pair: bool = False  # your two films are both breasts of one person, judged beside each other


PROBABILITIES = [f"p_{name}" for name in CLASS_NAMES]
ALONE = [f"alone_{name}" for name in CLASS_NAMES]  # the same without the other breast
CLAIM = {"accuracy": 0.82, "malignant recall": 0.95, "macro F1": 0.81}  # seed project, no protocol

settings = common.command_line(Settings, __doc__)


# %% The interval of a share: nine of ten found sounds like 90 %, and may be 60 %
# This cell and the next two make tools and try them on made-up numbers; your run comes later.
# Wilson's interval is right for small numbers too, where the textbook's, share +- 1.96 standard
# errors, leaves 0 to 1 or has no width at all.
def wilson(hits, n):
    """Return the 95 % interval of a share (Wilson, JASA 1927)."""
    if n == 0:
        return math.nan, math.nan
    z, share = 1.959964, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(middle - half, 0.0), min(middle + half, 1.0)


rows = {f"{n} of {of}": wilson(n, of) for n, of in [(9, 10), (10, 10), (47, 52), (470, 520)]}
common.table(pd.DataFrame(rows, index=["from", "to"]).T.round(3), "95 % intervals of a share")


# %% Metrics, with scikit-learn as their witness
# AUC asks how films are ranked, recall and precision what they are called. 2,000 calls of a library
# would take minutes, so all rows of weights are computed at once, each film counting as often as a
# row says. One curve, true and false positives at every distinct score, serves all that ranks.
from sklearn import metrics as sk


def weighted_curve(scores, positive, weights):
    """Return weighted true and false positives, two float arrays (rows, 1 + distinct scores).

    From none to all films, `scores` (n,) from the highest down; `positive` is bool (n,), `weights`
    (rows, n).
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of the films of one score
    w, hit = weights[:, order].astype(float), positive[order]
    none = np.zeros((len(w), 1))
    return (np.hstack([none, np.cumsum(w * part, axis=1)[:, last]]) for part in (hit, ~hit))


def ranked(scores, positive, weights, recall=0.95):
    """Return ROC AUC, average precision and the specificity at a recall, (rows,) each."""
    tp, fp = weighted_curve(scores, positive, weights)
    found, passed, rows = tp[:, -1], fp[:, -1], np.arange(len(tp))
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (np.diff(fp) * (tp[:, 1:] + tp[:, :-1]) / 2).sum(1) / (found * passed)
        precision = np.nan_to_num(tp[:, 1:] / (tp[:, 1:] + fp[:, 1:]))
        average = (np.diff(tp) * precision).sum(1) / found
        enough = (tp >= recall * found[:, None] - 1e-6).argmax(1)
        specificity = 1 - fp[rows, enough] / passed
        return area, average, np.where(found > 0, specificity, np.nan)


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
        values = {"accuracy": hits.sum(1) / counts.sum((1, 2))}
        values.update({"balanced accuracy": np.nanmean(recall, 1), "macro F1": f1.mean(1)})
        for code, name in enumerate(CLASS_NAMES):
            values[f"{name} recall"] = recall[:, code]
            named = np.nan_to_num(precision[:, code])  # 0 if no film is called so
            values[f"{name} precision"] = np.where(recall[0, code] >= 0, named, np.nan)
        one, lesion = label == MALIGNANT, label != NORMAL
        auc, average, specificity = ranked(p[:, MALIGNANT], one, weights)
        values["AUC malignant"] = auc
        values["AUC abnormal"] = ranked(1 - p[:, NORMAL], lesion, weights)[0]
        either = p[:, MALIGNANT] + p[:, BENIGN]  # 0 on a film that is surely normal
        ratio = np.where(either > 0, p[:, MALIGNANT] / either, 0.5)[lesion]
        values["AUC benign/malignant"] = ranked(ratio, one[lesion], weights[:, lesion])[0]
        each = [ranked(p[:, c], label == c, weights)[0] for c in np.unique(label)]
        values["AUC macro"] = np.mean(each, axis=0)
        values["specificity at recall 0.95"] = specificity
        values["average precision malignant"] = average
        if recalled is not None:
            tn, fp, fn, tp = (weights @ np.eye(4, dtype=np.float32)[2 * one + recalled]).T
            values["recall at the point"] = tp / (tp + fn)
            values["specificity at the point"] = tn / (tn + fp)
            values["PPV at the point"] = tp / (tp + fp)
            values["NPV at the point"] = tn / (tn + fn)
            values["films recalled per cancer found"] = np.where(tp > 0, (tp + fp) / tp, np.nan)
    return pd.DataFrame(values)


def made_up_predictions(n=120):
    """Return predictions of made-up films, two a patient, with ties."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"patient": np.arange(n) // 2, "label": rng.integers(0, 3, n)})
    scores = rng.random((n, 3)).round(1) + 0.1 + 0.4 * np.eye(3)[table["label"]]
    table[PROBABILITIES] = scores / scores.sum(1, keepdims=True)
    return table.assign(predicted=scores.argmax(1))


made_up = made_up_predictions()
part = made_up["label"], made_up["predicted"]
rows = {"accuracy": sk.accuracy_score(*part), "macro F1": sk.f1_score(*part, average="macro")}
part = part[0] == MALIGNANT, made_up["p_malignant"]
rows["AUC malignant"] = sk.roc_auc_score(*part)
rows["average precision malignant"] = sk.average_precision_score(*part)
rows = pd.Series(rows).to_frame("scikit-learn")
rows["ours"] = measure(made_up, None, np.ones((1, len(made_up)), np.float32)).iloc[0]
assert np.allclose(rows["scikit-learn"], rows["ours"], atol=1e-6), rows
common.table(rows.round(6), f"{len(made_up)} made-up films: scikit-learn and ours agree")


# %% Patients are resampled, never films
# Films of one patient are alike, so that resampled films would give intervals that are too narrow.
# Each row of weights counts every film as often as its patient was drawn.
def patient_weights(patients, folds, resamples, seed):
    """Return how often each film counts, float32 (1 + resamples + n_folds, n).

    First all films once, then the resamples (as many patients as there are, with replacement), then
    each fold alone.
    """
    names, index = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    alone = [np.asarray(folds) == fold for fold in np.unique(folds)]
    return np.vstack([np.ones((1, len(index))), drawn[:, index], *alone]).astype(np.float32)


def summarise(values, folds=1):
    """Return value, low, high (95 %), fold mean and fold standard deviation of every metric."""
    drawn, alone = values.iloc[1:-folds], values.iloc[-folds:]
    low, high = drawn.quantile(0.025), drawn.quantile(0.975)
    table = pd.DataFrame({"value": values.iloc[0], "low": low, "high": high})
    return table.assign(**{"fold mean": alone.mean(), "fold sd": alone.std()})


part = pd.concat([made_up, made_up])  # every film of a patient once more: nothing new is known
rows = {"over patients": part["patient"], "over films": np.arange(len(part))}
rows = {name: patient_weights(rows[name], np.zeros(len(part)), 500, 0) for name in rows}
rows = {name: summarise(measure(part, None, rows[name]))[["low", "high"]] for name in rows}
rows = pd.concat(rows, axis=1).loc[["accuracy", "AUC malignant", "malignant recall"]]
common.table(rows.round(2), "films of a patient doubled: resampled films claim to know more")


# %% Compare runs: settings.compare = ("RUN1", "RUN2"), or more that repeat one another
# The interval of a difference, over the same resampled patients, is much narrower than two
# intervals side by side. If it holds 0, the difference may be chance. It is that of other patients:
# what another training of the same networks would change is not in it.
def compare_runs(names, resamples, seed):
    """Put evaluated runs side by side, film by film, over the same resampled patients.

    Returns
    -------
    comparison : DataFrame
        A row per metric: each run's value, then the difference (second minus first) of two runs, or
        the mean of more, with its 95 % interval.
    """
    if len(names) < 2:
        raise UserError(f"--compare takes two runs or more, found {len(names)}")
    tables = []
    for name in names:
        path = common.runs_dir(name) / "predictions.csv"
        last = max((p.stat().st_mtime for p in path.parent.glob("fold-*/best.pt")), default=0)
        if not path.is_file() or path.stat().st_mtime < last:  # a run may have gone on
            what = "older than the run's networks" if path.is_file() else "not there"
            raise UserError(f"{path} is {what}; python 05_evaluate.py --run {name} makes it")
        tables.append(common.read_table(path).set_index("image"))
    films = sorted(set.intersection(*(set(table.index) for table in tables)))
    tables = [table.loc[films].reset_index() for table in tables]
    if not films or len({table[["patient", "label"]].to_csv() for table in tables}) > 1:
        raise UserError("the runs have no test films in common, or other labels or patients")
    weights = patient_weights(tables[0]["patient"], np.zeros(len(films)), resamples, seed)
    values = [measure(table, None, weights) for table in tables]
    two = len(names) == 2
    last = summarise(values[1] - values[0] if two else sum(values) / len(values))
    comparison = pd.DataFrame({f"run {name}": v.iloc[0] for name, v in zip(names, values)})
    comparison["difference" if two else "mean"] = last["value"]
    comparison = comparison.assign(low=last["low"], high=last["high"]).dropna(how="all")
    return comparison.rename_axis(f"n = {len(films)} films")


if settings.compare:
    comparison = compare_runs(settings.compare, settings.resamples, settings.seed)
    title = f"over the same patients, 95 % intervals of the {comparison.columns[-3]}"
    common.table(comparison.round(3), title)
    rows = [common.record_in(common.runs_dir(name)) for name in settings.compare]
    for name in sorted({row["note"] for row in rows} - {""}):
        common.warn(f"compared are runs of which is noted: {name}")
    if any(row["synthetic"] for row in rows):
        common.banner("SYNTHETIC PHANTOMS: this comparison says nothing about mammograms.")
    print(common.DISCLAIMER)
    common.end_here()
else:
    print("settings.compare names no runs: nothing to compare")


# %% The run and its folds: the best checkpoints, the newest run or the one in settings.run
# A fold has a network for each look, whose logits are averaged. Validation films chose their
# epochs; the checkpoints keep these films' logits, and from them come the other breast's weight and
# the temperature.
class FoldModel(NamedTuple):
    """A fold's networks, in evaluation mode, with what turns their logits into probabilities."""

    number: int
    models: list
    reduce: list  # how many times each of them has films reduced
    prior: torch.Tensor  # (3,), what its logits lack: how frequent the classes are in training
    frequencies: torch.Tensor  # the same; of the validation films where its logits lack nothing
    calibration: dict  # temperatures "beside" the other breast and "alone", its "weight"
    validation: dict  # image, patient, laterality, logits (n, 3) and labels (n,) of the best epochs
    epochs: list
    seen: set  # digests of the films that its networks were trained or chosen on

    def read(self, dataset, *arguments, **options):
        """Return the Reading of a dataset, of all looks together; see `network.predict`."""
        looks = [(model, dataset.reduced(times)) for model, times in zip(self.models, self.reduce)]
        options["maps"] = True
        return network.mean_reading([network.predict(*k, *arguments, **options) for k in looks])

    def probabilities(self, logits, films, beside):
        """Return calibrated probabilities (n, 3); `films` has each one's patient and laterality."""
        if beside:
            logits = network.beside_other_breast(logits, films, self.calibration["weight"])
        temperature = self.calibration["beside" if beside else "alone"]
        return network.probabilities(logits, temperature, self.prior)


def load_folds(folder, record, device="auto"):
    """Return the FoldModels of a run (folder runs/<run>, record its settings.json), in order."""
    found, again = {}, f"python 04_train.py --resume --run {folder.name}"
    for path in sorted(folder.glob("fold-*/best.pt")):
        checkpoint, log = common.read_checkpoint(path), path.with_name("history.csv")
        model = network.MammogramNet(record["recipe"], record["dropout"])
        try:
            model.load_state_dict(checkpoint["model"])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()[:100]
            what = f"{path} does not fit the network of step 3, changed since? ({reason})"
            raise UserError(f"{what}; train again") from None
        waits = record["schedule"][common.LOOKS[path.parent.name.endswith("-window")]]
        done = len(pd.read_csv(log)) if log.is_file() else 0
        if done < min(waits["epochs"], checkpoint["epoch"] + waits["patience"]):
            common.warn(f"{path.parent.name} was stopped after {done} epochs; {again} goes on")
        model = model.to(common.choose_device(device), memory_format=torch.channels_last)
        checkpoint["model"] = model.eval().requires_grad_(False)  # Grad-CAM asks for its own
        found.setdefault(checkpoint["fold"], {})[checkpoint["reduce"]] = checkpoint
    shared, folds = set.intersection(*map(set, found.values())) if found else set(), []
    if not shared:
        raise UserError(f"{folder} has no fold-K/best.pt yet; {again} makes it")
    if len(shared) < len(record["looks"]):
        common.warn(f"not every fold has both looks yet, one look alone is judged; {again} goes on")
    for number, by_reduction in found.items():
        looks = [by_reduction[times] for times in sorted(shared, reverse=True)]
        logits = torch.stack([look["validation"]["logits"] for look in looks]).mean(0)
        validation, prior = {**looks[0]["validation"], "logits": logits}, looks[0]["prior"]
        weight, beside = network.fit_calibration(logits, validation, validation["labels"], prior)
        alone = network.fit_temperature(logits, validation["labels"], prior)[1]
        fitted = {"beside": beside, "alone": alone, "weight": weight}
        models, reduce, epochs = ([look[n] for look in looks] for n in ("model", "reduce", "epoch"))
        seen = set().union(*(look.get("seen", {}).get("films", ()) for look in looks))
        prior = prior, prior if prior.std() else data.prior_of(validation["labels"], "sampler")
        folds.append(FoldModel(number, models, reduce, *prior, fitted, validation, epochs, seen))
    return folds


def sides_of_own(paths, settings):
    """Return the sides of films of your own, "" where not told; mistakes in settings are refused.

    Before a run is opened: it may have to be made.
    """
    common.refuse([path for path in paths if not path.exists()], "check the name; not there")
    if settings.pair and len(paths) != 2:
        raise UserError(f"--pair takes the two films of one person, found {len(paths)}")
    side = str(common.sides_of(pd.Series([str(settings.laterality)]), "--laterality")[0])
    return [side, common.OTHER_SIDE[side]] if settings.pair else [side] * len(paths)


sides_of_own(common.named_films(settings.image), settings)
part = common.open_run(settings.run)
fold_models = load_folds(*part, settings.device)
judged_run, judged_record = part
for name in "predictions measured thresholds judged confusion calibration groups pointing".split():
    globals().pop(name, None)  # those of another run must not get into this one's report
rows = [(f.number, common.listing(f.epochs), *f.calibration.values()) for f in fold_models]
columns = ["fold", "best epochs", "temperature", "temperature alone", "weight of the other breast"]
chosen_on_validation = pd.DataFrame(rows, columns=columns)
common.table(chosen_on_validation.round(2), f"run {judged_run.name}: chosen on validation films")


# %% The operating point: a threshold that validation patients choose, before a test film is read
# Screening fixes a sensitivity (recall) and takes the specificity that comes with it. The threshold
# is chosen on validation films, so that the recall on test films is a result, not a choice. A film
# at or above it is recalled: called back for a second look.
def choose_threshold(scores, positive, recall):
    """Return the highest threshold that a share `recall` of positives (bool) lies at or above.

    Of scores (n,), p_malignant; 0, which recalls every film, if no film is positive.
    """
    ranked = np.sort(scores[positive])[::-1]
    needed = math.ceil(recall * len(ranked) - 1e-9)
    return float(ranked[max(needed, 1) - 1]) if len(ranked) else 0.0


def operating_points(folds, recall, beside=True):
    """Return a row per fold: its threshold and the malignant validation films that chose it."""
    rows = []
    for fold in folds:
        scores = fold.probabilities(fold.validation["logits"], fold.validation, beside)
        positive = fold.validation["labels"].numpy() == MALIGNANT
        threshold = choose_threshold(scores[:, MALIGNANT], positive, recall)
        rows.append((fold.number, threshold, int(positive.sum()), len(positive), recall))
    return pd.DataFrame(rows, columns=["fold", "threshold", "malignant", "films", "wanted"])


def above_threshold(predictions, thresholds):
    """Return whether p_malignant of each film lies at or above its fold's threshold, bool (n,)."""
    limits = predictions["fold"].map(thresholds.set_index("fold")["threshold"])
    return (predictions["p_malignant"] >= limits).to_numpy()


thresholds = operating_points(fold_models, settings.recall)
common.table(thresholds.round(4), f"thresholds for a malignant recall of {settings.recall}")
part = int(thresholds["malignant"].min())
if not part:
    print("A fold without malignant validation films chooses no threshold: all films are recalled.")
elif part * (1 - settings.recall) < 1:
    title = f"That is not promised: even if all of a fold's {part} malignant validation films are"
    print(f"{title} found, it may be {wilson(part, part)[0]:.2f} to 1.")


# %% A film of your own: settings.image = "film.png", then run this cell
# The same crop and canvas as in step 1, and pixels decide what is mirrored, as there. No model is
# better than the others, so the probabilities of all folds are averaged, but for those that know
# the film (it is one of this run's own). A film from another scanner may look like nothing that the
# network knows, and it would answer all the same: that cannot be forbidden, but it is said.
# Probabilities hold where classes are as frequent as in the training films (in screening, cancers
# are far fewer), and are no diagnosis.
def place_own_films(paths, settings, record):
    """Return the canvases of films, an array on the disk, and their rows as in films.csv."""
    size, crop = tuple(record["data"]["size"]), record["data"]["crop"]
    bits = record["film_bits"] if record["film_bits"] != 8 else None
    canvases = common.scratch_array((len(paths), *size), common.runs_dir())

    def place(item):
        number, path, side = item
        canvases[number], row = common.prepare_film(path, side, size, crop, bits)
        return {"image": str(path), **row, "bits": bits, "crop": crop}

    items = [*zip(range(len(paths)), paths, sides_of_own(paths, settings))]
    rows = pd.DataFrame(common.in_threads(place, items, "placing"))
    for row in rows[rows["problem"] != ""].itertuples():
        raise UserError(f"{row.image}: {row.problem} (is it a mammogram of one breast?)")
    common.say_oddities(rows)
    usual = pd.DataFrame(record["film_statistics"], index=["low", "high"]).T
    rows["unlike"] = common.unlike(rows[common.STATISTICS], usual)
    never = "films are unlike the training films; the models were never tried on such"
    common.warn_of(rows["image"][rows["unlike"]], never)
    if settings.pair and crop == "breast" and rows["mirrored"].nunique() == 1:
        common.warn("both films look like the same breast; was one mirrored, or named twice?")
    return canvases, rows


def read_own_films(paths, folds, record, settings):
    """Read films of your own by the models of all folds, or of those that never saw a film.

    Returns
    -------
    own : DataFrame
        image, p_benign, p_normal, p_malignant (calibrated), predicted, threshold, recalled, note.
    figures : iterator of Figure
        One a film, drawn when it is asked for: the film, Grad-CAM and the map of places over it.
    """
    canvases, rows = place_own_films(common.named_films(paths), settings, record)
    bar = common.Progress(sum(len(fold.models) for fold in folds) * len(rows), "reading")
    couple, parts, maps = {"patient": [0, 0], "laterality": ["left", "right"]}, [], []
    for group in [[0, 1]] if settings.pair else [[n] for n in range(len(rows))]:
        part, films = rows.iloc[group], data.MammogramDataset.of_canvases(canvases[group])
        never = [fold for fold in folds if fold.seen.isdisjoint(part["digest"])]
        used = never or folds
        readings = [fold.read(films, 1, bar=bar) for fold in used]
        each = [f.probabilities(r.logits, couple, settings.pair) for f, r in zip(used, readings)]
        p, prior = np.mean(each, axis=0), torch.stack([fold.frequencies for fold in used]).mean(0)
        part = part.assign(**dict(zip(PROBABILITIES, p.T)), never=len(never))
        part["predicted"] = np.take(CLASS_NAMES, network.decide(p, prior, settings.tempering))
        points = operating_points(used, settings.recall, settings.pair)
        parts.append(part.assign(threshold=points["threshold"].mean()))
        maps += zip(*network.mean_reading(readings)[1:])
    bar.close()
    own = pd.concat(parts)
    own["recalled"] = own["p_malignant"] >= own["threshold"]
    own["note"] = np.where(own["unlike"], "unlike the training films", "")
    for known, what in [
        (own["never"] == 0, "known by heart: every fold was trained or chosen on it"),
        (own["never"].between(1, len(folds) - 1), "read by the folds alone that never saw it"),
    ]:
        common.warn_of(own["image"][known], f"films of this run are {what}")
        own.loc[known, "note"] = what
    each = zip(own.to_dict("records"), maps)
    figures = (draw_own_film(row, *heats, canvases.shape[1:]) for row, heats in each)
    return own[["image", *PROBABILITIES, "predicted", "threshold", "recalled", "note"]], figures


def draw_own_film(row, cam, places, size):
    """Draw a film, and over it Grad-CAM and the map of places; return the figure."""
    film = common.read_film(row["file"], row["bits"], [], row["crop"])
    figure, axes = plt.subplots(1, 3, figsize=(9, 4.2), layout="constrained")
    pictures = {Path(row["image"]).name: np.zeros((2, 2)), "Grad-CAM": cam, "places": places}
    for axis, (title, heat) in zip(axes, pictures.items()):
        heat = common.canvas_on_film(heat, common.geometry_of(row), size)
        common.draw_heat(axis, film, heat)
        axis.set_title(title, fontsize=9)
    said = ", ".join(f"{name} {row[f'p_{name}']:.2f}" for name in CLASS_NAMES)
    figure.suptitle(f"{said}. {common.DISCLAIMER}", fontsize=8)
    return figure


if settings.image:
    own, rows = read_own_films(settings.image, fold_models, judged_record, settings)
    common.write_csv(own, judged_run / "own-films" / "predictions.csv")
    title = "recalled: p_malignant reaches the threshold that validation films chose"
    title = f"read by run {judged_run.name}; {title}. {common.DISCLAIMER}"
    common.table(own.head(8).round(3).T, f"the first films, {title}")
    for number, (name, figure) in enumerate(zip(own["image"], rows), 1):  # two may share a name
        common.show(figure, judged_run / "own-films" / f"{number:02d}-{Path(name).stem}.png")
        figure.clear()  # or its pictures would stay in memory for a while
    if judged_record["note"]:
        common.warn(f"the run {judged_run.name} was trained so: {judged_record['note']}")
    if judged_record["synthetic"]:
        common.banner("THIS RUN WAS TRAINED ON SYNTHETIC PHANTOMS: its reading means nothing.")
    common.end_here()
else:
    print("settings.image names no film of yours: nothing to read")


# %% Predict: every film by the model that never saw its patient, and where that model looked
# A film is predicted once, by the model of the fold that it was the test film of. The films, labels
# and folds must be those of the training: they are compared by digests.
def predict_run(folds, prepared, record, settings):
    """Predict the test films of every fold.

    Returns
    -------
    predictions : DataFrame
        image, patient, fold, label, p_benign, p_normal, p_malignant (calibrated, judged beside the
        patient's other breast), predicted, and the same of each film alone.
    reading : Reading
        In the same order.
    """
    if prepared.identity() != record["data"]:
        what = f"{prepared.folder} holds other films, labels or folds than the run was trained on"
        raise UserError(f"{what}; prepare them as they were (step 1), or train again")
    shuffled = record["shuffle_labels"]
    labels = data.shuffled_labels(prepared.labels, record["seed"]) if shuffled else None
    dtype = common.choose_precision(settings.precision, common.choose_device(settings.device))
    folds = [fold for fold in folds if fold.number in {*prepared.splits["fold"]}]
    parts = [np.flatnonzero(prepared.splits["fold"] == fold.number) for fold in folds]
    if not folds:
        what = f"run {record['run']} was trained with --fold none: no film is left to judge it on"
        raise UserError(f"{what}; begin another one with it, --weights RUN, or read an --image")
    progress = common.Progress(len(folds[0].models) * sum(map(len, parts)), "predicting")
    tables, readings = [], []
    for fold, rows in zip(folds, parts):
        test = data.MammogramDataset(prepared, rows, labels)
        read = fold.read(test, settings.batch_size, dtype, progress)
        table = prepared.splits.iloc[rows][["image", "patient", "fold"]].copy()
        table["label"] = test.labels.numpy()
        table[PROBABILITIES] = fold.probabilities(read.logits, test.table(), beside=True)
        p = table[PROBABILITIES].to_numpy()
        table["predicted"] = network.decide(p, fold.frequencies, settings.tempering)
        table[ALONE] = p = fold.probabilities(read.logits, test.table(), beside=False)
        table["alone_predicted"] = network.decide(p, fold.frequencies, settings.tempering)
        tables.append(table)
        readings.append(read)
    progress.close()
    reading = network.Reading(*(np.concatenate(column) for column in zip(*readings)))
    return pd.concat(tables, ignore_index=True), reading


def scope_of(predictions, folds, record):
    """Return on what a figure was measured: n, patients, folds, seeds, weights, and what is odd."""
    share = record.get("train_share_used", record.get("train_share", 1))
    said = ["SYNTHETIC PHANTOMS" if record["synthetic"] else "", record["note"]]
    said.append(f"{share:.0%} of the training patients" if share < 1 else "")
    said.append("one look of two" if len(folds[0].models) < len(record["looks"]) else "")
    n = f"n = {len(predictions)} films of {predictions['patient'].nunique()} patients"
    said += [n, f"{predictions['fold'].nunique()} of {record['data']['folds']} folds"]
    said = ", ".join(filter(None, [*said, f"split seed {record['split_seed']}"]))
    return f"{said},\ntraining seed {record['seed']}, weights: {record['weights_used']}"


prepared = common.open_prepared(judged_record["source_used"])
predictions, reading = predict_run(fold_models, prepared, judged_record, settings)
tempering = settings.tempering  # that these films were named with
read_rows = pd.Series(predictions.index, predictions["image"])  # of `reading`
common.write_csv(predictions.round(6), judged_run / "predictions.csv")
part = scope_of(predictions, fold_models, judged_record)
title = f"the first predictions; 0 benign, 1 normal, 2 malignant; {part}"
common.table(predictions.head(6).round(3), title)

# %% Test metrics: pooled over the folds, with intervals from resampling patients
# With 52 malignant films one fold says little, so predictions of all folds are pooled. Specificity
# at recall 0.95 is read off the test films' own curve, to compare runs; "at the point" is the
# threshold that validation chose.
# `thresholds` chosen anew and `predictions` filtered count once this cell is run.
limits, scope = thresholds, scope_of(predictions, fold_models, judged_record)
measured = predictions.assign(recalled=above_threshold(predictions, limits))
measured.index = read_rows[measured["image"]]  # whatever order and numbers they have here
part = measured["patient"], measured["fold"]
draws = patient_weights(*part, settings.resamples, settings.seed)
metrics = summarise(measure(measured, measured["recalled"], draws), part[1].nunique())
title = f"test metrics, 95 % intervals over patients (-: there are no such films); {scope}"
common.table(metrics.round(3), title)

# %% Judged in four ways, beside the claim
# Part of the other breast's gain is how MIAS was collected: most patients have exactly one abnormal
# breast. The likeliest class is right most often, but seldom says benign; dividing by a power of
# the classes' frequencies, chosen on split seed 0, says it more often and costs accuracy. A figure
# means something only beside always answering "normal". The claim is the one that the project began
# with; nobody has shown how it was measured.
DECIDED = ["accuracy", "balanced accuracy", "macro F1", *(f"{name} recall" for name in CLASS_NAMES)]
RANKED = ["AUC malignant", "AUC abnormal", "AUC benign/malignant", "specificity at recall 0.95"]
RANKED += ["recall at the point", "specificity at the point"]
part = dict(zip(PROBABILITIES, measured[ALONE].to_numpy().T))
part = measured.assign(**part, predicted=measured["alone_predicted"])
row = above_threshold(part, operating_points(fold_models, limits["wanted"][0], beside=False))
ways = {"beside the other breast": (measured, measured["recalled"]), "film alone": (part, row)}
part = measured[PROBABILITIES].to_numpy().argmax(1)
ways["likeliest class"] = measured.assign(predicted=part), None
ways["always normal"] = measured.assign(predicted=NORMAL), None
judged = {way: summarise(measure(*ways[way], draws), measured["fold"].nunique()) for way in ways}
rows = {way: DECIDED + (RANKED if ways[way][1] is not None else []) for way in ways}
rows = {way: judged[way].loc[rows[way], ["value", "low", "high"]] for way in ways}
four_ways = pd.concat(rows, axis=1)
title = "{0.value:.2f} ({0.low:.2f} to {0.high:.2f})".format
words = {way: part.dropna(how="all").apply(title, axis=1) for way, part in rows.items()}
words.update({"claim": pd.Series(CLAIM)} if judged_record["source_used"] == "mias" else {})
words = pd.DataFrame(words).reindex(DECIDED + RANKED)
common.table(words, f"judged in four ways, 95 % intervals over patients; {scope}")

# %% Confusion: what is taken for what
# Where do the errors go? On MIAS half or more of the benign and many malignant films are called
# normal, since two of three films are. The classification report has precision, recall and F1.
row, part = (measured["label"], measured["predicted"]), np.unique(measured["label"])
options = {"labels": part, "target_names": np.take(CLASS_NAMES, part), "zero_division": 0}
report = pd.DataFrame(sk.classification_report(*row, output_dict=True, **options)).T
common.table(report.round(3), f"classification report; {scope}")
part = np.unique(measured[["label", "predicted"]])
options = {"labels": part, "display_labels": np.take(CLASS_NAMES, part), "cmap": "Blues"}
confusion = sk.ConfusionMatrixDisplay.from_predictions(*row, **options)
common.show(confusion.figure_, judged_run / "figures" / "confusion.png", scope)


# %% ROC: every threshold at once, with the operating point on the curve for malignant
# The dot is the threshold that validation films chose; it lies on the curve only roughly, since
# each fold has its own.
figure, axis = plt.subplots(figsize=(5.4, 4.6))
rows = {"malignant": (measured["label"] == MALIGNANT, measured["p_malignant"])}
rows["abnormal"] = measured["label"] != NORMAL, 1 - measured["p_normal"]
for name, part in rows.items():
    if part[0].nunique() > 1:
        title = "{0}, 95 % {1.low:.2f} to {1.high:.2f}".format(name, metrics.loc[f"AUC {name}"])
        sk.RocCurveDisplay.from_predictions(*part, name=title, ax=axis)
part = metrics["value"][["specificity at the point", "recall at the point"]]
axis.plot(1 - part.iloc[0], part.iloc[1], "ok", label="threshold from validation")
axis.plot([0, 1], [0, 1], "--", color="#999999", label="chance")
axis.set(xlabel="1 - specificity", ylabel="sensitivity (recall)", aspect="equal")
axis.legend(fontsize=8, loc="lower right")
common.show(figure, judged_run / "figures" / "roc.png", scope)


# %% Calibration: do probabilities mean what they say, before and after it
# Of films whose highest probability is 0.7, seven in ten should be of that class. Before: logits as
# trained, the other breast's weight 1. After: with its fitted weight, the classes' frequencies and
# the temperature (Guo et al., ICML 2017); which of them helped is not told apart here.
from sklearn.calibration import CalibrationDisplay


def calibration_errors(probabilities, labels, bins=10):
    """Return the multi-class Brier score and the expected calibration error (Guo et al., 2017).

    Of probabilities (n, 3) and labels (n,); 0 is perfect, a third each has a Brier score of 0.667.
    """
    brier = float(((probabilities - np.eye(3)[labels]) ** 2).sum(1).mean())
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    part = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs((confidence - right)[part == b].sum()) for b in range(bins)]
    return brier, float(sum(gaps) / len(labels))


part = prepared.labels.set_index("image").loc[read_rows.index]
part = network.beside_other_breast(reading.logits, part)[measured.index]
rows = {"before": network.probabilities(part, 1.0, torch.ones(3))}
rows["after"] = measured[PROBABILITIES].to_numpy()
calibration = {name: calibration_errors(part, measured["label"]) for name, part in rows.items()}
calibration = pd.DataFrame(calibration, index=["Brier score", "ECE"])
common.table(calibration.round(3), f"calibration before and after; {scope}")
figure, axis = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
part = measured["label"]
for name, row in rows.items():
    title = "{}: Brier {:.2f}, ECE {:.2f}".format(name, *calibration[name])
    options = {"n_bins": 10, "name": title, "ax": axis, "ref_line": name == "after"}
    CalibrationDisplay.from_predictions(row.argmax(1) == part, row.max(1), **options)
axis.set(xlabel="highest probability", ylabel="share of right answers", xlim=(0.3, 1))
common.show(figure, judged_run / "figures" / "calibration.png", f"Reliability; {scope}")


# %% By group: which findings, tissues and sizes are found, and which are missed
# One average hides much: are small lesions, calcifications and dense tissue what is missed? A
# finding counts as found if its film is called abnormal, wherever the network looked. n is small in
# each group, so the intervals are wide, and would be wider still over patients.
def by_group(predictions, prepared):
    """Return the recall by finding type, tissue and lesion radius, with Wilson intervals.

    Columns group, value, n, called abnormal, right class, low, high (of "called abnormal").
    """
    films = predictions.merge(prepared.labels[["image", "tissue"]], on="image")
    films = films[films["label"] != NORMAL]
    findings = prepared.findings.merge(films[["image", "label", "predicted"]], on="image")
    sizes = ["to 25 px", "26 to 50 px", "51 to 100 px", "over 100 px"]
    size = pd.cut(findings["radius"], [0, 25, 50, 100, np.inf], labels=sizes)
    keys, rows = {"finding": (findings, findings["type"]), "radius": (findings, size)}, []
    for group, (frame, key) in {**keys, "tissue": (films, films["tissue"])}.items():
        for value, part in frame[key.astype(str) != ""].groupby(key, observed=True):
            found, n = int((part["predicted"] != NORMAL).sum()), len(part)
            right = float((part["predicted"] == part["label"]).mean())
            rows.append((group, value, n, found / n, right, *wilson(found, n)))
    columns = ["group", "value", "n", "called abnormal", "right class", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


groups = by_group(measured, prepared)
common.table(groups.round(2), f"abnormal films and findings, by group; {scope}")
figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
part = groups[::-1]
rows = [f"{row.group} {row.value} (n = {row.n})" for row in part.itertuples()]
options = {"finding": "#0072B2", "tissue": "#009E73", "radius": "#CC79A7"}
options = {"color": part["group"].map(options)}
options["xerr"] = np.abs(part[["low", "high"]].to_numpy().T - part["called abnormal"].to_numpy())
axis.barh(rows, part["called abnormal"], capsize=3, **options)
axis.axvline(1 - metrics.loc["normal recall", "value"], color="black", ls="--")
axis.set(xlabel="share called abnormal, 95 % Wilson intervals (dashed: normal films)", xlim=(0, 1))
common.show(figure, judged_run / "figures" / "groups.png", scope)


# %% The pointing game: is the highest place of a map in a radiologist's circle?
# After Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016; or within half a
# place of the last stage, 16 px of a canvas of 512 rows: a place is no sharper than that. Chance is
# the share of the breast that would be a hit, so that a large circle is no merit.
def peaks(maps, size):
    """Return the canvas pixels (x, y) where maps (n, h, w) are highest, shape (n, 2)."""
    h, w = maps.shape[1:]
    y, x = np.divmod(maps.reshape(len(maps), -1).argmax(1), w)
    points = np.stack([(x + 0.5) * size[1] / w - 0.5, (y + 0.5) * size[0] / h - 0.5], 1)
    points[np.ptp(maps, axis=(1, 2)) == 0] = np.nan  # a map that is the same everywhere: no hit
    return points


def pointing_game(predictions, reading, prepared):
    """Return a row per usable circle: image, type, cam and places (hit or not), and chance.

    Chance is the share of the breast's pixels that would be a hit.
    """
    size = prepared.films.shape[1:]
    tolerance = 16 * data.reduction(prepared.films)  # px
    found = {"cam": peaks(reading.cams, size), "places": peaks(reading.places, size)}
    number = {image: n for n, image in enumerate(prepared.labels["image"])}
    place = {image: n for n, image in predictions["image"].items()}
    ys, xs = np.mgrid[: size[0], : size[1]]
    rows, usable = [], prepared.findings.dropna(subset=["canvas_radius"])
    for c in usable[usable["image"].isin(place)].itertuples():
        reach, n = c.canvas_radius + tolerance, place[c.image]
        hits = [bool(np.hypot(*(p[n] - (c.canvas_x, c.canvas_y))) <= reach) for p in found.values()]
        near = np.hypot(xs - c.canvas_x, ys - c.canvas_y) <= reach
        breast = prepared.films[number[c.image]] > 0
        rows.append((c.image, c.type, *hits, float(near[breast].mean())))
    return pd.DataFrame(rows, columns=["image", "type", "cam", "places", "chance"])


points = pointing_game(measured, reading, prepared)
pointing = pd.DataFrame({"n": len(points), "hits": points[["cam", "places"]].mean()})
rows = [wilson(int(points[name].sum()), len(points)) for name in pointing.index]
pointing = pointing.assign(**dict(zip(("low", "high"), zip(*rows))), chance=points["chance"].mean())
common.table(pointing.round(3), f"pointing game over {len(points)} usable circles; {scope}")


# %% Hits, misses, false alarms: the films that a reader should see first
# What it found, what it missed, and where it cried wolf, with Grad-CAM and with the map of places:
# both of the likelier of benign and malignant, each at its brightest where it is highest on that
# film, so that maps of two films do not compare. Canvas and maps are shown where they lie on the
# film as the radiologist knows it, unmirrored and uncropped.
def draw_film(axis, image, heat, prepared):
    """Draw a prepared film, a map (h, w) over its canvas and its circles, in film pixels."""
    row = prepared.table[prepared.table["image"] == image].iloc[0]
    g, size = common.geometry_of(row), prepared.films.shape[1:]
    film, heat = (common.canvas_on_film(part, g, size) for part in (prepared.films[row.name], heat))
    common.draw_heat(axis, film, heat)
    common.draw_circles(axis, prepared.findings[prepared.findings["image"] == image])


def draw_sheet(predictions, heats, prepared):
    """Draw five films each, with maps (n, h, w) over them; return the figure."""
    ranked = predictions.sort_values("p_malignant")
    malignant, normal = (ranked[ranked["label"] == code] for code in (MALIGNANT, NORMAL))
    sheet = {"malignant, highest p": malignant[::-1], "malignant, lowest p": malignant}
    sheet["normal, highest p"] = normal[::-1]
    figure, axes = plt.subplots(len(sheet), 5, figsize=(9, 6.6), layout="constrained")
    plt.setp(axes, xticks=[], yticks=[])
    for line, (name, films) in zip(axes, sheet.items()):
        line[0].set_ylabel(name)
        for axis, (n, row) in zip(line, films.iterrows()):
            draw_film(axis, row["image"], heats[n], prepared)
            called = CLASS_NAMES[row["predicted"]]
            axis.set_title(f"{row['image']}, {called}\np = {row['p_malignant']:.2f}", fontsize=8)
    return figure


for name, part in {"gradcam": reading.cams, "places": reading.places}.items():
    figure = draw_sheet(measured, part, prepared)
    title = f"{name}; what films are called, p of malignant; {scope}"
    common.show(figure, judged_run / "figures" / f"{name}.png", title)

# %% metrics.json and the report: for programs, and for people
# What was measured, on how many films and patients, with which seeds and weights. The report is one
# HTML file with the model card, all tables and all figures, to be sent or printed as it is; it
# names the limits before the figures.
MODEL_CARD = """<p>{disclaimer}</p><ul><li>Data: {source_used}. {scope}</li>
<li>Protocol: patients, never films, are split; validation patients choose the epoch, the
temperature, the other breast's weight and the threshold; every test film is read once, by networks
that never saw its patient; intervals are 95 % percentiles over resampled patients, by group and in
the pointing game Wilson's over films and findings.</li>
<li>Model: ResNet18, recipe {recipe}, looks: {looks}, weights: {weights_used}. Judged beside
the patient's other breast where that is there; the figures of each film alone stand beside.</li>
<li>Limits: one database, no other hospital or scanner; few malignant films make wide intervals;
probabilities, PPV and NPV are for its share of classes; screening has fewer cancers.</li></ul>"""

summary, row = ("synthetic", "run", "recipe", "seed", "split_seed", "note"), metrics["value"]
summary = {name: judged_record[name] for name in summary}
summary.update(source=judged_record["source_used"], weights=judged_record["weights_used"])
summary.update(n=len(measured), patients=measured["patient"].nunique())
summary.update(folds=sorted({*measured["fold"]}))
summary.update(folds_of_the_split=judged_record["data"]["folds"])
summary.update(shuffled_labels=judged_record["shuffle_labels"], disclaimer=common.DISCLAIMER)
summary.update(accuracy=row["accuracy"], macro_f1=row["macro F1"])
summary["malignant_recall"] = row["malignant recall"]
summary["recall_per_class"] = {name: row[f"{name} recall"] for name in CLASS_NAMES}
summary["confusion_matrix"] = confusion.confusion_matrix
summary["classes_of_the_confusion_matrix"] = confusion.display_labels
tables = {"metrics": metrics, "metrics_film_alone": judged["film alone"]}
tables["metrics_likeliest_class"] = four_ways["likeliest class"].dropna(how="all")
summary.update({name: frame.T.to_dict() for name, frame in tables.items()})
summary.update(pointing_game=pointing.T.to_dict(), calibration=calibration.to_dict())
summary.update(wanted_recall=limits["wanted"][0], thresholds=limits.to_dict("records"))
summary["temperatures"] = [{"fold": f.number, **f.calibration} for f in fold_models]
summary.update(tempering=tempering, resamples=len(draws) - 1 - len(summary["folds"]))
common.write_json(summary, judged_run / "metrics.json")


def report_page(tables, figures, record, scope):
    """Return a page of HTML: the model card, tables {title: DataFrame}, figures and settings."""
    card, name = {**record, "scope": scope, "looks": " and ".join(record["looks"])}, record["run"]
    card = MODEL_CARD.format(**{name: html.escape(str(text)) for name, text in card.items()})
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em}"
    head = f"<meta charset='utf-8'><title>{name}</title><style>{style}</style>"
    parts = [f"{head}<h1>{name}</h1>{card}"]
    for title, frame in tables.items():
        parts.append(f"<h2>{title}</h2>{frame.round(3).to_html(border=0, na_rep='')}")
    for path in figures:
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts.append(f'<h2>{path.stem}</h2><img style="max-width:100%" src="{source}">')
    settings = html.escape("\n".join(f"{name:<20}{value}" for name, value in record.items()))
    return f'<!doctype html><html lang="en">{"".join(parts)}<h2>Settings</h2><pre>{settings}</pre>'


rows = {"metrics": metrics, "judged in four ways": words, "classification report": report}
rows.update({"thresholds": limits, "chosen on validation": chosen_on_validation})
rows.update({"calibration": calibration, "by group": groups, "pointing game": pointing})
part = common.read_json(prepared.folder / "prepared.json").get("shortcuts")
rows["shortcuts: what tells classes apart without a look"] = pd.DataFrame(part)
with common.replacing(judged_run / "report.html") as part:
    rows = rows, sorted((judged_run / "figures").glob("*.png")), judged_record, scope
    part.write_text(report_page(*rows), encoding="utf-8")
print(f"wrote predictions.csv, metrics.json and report.html in {judged_run}\n{common.DISCLAIMER}")
