"""Bad films, a bad disk and bad moments end with one message, and what was there stays."""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare_data
from PIL import Image
from test_prepare import TINY, breast, moved, own_films, refused

import common
from common import UserError


def tree(folder):
    """Return {path: digest} of all files below a folder, apart from the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def prepared_tiny(tmp_path_factory):
    """Prepare 12 phantom patients once; return the data folder."""
    data = tmp_path_factory.mktemp("tiny") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(data))
        prepare_data(**TINY)
    return data


@pytest.fixture
def ready(home, prepared_tiny):
    """Give a test those data in a folder of its own."""
    return Path(shutil.copytree(prepared_tiny, home / "data"))


# ---------------------------------------------------------------------- films


def pgm(magic=b"P5", side=128, most=255, data=None):
    """Return the bytes of a PGM of a breast, or of other data."""
    data = breast().tobytes() if data is None else data
    return b"%s\n%d %d\n%d\n" % (magic, side, side, most) + data


UNUSABLE = {
    "zero bytes": (b"", "(0 bytes) is damaged"),
    "cut short": (pgm(data=b"\1" * 999), "cannot be decoded"),
    "wrong magic": (pgm(b"P9"), "is not read"),
    "cut header": (b"P5\n12", "cannot be decoded"),
    "a web page": (b"<html>404</html>", "is not read"),
    "all black": (pgm(data=bytes(128 * 128)), "no breast found"),
    "all white": (pgm(data=b"\xff" * 128 * 128), "no breast found"),
    "one pixel": (pgm(side=1, data=b"\x80"), "no breast found"),
}


@pytest.mark.parametrize("data, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_film_is_named_with_its_reason_and_left_out_once_if_allowed(
    home, capsys, data, reason
):
    choice = own_films(home)
    path = home / "scans" / "000.png"
    path.rename(path.with_suffix(".pgm")).write_bytes(data)
    message = refused(prepare_data, **choice)  # the pictures before the check do not end the run
    assert "000" in message and reason in message and "--allow-partial" in message
    assert "001" not in message and "missing" not in message
    capsys.readouterr()
    prepared = prepare_data(**choice, allow_partial=True)
    assert prepared.labels["image"].tolist() == [f"{n:03d}" for n in range(1, 12)]
    said = capsys.readouterr().err
    assert said.count("000: ") == 1 and reason in said and "missing" not in said
    assert prepared.note == "films left out, 11 of 12"


def test_every_film_that_is_left_out_is_named_once_with_its_own_reason(home, capsys):
    rows = [f"{n:03d},{n // 2 % 3},p{n // 2}" for n in range(12)]
    choice = own_films(home, [*rows, *(f"bad{n},0,q{n}" for n in range(9)), "lost,0,p9"])
    for n in range(9):
        (home / "scans" / f"bad{n}.png").write_bytes(bytes(n))
    assert len(prepare_data(**choice, allow_partial=True).films) == 12
    said = capsys.readouterr().err
    assert "1 films are missing: lost;" in said
    assert all(said.count(f"bad{n}: ") == 1 and f"({n} bytes)" in said for n in range(9))


def test_nothing_but_unusable_films_is_refused_even_if_allowed(home):
    choice = own_films(home)
    for path in (home / "scans").iterdir():
        path.write_bytes(b"")
    assert "no film is left" in refused(prepare_data, **choice, allow_partial=True)


def test_a_film_of_another_size_is_refused_as_a_film_of_mias(ready):
    folder = ready / "phantom" / "raw"
    message = refused(prepare_data, source="mias", images=str(folder))
    assert "128 x 128 px, expected 1024 x 1024" in message and "mdb001" in message
    assert "298 films are missing" in message


def test_coloured_marks_on_a_film_are_warned_of_and_a_grey_film_in_colour_is_not(home, capsys):
    film = np.dstack([breast()] * 3)
    Image.fromarray(film).save(home / "grey.jpg")
    common.read_film(home / "grey.jpg")
    assert capsys.readouterr().err == ""
    film[60:64, 20:40] = 255, 0, 0
    Image.fromarray(film).save(home / "marked.png")
    assert common.read_film(home / "marked.png").shape == (128, 128)
    assert f"{home / 'marked.png'}: has colours" in capsys.readouterr().err


def test_names_of_films_match_whatever_their_case_but_not_twice(ready, capsys):
    first = common.load_prepared("phantom")
    for path in common.film_paths(first.folder / "raw"):
        path.rename(path.with_name(path.name.upper()))
    again = prepare_data(**TINY)
    assert again.table["file"][0].endswith("MDB001.PGM")
    assert again.fingerprint == first.fingerprint and again.labels.equals(first.labels)
    assert "warning" not in capsys.readouterr().err
    Image.fromarray(breast()).save(first.folder / "raw" / "mdb001.png")
    message = refused(prepare_data, **TINY)
    assert "several films could be meant" in message and message.endswith(" by: mdb001")


def test_names_in_a_csv_match_whatever_their_case(home):
    rows = [f"{n:03d},{n // 2 % 3},p{n // 2}" for n in range(1, 12)]
    choice = own_films(home, ["Left.PNG,0,p0", *rows])
    (home / "scans" / "000.png").rename(home / "scans" / "LEFT.png")
    assert prepare_data(**choice).labels["image"].tolist()[-1] == "Left"


def test_the_same_film_under_two_names_is_refused(home):
    choice = own_films(home)
    shutil.copy(str(home / "scans" / "000.png"), str(home / "scans" / "007.png"))
    assert "all rows but one of each: 000, 007" in refused(prepare_data, **choice)


ROWS = {
    "x off the film": (
        "mdb002 F CIRC B 5000 60 9",
        "error: findings lie outside; scale them, or take the films they are px of: mdb002",
    ),
    "y off the film": (
        "mdb002 F CIRC B 40 5000 9",
        "error: findings lie outside; scale them, or take the films they are px of: mdb002",
    ),
    "on the background": (
        "mdb002 F CIRC B 127 1 1",
        "centre off the breast, and are not used: mdb002",
    ),
    "no row for a film": ("", "1 films have no label and are left out: mdb002"),
    "a row without a film": ("mdb002 F NORM\nmdb099 F NORM", "error: 1 films are missing: mdb099"),
    "contradictory rows": ("mdb002 F NORM\nmdb002 F CIRC B", "error: Info.txt cannot be trusted"),
}


@pytest.mark.parametrize("row, message", ROWS.values(), ids=ROWS)
def test_a_doubtful_row_is_warned_of_or_refused_with_its_film(ready, capsys, row, message):
    info = ready / "phantom" / "raw" / "Info.txt"
    lines = [line for line in info.read_text().splitlines() if not line.startswith("mdb002")]
    info.write_text("\n".join([*lines, row]))
    try:
        prepare_data(**{**TINY, "folds": 2})
        said = capsys.readouterr().err
    except UserError as error:
        said = f"error: {error}"
    assert message in said and (said.startswith("error") or "warning" in said)


# ---------------------------------------------------------------------- the disk

FULL, QUOTA, RIGHTS = errno.ENOSPC, errno.EDQUOT, errno.EACCES


def fail_on(monkeypatch, owner, name, code, nth=0, only=""):
    """Let a function fail from its nth call on, of those with a text among their arguments."""
    function, calls = getattr(owner, name), iter(range(999999))

    def fails(*arguments, **keywords):
        if only in str(arguments) and next(calls) >= nth:
            names = [only] if code == RIGHTS and only else []  # a failed write names no file
            raise OSError(code, os.strerror(code), *names)
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, fails)


WRITES = [(os, "fsync", n, (FULL, QUOTA, RIGHTS)[n % 3]) for n in range(6)] + [
    (Path, "write_text", 0, FULL),
    (common.tempfile, "TemporaryFile", 0, FULL),
    (np, "memmap", 0, FULL),
    (np.lib.format, "write_array_header_1_0", 0, FULL),
    (common.pd.DataFrame, "to_csv", 2, QUOTA),
    (Image.Image, "save", 3, FULL),
    (Image.Image, "save", 0, RIGHTS),
]


@pytest.mark.parametrize("owner, name, nth, code", WRITES, ids=[f"{w[1]}-{w[2]}" for w in WRITES])
def test_a_write_that_fails_ends_with_one_message_and_the_old_data_stay(
    ready, monkeypatch, owner, name, nth, code
):
    old = {path: digest for path, digest in tree(ready).items() if path.parent.name != "raw"}
    with monkeypatch.context() as patch:
        fail_on(patch, owner, name, code, nth, only=".part" if name == "to_csv" else "")
        message = refused(prepare_data, **{**TINY, "size": "72x72", "seed": 1})
    assert ("no permission for" if code == RIGHTS else "the disk is full") in message
    assert str(ready / "phantom") in message
    new = tree(ready)  # the new phantoms may be there: they are whole before they are prepared
    assert {path: digest for path, digest in new.items() if path.parent.name != "raw"} == old
    assert len(new) == len(old) + 26
    assert common.load_prepared("phantom").films.shape == (24, 64, 64)


def test_a_write_that_fails_leaves_a_split_that_was_edited_by_hand_in_use(ready, monkeypatch):
    path = ready / "phantom" / "splits.csv"
    moved(common.read_table(path), seed=1).to_csv(path, index=False)
    old = common.load_prepared("phantom").splits
    with monkeypatch.context() as patch:
        fail_on(patch, np.lib.format, "write_array_header_1_0", FULL)
        assert "the disk is full" in refused(prepare_data, **TINY)
    assert common.load_prepared("phantom").splits.equals(old)


READERS = {  # what may not be read: the function and a part of the name
    "the data folder": (Path, "mkdir", "data"),
    "a folder of films": (os, "scandir", "scans"),
    "the labels": (Path, "read_bytes", "mine.csv"),
    "a film": (Image, "open", "003.png"),
}


@pytest.mark.parametrize("owner, name, place", READERS.values(), ids=READERS)
def test_what_may_not_be_read_is_named(home, monkeypatch, owner, name, place):
    choice = own_films(home)
    fail_on(monkeypatch, owner, name, RIGHTS, only=place)
    message = refused(prepare_data, **choice)
    assert place in message and "ermission" in message


def test_an_info_file_or_archive_that_may_not_be_read_is_named(ready, home, monkeypatch):
    folder = ready / "phantom" / "raw"
    fail_on(monkeypatch, Path, "read_text", RIGHTS, only="Info.txt")
    assert "no permission for" in refused(prepare_data, **{**TINY, "images": str(folder)})
    (home / "a.tar").write_bytes(b"films")
    fail_on(monkeypatch, common.tarfile, "open", RIGHTS, only="a.tar")
    message = refused(prepare_data, archive=str(home / "a.tar"))
    assert "no permission for" in message and "a.tar" in message and "damaged" not in message


@pytest.mark.parametrize("source", ["auto", "mias", "own"])
def test_a_folder_without_films_is_named(home, source):
    choice = {**own_films(home), "images": str(home / "empty"), "source": source}
    choice["labels"] = choice["labels"] if source == "own" else ""
    (home / "empty").mkdir()
    (home / "empty" / "Info.txt").write_text("mdb001 G NORM")
    message = refused(prepare_data, **choice)
    assert str(home / "empty") in message and "no folder of films" in message


DAMAGE = [(name, length) for name in ("labels.csv", "splits.csv") for length in (0, None)]
DAMAGE += [(name, length) for name in ("films.npy", "prepared.json") for length in (0, 99, None)]


@pytest.mark.parametrize("name, length", DAMAGE)
def test_prepared_data_that_are_cut_or_gone_are_refused_and_made_again(ready, name, length):
    prepare_data(**TINY)  # films.csv names the films where they lie now
    old, path = tree(ready), ready / "phantom" / name
    path.unlink() if length is None else path.write_bytes(path.read_bytes()[:length])
    assert str(path.parent) in refused(common.load_prepared, "phantom")
    prepare_data(**TINY)
    new = tree(ready)
    assert {path: new[path] for path in old} == old


def test_films_that_changed_on_the_disk_are_made_again(ready):
    path = ready / "phantom" / "films.npy"
    old = path.read_bytes()
    path.write_bytes(old[:-64] + bytes(64 * [255]))
    prepare_data(**TINY)
    assert path.read_bytes() == old


def test_prepared_data_that_were_moved_are_not_replaced(ready):
    times = {path: path.stat().st_mtime_ns for path in tree(ready)}
    prepare_data(**TINY)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"films.csv", "prepared.json"}  # where the films lie, and when that was


# ---------------------------------------------------------------------- two at once, and kill -9

can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
CHOICES = [{**TINY, "seed": seed, "size": f"{64 + 8 * seed}x64"} for seed in (0, 1)]


def content(prepared):
    """Return a digest of the films and all tables, which do not belong together after a mix-up."""
    tables = [table.drop(columns="file", errors="ignore").to_csv() for table in prepared[3:7]]
    pixels = hashlib.sha256(prepared.films).hexdigest()
    return common.fingerprint(prepared.fingerprint, pixels, tables)


def whole_data(home, monkeypatch):
    """Return the content of each choice, prepared on its own."""
    prints = []
    for n, choice in enumerate(CHOICES):
        monkeypatch.setenv("BCD_DATA_DIR", str(home / f"alone-{n}"))
        prints.append(content(prepare_data(**choice)))
    monkeypatch.setenv("BCD_DATA_DIR", str(home / "data"))
    return prints


def prepare_often(choice, start, results, rounds):
    """Prepare again and again in a process of its own, and say what came of it."""
    start.wait()
    for _ in range(rounds):
        try:
            results.put(content(prepare_data(**choice)))
        except BaseException as error:  # a UserError or a bug, for the test to tell
            results.put(f"{type(error).__name__}: {error}")


def test_films_that_a_console_holds_mapped_are_not_half_replaced_on_windows(home, monkeypatch):
    before, replace = content(prepare_data(**CHOICES[0])), os.replace

    def refuse_mapped(source, target):
        if os.path.basename(source) == "films.npy" and ".new" not in str(source):
            raise PermissionError(errno.EACCES, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_mapped)
    with pytest.raises(common.UserError, match="no permission for .*films.npy"):
        prepare_data(**CHOICES[1])
    assert content(common.load_prepared("phantom")) == before


@can_fork
def test_two_processes_that_prepare_at_once_do_each_other_no_harm(home, monkeypatch):
    alone, rounds = whole_data(home, monkeypatch), 5
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(2), fork.Queue()
    workers = [
        fork.Process(target=prepare_often, args=(c, start, results, rounds)) for c in CHOICES
    ]
    for worker in workers:
        worker.start()
    said = [results.get(timeout=120) for _ in range(2 * rounds)]
    for worker in workers:
        worker.join()
    reasons = ("another process is writing to", " changed meanwhile; run 01_prepare_data.py again")
    refusals = [text for text in said if any(reason in text for reason in reasons)]
    assert set(said) <= {*alone, *refusals} and all("UserError" in text for text in refusals)
    assert set(said) & set(alone)
    for choice, whole in zip(CHOICES, alone):
        assert content(prepare_data(**choice)) == whole


def prepare_until_killed(choice, moment):
    """Prepare in a process of its own, which kills itself in the middle of the work."""
    calls = iter(range(999999))

    def deadly(function):
        def counted(*arguments, **keywords):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return counted

    for owner, name in [(os, "replace"), (os, "fsync"), (Image.Image, "save")]:
        setattr(owner, name, deadly(getattr(owner, name)))
    common.read_film = deadly(common.read_film)
    prepare_data(**choice)


@pytest.mark.parametrize("name", ["read_film", "table", "in_threads"])
def test_another_run_between_two_steps_of_this_one_makes_no_mixture(home, monkeypatch, name):
    alone, function, others = whole_data(home, monkeypatch), getattr(common, name), [CHOICES[1]]

    def then_another_run(*arguments, **keywords):
        done = function(*arguments, **keywords)
        with contextlib.suppress(UserError, IndexError):  # refused, or done before
            prepare_data(**others.pop())
        return done

    monkeypatch.setattr(common, name, then_another_run)
    with contextlib.suppress(UserError):  # a refusal does no harm
        assert content(prepare_data(**CHOICES[0])) == alone[0]
    assert content(common.load_prepared("phantom")) in alone
    assert content(prepare_data(**CHOICES[0])) == alone[0]


@can_fork
def test_a_kill_at_any_moment_leaves_whole_data_or_none_and_no_rubbish(home, monkeypatch):
    alone, found, killed = whole_data(home, monkeypatch), [], 0
    moments = [*range(0, 50, 8), *range(51, 68)]  # films drawn, then placed, then moves into place
    for n, moment in enumerate(random.Random(0).sample(moments, 12)):
        fork = multiprocessing.get_context("fork")
        worker = fork.Process(target=prepare_until_killed, args=(CHOICES[n % 2], moment))
        worker.start()
        worker.join()
        killed += worker.exitcode == -signal.SIGKILL  # some have whole phantoms and end earlier
        try:
            found.append(content(common.load_prepared("phantom")))
        except UserError as error:
            assert "prepared.json is not there" in str(error)
    assert killed >= 8 and set(found) <= set(alone)
    for choice, whole in zip(CHOICES, alone):
        assert content(prepare_data(**choice)) == whole
    names = {path.name for path in (home / "data" / "phantom").iterdir()}
    assert names == {*common.FILES, "raw"}
