"""Turns pictures into arrays, whoever has drawn them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from devices.errors import UserError, one_line
from fedsim.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

GRAY = ("1", "L", "LA")
COLOURS = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
RUNS_OTHERS = ("EPS",)  # formats for which Pillow starts another program
MOST_PIXELS = 100_000_000  # of a picture, far above what Pillow itself warns of
Size = tuple[int, int]  # height and width


class Pictures:
    """Makes arrays of one shape out of pictures.

    Args:
        size: height and width that all are brought to; None: the first one's, and others are refused.
        gray: one channel instead of red, green and blue; None: as the first one, and colour after gray is refused.

    Raises:
        ConfigError: if the size is none.
    """

    def __init__(self, size: Size | None, gray: bool | None):
        if size is not None and not all(1 <= side <= 10_000 for side in size):
            raise ConfigError(f"--size must be height,width from 1 to 10000, got {size[0]},{size[1]}")
        self.size, self.gray, self.resized, self._first = size, gray, 0, ""
        self._told_gray = gray is not None

    def array(self, image: Image, name: str) -> np.ndarray:
        """Returns uint8 [height, width] or [height, width, 3], upright as the camera meant it.

        Raises:
            DataError: naming the picture, if it is broken, has more than 8 bits a channel, or another size.
        """
        from PIL import Image, ImageOps

        with naming_image(name):
            image = ImageOps.exif_transpose(image)
            if image.mode not in (*GRAY, *COLOURS):
                raise DataError(
                    f"{name} has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits a channel first"
                )
            if self.gray is None:
                self.gray = image.mode in GRAY
            if self.gray and not self._told_gray and image.mode not in GRAY:
                raise DataError(f"{name} has colours, and those before it have none; choose with --gray or --colour")
            if image.mode in ("P", "PA"):
                image = image.convert("RGBA")  # its palette may have transparency of its own
            image = image.convert("L" if self.gray else "RGB")
            shape = (image.height, image.width)
            if self.size is None:
                self.size, self._first = shape, name
            if shape != self.size:
                if self._first:
                    raise DataError(
                        f"{name} is {shape[0]}x{shape[1]} pixels and {self._first} {self.size[0]}x{self.size[1]}; "
                        f"bring all to one size, e.g. with --size {self.size[0]},{self.size[1]}"
                    )
                self.resized += 1
                image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image, np.uint8)

    def notes(self) -> list[str]:
        """Says how many pictures were brought to another size."""
        return [f"{self.resized} pictures were brought to {self.size}, whatever their shape"] if self.resized else []


@contextmanager
def open_image(file: IO[bytes], name: str) -> Iterator[Image]:
    """Opens a picture without reading its pixels.

    Raises:
        DataError: naming it, if Pillow knows no such format or it is too large.
    """
    from PIL import Image

    Image.init()
    with naming_image(name):
        image = Image.open(file, formats=[known for known in Image.ID if known not in RUNS_OTHERS])
    if image.width * image.height > MOST_PIXELS:
        raise DataError(f"{name} has {image.width}x{image.height} pixels, and {MOST_PIXELS} are the most that is read")
    yield image


@contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a broken picture into a sentence that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; of sizes there is a sentence of our own
            yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name} is no image that Pillow reads; convert or remove it") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name} has too many pixels to be read; convert or remove it") from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise DataError(f"{name} cannot be read as an image: {one_line(error) or type(error).__name__}") from None


def mode_of(path: Path) -> str:
    """Returns the mode of a picture from its header, e.g. "L" or "RGB".

    Raises:
        FileError, DataError: naming the file, if it cannot be read.
    """
    from devices.reading import open_file

    with open_file(path) as file, open_image(file, str(path)) as image:
        mode: Any = image.mode
        return str(mode)
