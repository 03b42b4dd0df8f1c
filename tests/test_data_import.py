"""`fedsim data import`: tiny files become bundles that hold exactly what was in them."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import SHORT, Ended, assert_refused
from PIL import Image
from pyarrow import parquet

from fedsim.workloads.bundle import read_bundle
from fedsim.workloads.importing.found import Found
from fedsim.workloads.importing.splitting import split

pytestmark = pytest.mark.usefixtures("place")
PAGE = Path(__file__).parent.parent / "fedsim" / "workloads" / "README.md"
Fedsim = Callable[..., Ended]


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> np.ndarray:
    """Saves an image whose pixels count up from a value; returns them."""
    shape = (size[0], size[1], 3) if mode == "RGB" else size
    pixels = (np.arange(np.prod(shape)).reshape(shape) + value).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def photos(root: Path, owners: int = 4) -> dict[str, np.ndarray]:
    """Two classes, in each two images of every owner: cat/user0_0.png and so on."""
    made = {}
    for label in ("cat", "dog"):
        for owner in range(owners):
            for i in range(2):
                name = f"{label}/user{owner}_{i}.png"
                made[name] = picture(root / name, 40 * owner + 20 * i + 7 * (label == "dog"))
    return made


def sensor(path: Path, rows: int = 12, users: int = 4) -> np.ndarray:
    """For every user, rows of sitting and then of walking; returns the two features."""
    values, lines = [], ["ax,person,activity,ay"]
    for user in range(users):
        for i in range(2 * rows):
            values.append((100 * user + i, i / 4))
            lines.append(f"{values[-1][0]},{user},{'sit' if i < rows else 'walk'},{values[-1][1]}")
    path.write_text("\n".join(lines) + "\n")
    return np.array(values, np.float32)


def words(root: Path, rate: int = 16000, seconds: float = 1.0) -> dict[str, np.ndarray]:
    """Two words by three speakers, twice each: yes/s0/0.wav and so on."""
    made = {}
    for w, word in enumerate(("no", "yes")):
        for speaker in range(3):
            for i in range(2):
                name = f"{word}/s{speaker}/{i}.wav"
                made[name] = (np.arange(int(rate * seconds)) % 300 * (1 + w) + 10 * speaker + i).astype(np.int16)
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(root / name, made[name], rate, subtype="PCM_16")
    return made


def png(value: int) -> bytes:
    held = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(held, "PNG")
    return held.getvalue()


def table(values: list[int], names: tuple[str, ...] = ("no", "yes")) -> pa.Table:
    """Gray images of one value each, as Hugging Face stores them; labels take turns."""
    rows = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    columns = {"image": rows, "label": [i % len(names) for i in range(len(rows))], "who": [f"u{v % 3}" for v in values]}
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved_to_disk(folder: Path, made: pa.Table) -> None:
    """Writes a table as `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", made.schema) as stream:
        stream.write_table(made)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def idx(path: Path, array: np.ndarray) -> None:
    """Writes an array as MNIST's files hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def fashion(root: Path) -> np.ndarray:
    raw, x = (
        root / "FashionMNIST" / "raw",
        np.arange(40 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(40, 28, 28),
    )
    for part, rows in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        idx(raw / f"{part}-images-idx3-ubyte", x[rows])
        idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(40, dtype=np.uint8) % 10)[rows])
    return x


def imported(fedsim: Fedsim, *arguments: str) -> Ended:
    ended = fedsim("data", "import", *arguments)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended


def printed(ended: Ended, what: str) -> list[str]:
    """The words of a command that was printed, without `fedsim`."""
    (line,) = re.findall(rf"^{what} +fedsim (.*)$", ended.out, re.MULTILINE)
    return shlex.split(line)


# --- the examples of the page ----------------------------------------------------------------------------------------

EXAMPLES = {
    "images": lambda: photos(Path("photos")),
    "csv": lambda: sensor(Path("walks.csv"), rows=120),
    "audio": lambda: words(Path("words")),
    "hf": lambda: saved_to_disk(Path("digits/train"), table(list(range(24)))),
    "torchvision": lambda: fashion(Path("downloads")),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_pages_example_runs_and_so_do_the_commands_that_it_prints(kind: str, fedsim: Fedsim):
    EXAMPLES[kind]()
    (command,) = re.findall(rf"^fedsim (data import {kind} .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    ended = fedsim(*shlex.split(command))
    assert (ended.code, ended.err) == (0, "")
    look, run = printed(ended, "look"), printed(ended, "run")
    assert fedsim(*look).code == 0
    cohort = [] if any(word.startswith("cohort=") for word in run) else ["cohort=2"]
    ran = fedsim(*run, *cohort, *[word for word in SHORT if not word.startswith("cohort")], "out=ran")
    assert ran.code == 0, ran.err
    assert (Path("ran") / "summary.json").is_file()


# --- what a bundle holds ---------------------------------------------------------------------------------------------


def test_images_come_back_exactly_and_owners_become_clients(fedsim: Fedsim):
    """Four owners of four images each; a quarter of them is one owner, whole."""
    made = photos(Path("photos"))
    owner = ("--owner", r"user(\d+)_", "--test-fraction", "0.25")
    ended = imported(fedsim, "images", "photos", "own/photos", *owner)
    data = read_bundle(Path("own/photos"))
    assert (data.classes, data.kind) == (["cat", "dog"], "image")
    assert data.train.owners is not None
    assert data.test.owners is not None
    assert len(set(data.test.owners)) == 1
    assert not set(data.test.owners) & set(data.train.owners)
    for part in (data.train, data.test):
        assert part.owners is not None
        for x, y, who in zip(part.x, part.y, part.owners, strict=True):
            own = [f"{data.classes[y]}/user{who}_{i}.png" for i in range(2)]
            assert any(np.array_equal(x, made[name]) for name in own)
    assert "clients    3 in the training part, 1 in the test part, 0 in both" in ended.out
    described = fedsim(*printed(ended, "look")).out
    assert re.search(r"^clients +3$", described, re.MULTILINE)


def test_train_and_test_folders_stay_apart(fedsim: Fedsim):
    for part, value in (("train", 0), ("test", 50), ("val", 99)):
        for label in ("a", "b"):
            picture(Path("set") / part / label / "1.png", value, mode="L")
    ended = imported(fedsim, "images", "set", "bundle")
    data = read_bundle(Path("bundle"))
    assert data.train.x.shape == (2, 8, 8)
    assert (data.train.x[0, 0, 0], data.test.x[0, 0, 0]) == (0, 50)
    assert "left out, beside train/ and test/: val" in ended.out
    assert "as the files have it" in ended.out


def test_images_are_brought_to_a_size_upright_and_gray(fedsim: Fedsim):
    """A camera's image that lies on its side (orientation 6) is turned: 4 high and 8 wide becomes 8 high and 4 wide."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255  # the left half, which comes to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in ("a", "b"):
        Path("set", label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels).save(Path("set", label, f"{i}.png"), exif=exif)
    imported(fedsim, "images", "set", "plain")
    x = read_bundle(Path("plain")).train.x
    assert x.shape == (2, 8, 4, 3)
    assert x[0, :4].min() == 255
    assert x[0, 4:].max() == 0
    ended = imported(fedsim, "images", "set", "small", "--size", "2,1", "--gray")
    assert read_bundle(Path("small")).train.x.shape == (2, 2, 1)
    assert "4 pictures were brought to" in ended.out


def test_rows_of_a_csv_come_back_exactly(fedsim: Fedsim):
    values = sensor(Path("walks.csv"))
    imported(fedsim, "csv", "walks.csv", "own/walks", "--label", "activity", "--user", "person")
    data = read_bundle(Path("own/walks"))
    assert (data.classes, data.kind) == (["sit", "walk"], "tabular")
    for part in (data.train, data.test):
        assert part.owners is not None
        rows = part.owners * 24 + part.x[:, 0].astype(int) % 100
        assert np.array_equal(part.x, values[rows])
        assert np.array_equal(part.y, rows % 24 >= 12)


def test_windows_of_a_csv_span_no_two_labels_or_users(fedsim: Fedsim):
    """Of 12 rows of one label and user: windows of 5, one every 3, start at 0, 3 and 6; the row 11 is in none."""
    sensor(Path("walks.csv"))
    window = ("--window", "5", "--step", "3", "--features", "ax", "--kind", "image")
    ended = imported(fedsim, "csv", "walks.csv", "own/w", "--label", "activity", "--user", "person", *window)
    data = read_bundle(Path("own/w"))
    x, y = np.concatenate([data.train.x, data.test.x]), np.concatenate([data.train.y, data.test.y])
    assert x.shape == (4 * 2 * 3, 5, 1)
    assert {(int(first) % 100, int(label)) for first, label in zip(x[:, 0, 0], y, strict=True)} == {
        *((s, 0) for s in (0, 3, 6)),
        *((12 + s, 1) for s in (0, 3, 6)),
    }
    assert np.array_equal(np.diff(x[:, :, 0]), np.ones((24, 4)))
    assert "left out: 8 rows that fill no window" in ended.out


def test_windows_without_users_share_no_row_between_the_parts(fedsim: Fedsim):
    """Two stretches of 48 rows: windows start at 0, 2 ... 44; of 23, the last 5 test and the one before is left out."""
    Path("one.csv").write_text("v,y\n" + "".join(f"{i},{'ab'[i // 48]}\n" for i in range(96)))
    ended = imported(fedsim, "csv", "one.csv", "own/one", "--label", "y", "--window", "4", "--step", "2")
    data = read_bundle(Path("own/one"))
    assert (len(data.train.x), len(data.test.x)) == (2 * 17, 2 * 5)
    assert not set(data.train.x.ravel()) & set(data.test.x.ravel())
    assert "2 windows that overlap it are left out" in ended.out


def test_sounds_come_back_exactly_and_speakers_become_clients(fedsim: Fedsim):
    made = words(Path("words"), rate=8000, seconds=0.5)
    ended = imported(fedsim, "audio", "words", "own/words", "--speaker", "parent", "--test-fraction", "0.3")
    data, meta = read_bundle(Path("own/words")), json.loads(Path("own/words/meta.json").read_text())
    assert (data.kind, meta["sample_rate_hz"], meta["name"]) == ("audio", 8000, "words")
    for part in (data.train, data.test):
        assert part.owners is not None
        for x, y, who in zip(part.x, part.y, part.owners, strict=True):
            assert any(np.array_equal(x, made[f"{data.classes[y]}/{who}/{i}.wav"]) for i in range(2))
    assert "workload.features.sample_rate_hz=8000" in printed(ended, "run")


def test_sounds_are_resampled_cut_filled_and_mixed(fedsim: Fedsim):
    """A constant stays one when the rate doubles (but at its ends); two channels of 1/4 and 3/4 are 1/2."""
    for label, seconds in (("a", 0.5), ("b", 1.5)):
        Path("set", label).mkdir(parents=True)
        sound = np.tile(np.float32([0.25, 0.75]), (int(8000 * seconds), 1))
        for i in range(2):
            soundfile.write(Path("set", label, f"{i}.wav"), sound, 8000, subtype="FLOAT")
    ended = imported(fedsim, "audio", "set", "own", "--rate", "16000", "--seconds", "1")
    data = read_bundle(Path("own"))
    short, long = (data.train.x[data.train.y == label][0] for label in (0, 1))
    assert short.shape == long.shape == (16000,)
    assert abs(int(short[4000]) - 2**14) < 50
    assert abs(int(long[15000]) - 2**14) < 50
    assert not short[8000:].any()
    for note in (
        "4 sounds had several channels",
        "4 sounds were resampled",
        "2 sounds were longer",
        "2 sounds were sh",
    ):
        assert note in ended.out


def test_hugging_face_tables_come_back_exactly(fedsim: Fedsim):
    """Both forms: train/ and test/ of save_to_disk, and Parquet files named after their parts."""
    saved_to_disk(Path("saved/train"), table([1, 2, 3, 4]))
    saved_to_disk(Path("saved/test"), table([5, 6]))
    Path("files/data").mkdir(parents=True)
    for name, values in (("train-0", [1, 2]), ("train-1", [3, 4]), ("test-0", [5, 6]), ("validation-0", [7, 8])):
        parquet.write_table(table(values), f"files/data/{name}.parquet")
    for source in ("saved", "files"):
        imported(fedsim, "hf", source, f"own/{source}", "--user", "who")
        data = read_bundle(Path("own", source))
        assert data.train.x[:, 0, 0].tolist() == [1, 2, 3, 4]
        assert data.test.x[:, 0, 0].tolist() == [5, 6]
        assert data.train.y.tolist() == [0, 1, 0, 1]
        assert data.train.owners is not None
        assert data.train.owners.tolist() == ["u1", "u2", "u0", "u1"]
        assert data.classes == ["no", "yes"]


def test_hugging_face_sounds_and_lists_of_numbers(fedsim: Fedsim):
    words(Path("words"))
    sounds = [
        {"bytes": Path(f"words/{w}/s0/{i}.wav").read_bytes(), "path": None} for w in ("no", "yes") for i in (0, 1)
    ]
    parquet.write_table(pa.table({"audio": sounds, "label": ["n", "n", "y", "y"]}), "sounds.parquet")
    imported(fedsim, "hf", "sounds.parquet", "own/sounds")
    data = read_bundle(Path("own/sounds"))
    assert (data.kind, data.train.x.dtype, data.train.x.shape) == ("audio", np.int16, (2, 16000))
    rows = pa.table({"features": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], "label": [10, 10, 9, 9]})
    parquet.write_table(rows, "rows.parquet")
    imported(fedsim, "hf", "rows.parquet", "own/rows")
    data = read_bundle(Path("own/rows"))
    assert data.classes == ["9", "10"]
    assert sorted([*data.train.x[:, 0], *data.test.x[:, 0]]) == [1, 3, 5, 7]


def test_torchvision_sets_come_back_exactly(fedsim: Fedsim):
    x = fashion(Path("downloads"))
    imported(fedsim, "torchvision", "FashionMNIST", "own/f", "--root", "downloads")
    data = read_bundle(Path("own/f"))
    assert np.array_equal(data.train.x, x[:30])
    assert np.array_equal(data.test.x, x[30:])
    assert data.train.y.tolist() == [i % 10 for i in range(30)]
    assert data.classes[0] == "T-shirt/top"


def test_equal_input_and_seed_give_equal_bytes(fedsim: Fedsim):
    photos(Path("photos"))
    for out, seed in (("a/x", "1"), ("b/x", "1"), ("c/x", "2")):
        imported(fedsim, "images", "photos", out, "--owner", r"user\d", "--seed", seed)
    first, again, other = (
        [Path(o, "x", f).read_bytes() for f in ("train.npz", "test.npz", "meta.json")] for o in "abc"
    )
    assert first == again
    assert first != other


# --- the split -------------------------------------------------------------------------------------------------------


def found(y: list[int], owners: list[str] | None = None) -> Found:
    x = np.zeros((len(y), 1), np.float32)
    return Found(x, np.array(y), ["a", "b"], "tabular", None if owners is None else np.array(owners))


def test_every_class_gives_its_share():
    """A fifth of 10 and of 5, and of the only example of a class nothing."""
    parts = split(found([0] * 10 + [1] * 5 + [2]), 0.2, 0)
    assert np.bincount(np.array([0] * 10 + [1] * 5 + [2])[parts.test]).tolist() == [2, 1]
    assert sorted([*parts.train, *parts.test]) == list(range(16))


def test_no_class_loses_its_last_owner():
    """Only z has class 1: it is never held out."""
    owners = ["w", "w", "x", "x", "y", "y", "z", "z"]
    for seed in range(10):
        parts = split(found([0, 0, 0, 0, 0, 0, 1, 1], owners), 0.25, seed)
        assert len(set(np.array(owners)[parts.test])) == 1
        assert not {6, 7} & set(parts.test.tolist())


def test_a_single_owner_is_in_both_parts():
    parts = split(found([0, 0, 1, 1], ["me"] * 4), 0.5, 0)
    assert (len(parts.train), len(parts.test)) == (2, 2)
    assert "clients are in both parts" in parts.how


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(place: Path) -> Path:
    """A folder for files, away from the working folder, in which nothing may be left."""
    (place / "source").mkdir()
    return place / "source"


def refused(fedsim: Fedsim, kind: str, source: Path, *rest: str, words: tuple[str, ...]) -> None:
    assert_refused(fedsim("data", "import", kind, str(source), "out", *rest), *words)


IMAGE_FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = {
    "no folders": (lambda s: (s / "a.png").write_bytes(png(1)), (), ("has no folders", "1 files")),
    "an empty class": (lambda s: (s / "bird").mkdir(), (), ("bird has no files",)),
    "a text": (lambda s: (s / "cat" / "note.txt").write_text("hello"), (), ("note.txt is no image",)),
    "an empty file": (lambda s: (s / "cat" / "e.png").write_bytes(b""), (), ("e.png is no image",)),
    "cut short": (lambda s: (s / "cat" / "c.png").write_bytes(png(1)[:-30]), (), ("c.png cannot be read as an image",)),
    "postscript": (
        lambda s: (s / "cat" / "p.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        (),
        ("p.eps is no image",),
    ),
    "another size": (lambda s: picture(s / "dog" / "z.png", 0, (5, 9)), (), ("z.png is 5x9", "--size 8,8")),
    "16 bits": (
        lambda s: Image.fromarray(np.zeros((8, 8), np.uint16)).save(s / "cat" / "b.png"),
        (),
        ("b.png has mode I;16",),
    ),
    "a pipe": (lambda s: os.mkfifo(s / "cat" / "pipe.png"), (), ("pipe.png is a pipe",)),
    "a broken link": (
        lambda s: (s / "cat" / "l.png").symlink_to("nowhere"),
        (),
        ("l.png cannot be read: No such file",),
    ),
    "a link in a ring": (lambda s: (s / "cat" / "ring").symlink_to(s / "cat"), (), ("may lead back",)),
    "no owner": (lambda s: None, ("--owner", "user([5-9])"), ("user0_0.png has no name that --owner",)),
    "no parent": (lambda s: None, ("--owner", "parent"), ("lies in its class folder",)),
    "parts or classes": (lambda s: picture(s / "train" / "ann" / "1.png", 0), (), ("may hold classes or parts",)),
    "a bad expression": (lambda s: None, ("--owner", "user("), ("--owner must be 'parent' or a regular expression",)),
    "a bad size": (lambda s: None, ("--size", "32"), ("--size must be HEIGHT,WIDTH",)),
    "a bad fraction": (lambda s: None, ("--test-fraction", "1"), ("--test-fraction must be above 0 and below 1",)),
}


@pytest.mark.parametrize("case", IMAGE_FAULTS)
def test_faults_of_images_are_one_sentence_and_leave_nothing(case: str, source: Path, fedsim: Fedsim):
    make, options, sentence = IMAGE_FAULTS[case]
    if case != "no folders":
        photos(source)
    make(source)
    refused(fedsim, "images", source, *options, words=sentence)


CSV_FAULTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "a missing value": ("x,y\n1,a\n,b\n", (), ("no value in row 2, column 'x'",)),
    "a text": ("x,y\n1,a\ntwo,b\n", (), ("holds 'two' in row 2, column 'x'",)),
    "true and false": ("x,y\nTrue,a\nFalse,b\n", (), ("holds 'True' in row 1, column 'x'",)),
    "infinite": (
        "x,y\n1,a\n1e300,b\n",
        (),
        ("holds '1e+300' in row 2, column 'x'", "too large for float32 (at most 3.4e+38)"),
    ),
    "no number": ("x,y\n1,a\ninf,b\n", (), ("holds 'inf' in row 2, column 'x'", "must be numbers")),
    "no label": ("x,y\n1,a\n2,\n", (), ("no value in row 2, column 'y'",)),
    "a row too short": ("x,y\n1,a\n2\n", (), ("no value in row 2, column 'y'",)),
    "no such column": ("x,label\n1,a\n", (), ("'y'", "allowed: label, x")),
    "semicolons": ("x;y\n1;a\n", (), ("--separator ';'",)),
    "a row too long": ("x,y\n1,a\n2,b,c\n", (), ("cannot be read as CSV", "line 3, saw 3")),
    "rows too long": ("x,y\n1,a,\n2,b,\n", (), ("cannot be read as CSV", "line 2, saw 3")),
    "no heading": (",x,y\n0,1,a\n1,2,b\n", (), ("no heading for column 1", "--features")),
    "a heading twice": ("x,x,y\n0,1,a\n1,2,b\n", (), ("the heading 'x' more than once",)),
    "no rows": ("x,y\n", (), ("has no rows",)),
    "nothing": ("", (), ("cannot be read as CSV",)),
    "bytes": ("x,y\n\udcff,a\n", (), ("cannot be read as CSV",)),
    "one class twice": ("x,y\n1,a\n", ("--features", "y"), ("must name different columns",)),
    "one example": ("x,y\n1,a\n", (), ("1 examples are too few",)),
    "too long a window": ("x,y\n1,a\n2,b\n", ("--window", "2"), ("no 2 consecutive rows",)),
    "a step alone": ("x,y\n1,a\n2,b\n", ("--step", "2"), ("give --window too",)),
}


@pytest.mark.parametrize("case", CSV_FAULTS)
def test_faults_of_a_csv_are_one_sentence_and_leave_nothing(case: str, source: Path, fedsim: Fedsim):
    text, options, sentence = CSV_FAULTS[case]
    file = source / "data.csv"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(fedsim, "csv", file, "--label", "y", *options, words=sentence)


def test_faults_of_sounds_are_one_sentence_and_leave_nothing(source: Path, fedsim: Fedsim):
    words(source)
    odd = source / "yes" / "s9.wav"
    soundfile.write(odd, np.zeros(8000, np.int16), 8000)
    refused(fedsim, "audio", source, words=("s9.wav has 8000 samples a second", "--rate 16000"))
    soundfile.write(odd, np.zeros(8000, np.int16), 16000)
    refused(fedsim, "audio", source, words=("s9.wav has 8000 samples and", "--seconds 1"))
    odd.write_bytes(b"RIFF nothing")
    refused(fedsim, "audio", source, words=("s9.wav cannot be read as sound",))
    soundfile.write(odd, np.zeros(0, np.int16), 16000)
    refused(fedsim, "audio", source, words=("s9.wav holds no sound",))


def test_faults_of_tables_are_one_sentence_and_leave_nothing(source: Path, fedsim: Fedsim):
    refused(fedsim, "hf", source / "none", words=("there is no",))
    refused(fedsim, "hf", source, words=("has no training part",))
    file = source / "t.parquet"
    file.write_bytes(b"PAR1 and no more")
    refused(fedsim, "hf", file, words=("t.parquet is not a readable Parquet file",))
    parquet.write_table(table([1, 2]), file)
    refused(fedsim, "hf", file, "--label", "lable", words=("did you mean 'label'",))
    parquet.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), file)
    refused(fedsim, "hf", file, words=("name the one to learn from: --input",))
    refused(fedsim, "hf", file, "--input", "text", words=("row 1, column 'text'", "must be an image"))
    parquet.write_table(pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [0]}), file)
    refused(fedsim, "hf", file, words=("the path of a file, not its bytes",))
    (source / "state.json").write_text('{"_data_files": [{"filename": "../t.parquet"}]}')
    refused(fedsim, "hf", source, words=("state.json does not list",))


def test_faults_of_torchvision_are_one_sentence_and_leave_nothing(source: Path, fedsim: Fedsim):
    root = ("--root", str(source))
    assert_refused(fedsim("data", "import", "torchvision", "MNISTT", "out", *root), "did you mean 'MNIST'?")
    assert_refused(fedsim("data", "import", "torchvision", "KMNIST", "out", *root), "--download")
    assert_refused(fedsim("data", "import", "torchvision", "EMNIST", "out", *root), "'split'", "--set KEY=VALUE")


def test_a_place_that_is_taken_is_refused_and_stays(source: Path, place: Path, fedsim: Fedsim):
    photos(source)
    (place / "taken").mkdir()
    (place / "taken" / "mine.txt").write_text("mine")
    assert_refused(fedsim("data", "import", "images", str(source), str(place / "taken")), "not empty")
    assert_refused(fedsim("data", "import", "images", str(source), str(place / "taken/mine.txt")), "is no folder")
    assert_refused(fedsim("data", "import", "images", str(source), str(source / "out")), "which is read")
    assert [path.name for path in (place / "taken").iterdir()] == ["mine.txt"]


def test_a_failed_write_leaves_nothing(source: Path, fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch):
    photos(source)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    ended = fedsim("data", "import", "images", str(source), "new/out")
    assert ended.code == 1
    assert "No space left on device" in ended.err
    assert list(Path().iterdir()) == []
