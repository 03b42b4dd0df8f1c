"""`fedsim data import`: a bundle out of files of your own."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli.options import MAX_COUNT, check_folder_place

if TYPE_CHECKING:
    from fedsim.workloads.importing.found import Found, Track
    from fedsim.workloads.importing.writing import Bundled

MOST_SHOWN = 10  # names of classes
MOST_CLIENTS = 100  # in the command that is printed
DEFAULT_COHORT = 10  # see configs/run.yaml
KWS_RATE = 16000  # see configs/workload/kws.yaml

app = typer.Typer(no_args_is_help=True, help="Make a bundle of your own files: train.npz, test.npz and meta.json.")

Out = Annotated[Path, typer.Argument(help="Folder of the bundle; must not be there, or be empty.")]
Fraction = Annotated[
    float, typer.Option(help="Share of the examples to test on, where the files have no test part.", min=0, max=1)
]
Seed = Annotated[int, typer.Option(help="Of the draw of the test part.", min=0, max=10**9)]
Gray = Annotated[bool | None, typer.Option("--gray/--colour", help="One channel or three; as the images are.")]
SizeOption = Annotated[str | None, typer.Option("--size", help="HEIGHT,WIDTH that all images are brought to.")]
Rate = Annotated[int | None, typer.Option(help="Samples a second that all sounds are resampled to.", min=1, max=10**7)]
Seconds = Annotated[
    float | None, typer.Option(help="Length that all sounds are cut to, or filled to with silence.", min=0, max=10**6)
]


@app.command("images")
def images(
    folder: Annotated[Path, typer.Argument(help="Holds a folder per class, or train/ and perhaps test/ that do.")],
    out: Out,
    size: SizeOption = None,
    gray: Gray = None,
    owner: Annotated[
        str | None,
        typer.Option(help="Client of an image: 'parent' (its folder, below the class's) or a regular expression."),
    ] = None,
    test_fraction: Fraction = 0.2,
    seed: Seed = 0,
) -> None:
    """Import images in one folder per class, in any format that Pillow reads.

    Example: fedsim data import images photos data/photos --size 32,32 --owner 'user(\\d+)_'
    """
    from fedsim.workloads.importing.images import import_images

    pixels = _size(size)
    _import(out, folder, test_fraction, seed, lambda track: import_images(folder, pixels, gray, owner, track))


@app.command("csv")
def csv(
    file: Annotated[Path, typer.Argument(help="With a heading for each column.")],
    out: Out,
    label: Annotated[str, typer.Option(help="Column of the class.")],
    user: Annotated[str | None, typer.Option(help="Column of who made a row: the clients.")] = None,
    features: Annotated[str | None, typer.Option(help="Columns of numbers, with commas; all others.")] = None,
    window: Annotated[int | None, typer.Option(help="Rows that make one example.", min=1, max=MAX_COUNT)] = None,
    step: Annotated[
        int | None, typer.Option(help="Rows from a window to the next; --window.", min=1, max=MAX_COUNT)
    ] = None,
    kind: Annotated[str, typer.Option(help="tabular, or image: windows stay [rows, features].")] = "tabular",
    separator: Annotated[str, typer.Option(help="Between the cells.")] = ",",
    test_fraction: Fraction = 0.2,
    seed: Seed = 0,
) -> None:
    """Import rows of numbers, or windows of consecutive rows, as of a sensor.

    The numbers stay as they are; workload.input_range=standard brings them to mean 0 and deviation 1.

    Example: fedsim data import csv walks.csv data/walks --label activity --user person --window 50 --step 25
    """
    from devices.errors import unknown
    from fedsim.errors import ConfigError
    from fedsim.workloads.importing.csv_file import import_csv

    if kind not in ("tabular", "image"):
        raise ConfigError(unknown("--kind", kind, ("tabular", "image")))
    columns = None if features is None else [name.strip() for name in features.split(",")]
    _import(
        out,
        file,
        test_fraction,
        seed,
        lambda _: import_csv(file, label, user, columns, window, step, kind, separator),  # type: ignore[arg-type]
    )


@app.command("audio")
def audio(
    folder: Annotated[Path, typer.Argument(help="Holds a folder per class, or train/ and perhaps test/ that do.")],
    out: Out,
    rate: Rate = None,
    seconds: Seconds = None,
    speaker: Annotated[
        str | None,
        typer.Option(help="Client of a sound: 'parent' (its folder, below the class's) or a regular expression."),
    ] = None,
    test_fraction: Fraction = 0.2,
    seed: Seed = 0,
) -> None:
    """Import sounds in one folder per class: WAV and whatever else soundfile reads.

    Example: fedsim data import audio words data/words --rate 16000 --seconds 1 --speaker '([0-9a-f]+)_nohash'
    """
    from fedsim.workloads.importing.audio import import_audio

    _import(out, folder, test_fraction, seed, lambda track: import_audio(folder, rate, seconds, speaker, track))


@app.command("hf")
def hf(
    path: Annotated[
        Path, typer.Argument(help="Folder of datasets' save_to_disk, or of Parquet files, or one of these.")
    ],
    out: Out,
    label: Annotated[str, typer.Option(help="Column of the class.")] = "label",
    column: Annotated[str | None, typer.Option("--input", help="Column of images, sounds or lists of numbers.")] = None,
    user: Annotated[str | None, typer.Option(help="Column of who made an example: the clients.")] = None,
    size: SizeOption = None,
    gray: Gray = None,
    rate: Rate = None,
    seconds: Seconds = None,
    test_fraction: Fraction = 0.2,
    seed: Seed = 0,
) -> None:
    """Import a Hugging Face data set from this disk; nothing is fetched, and `datasets` is not needed.

    Example: fedsim data import hf beans data/beans --label labels --size 64,64
    """
    from fedsim.workloads.importing.hugging_face import import_hugging_face
    from fedsim.workloads.importing.pictures import Pictures
    from fedsim.workloads.importing.sounds import Sounds

    pictures, sounds = Pictures(_size(size), gray), Sounds(rate, seconds)
    _import(
        out,
        path,
        test_fraction,
        seed,
        lambda track: import_hugging_face(path, label, column, user, pictures, sounds, track),
    )


@app.command("torchvision")
def torchvision(
    name: Annotated[str, typer.Argument(help="A class of torchvision.datasets, e.g. FashionMNIST.")],
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder with its files; $FEDSIM_DATA, else ./data.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch the files.")] = False,
    size: SizeOption = None,
    gray: Gray = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for the class, e.g. split=letters.")
    ] = None,
    test_fraction: Fraction = 0.2,
    seed: Seed = 0,
) -> None:
    """Import a data set of torchvision that has one class per image.

    Example: fedsim data import torchvision FashionMNIST data/fashion --root downloads --download
    """
    from fedsim.errors import ConfigError
    from fedsim.workloads.importing.torchvision_set import import_torchvision

    pixels, given = _size(size), dict(option.partition("=")[::2] for option in options or ())
    if not all(given.values()):
        raise ConfigError(f"--set must be KEY=VALUE, got {' '.join(options or ())}")
    _import(
        out,
        root,
        test_fraction,
        seed,
        lambda track: import_torchvision(name, root, download, pixels, gray, given, track),
    )


def _size(text: str | None) -> tuple[int, int] | None:
    """Reads HEIGHT,WIDTH.

    Raises:
        ConfigError: if it is not two whole numbers.
    """
    from fedsim.cli.options import parse_whole
    from fedsim.errors import ConfigError

    if text is None:
        return None
    sides = [parse_whole("--size", side) for side in text.split(",")]
    if len(sides) != 2:
        raise ConfigError(f"--size must be HEIGHT,WIDTH, e.g. 32,32, got {text!r}")
    return sides[0], sides[1]


def _import(out: Path, source: Path | None, fraction: float, seed: int, read: Callable[[Track], Found]) -> None:
    """Reads, writes and tells what was found."""
    from fedsim.report.terminal import console
    from fedsim.workloads.importing.splitting import check_fraction
    from fedsim.workloads.importing.writing import check_out, write_bundle

    check_fraction(fraction)
    check_out(out, source)
    check_folder_place("OUT", out)
    with _bar() as track:
        found = read(track)
    bundled = write_bundle(found, out, fraction, seed)
    for line in told(bundled):
        console().say(line)


@contextmanager
def _bar() -> Iterator[Track]:
    """Draws a bar over what is read."""
    from fedsim.report.terminal import console, work_bar

    with work_bar(console()) as bar:
        yield lambda rows, what: bar.track(rows, description=what)


def told(bundled: Bundled) -> list[str]:
    """Returns what is in a bundle, and the commands that use it, as lines of text."""
    from devices.units import size

    train, test = bundled.data.train, bundled.data.test
    classes = list(bundled.data.classes)
    more = f", and {len(classes) - MOST_SHOWN} more" if len(classes) > MOST_SHOWN else ""
    lines = [
        f"examples   {len(train.x)} to train on, {len(test.x)} to test on",
        f"classes    {len(classes)}: {', '.join(classes[:MOST_SHOWN])}{more}",
    ]
    if train.owners is not None and test.owners is not None:
        ours, theirs = set(train.owners.tolist()), set(test.owners.tolist())
        lines.append(
            f"clients    {len(ours)} in the training part, {len(theirs)} in the test part, {len(ours & theirs)} in both"
        )
    else:
        lines.append("clients    the files do not say; a partition makes them")
    lines.append(f"x          {train.x.dtype} {list(train.x.shape[1:])}, {bundled.data.kind}")
    lines += [f"note       {note}" for note in bundled.notes]
    lines.append(f"bundle     {bundled.folder} ({size(bundled.bytes)})")
    return [*lines, *(f"{what:<10} {command}" for what, command in commands(bundled).items())]


def commands(bundled: Bundled) -> dict[str, str]:
    """Returns the commands that look at a bundle and learn from it."""
    from fedsim.settings.hydra_text import quoted

    data, rate = bundled.data, bundled.meta.get("sample_rate_hz")
    bare = len(bundled.folder.parts) == 1  # which would be looked up in the data roots first
    path = str(bundled.folder.absolute() if bare else bundled.folder)
    settings = [f"workload={'kws' if rate else 'bundle'}", f"workload.path={quoted(path)}"]
    if rate and rate != KWS_RATE:
        settings.append(f"workload.features.sample_rate_hz={rate}")
    owners = None if data.train.owners is None else len(set(data.train.owners.tolist()))
    settings.append(f"partition={'iid' if owners is None else 'natural'}")
    clients = owners or min(MOST_CLIENTS, max(1, len(data.train.x) // 2))
    if owners is None and clients < MOST_CLIENTS:
        settings.append(f"num_clients={clients}")
    look = shlex.join(["fedsim", "data", "describe", *settings])
    cohort = [f"cohort={clients}"] if clients < DEFAULT_COHORT else []
    return {"look": look, "run": shlex.join(["fedsim", "run", *settings, *cohort])}
