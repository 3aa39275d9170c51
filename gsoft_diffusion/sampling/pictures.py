"""Pictures on disk: safe names, and settings inside the PNG. Never writes over a file."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.photos.image_files import open_image, opened


def slug(text: str, length: int = 60, default: str = "picture") -> str:
    """`text` as ASCII letters, digits and single dashes, at most `length` of them: safe in any file's name.

    default: for a text of which nothing is left.
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")[:length].strip("-") or default


def save_png(image: Image.Image, folder: Path, name: str, number: int, metadata: Mapping[str, Any]) -> Path:
    """Write a new PNG with its settings inside; returns its path.

    image: the picture.
    folder: where it goes; made if it is not there.
    name: of the file, with `{}` for the number.
    number: counted up where another command was faster with that name.
    metadata: what to keep in the PNG, as JSON.

    Raises UserError if it cannot be written; nothing of it stays then.
    """
    info = PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))  # plain ASCII
    while True:
        path = folder / name.format(f"{number:04d}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_new(image, path, info)
            return path
        except OSError as error:
            if not (isinstance(error, FileExistsError) and folder.is_dir()):
                raise UserError(f"cannot write {path}: {error.strerror}") from error
            number += 1


def _write_new(image: Image.Image, path: Path, info: PngInfo) -> None:
    """Write a PNG where there is no file, completely or not at all. Raises OSError."""
    file = path.open("xb")
    try:
        with file:
            image.save(file, "PNG", pnginfo=info)
    except BaseException:
        path.unlink()
        raise


def read_facts(path: Path) -> dict[str, Any]:
    """What `save_png` kept in a PNG: prompt, seed, sampler and more; nothing if it holds no such text.

    Whoever made the file may have written anything, so values are to be checked before they are used.
    """
    try:
        with opened(path) as image:
            facts = json.loads(image.info.get(METADATA_KEY, "{}"))
    except (UserError, ValueError, TypeError, RecursionError):  # no picture, no JSON, or not even a text
        return {}
    return facts if isinstance(facts, dict) else {}


def next_number(folder: Path) -> int:
    """One more than the largest number of a picture or a contact sheet in the folder, 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(found[1]) for name in names if (found := re.match(r"(?:contact_sheet_)?(\d{4,})[_.]", name))]
    return max(numbers, default=-1) + 1


@dataclass(frozen=True)
class PictureFile:
    """A picture of known size in a file, which is read where it is asked for, as many do not fit into memory."""

    path: Path
    size: tuple[int, int]

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """The picture in another size, as Pillow makes it. Raises UserError if the file cannot be read."""
        return open_image(self.path).resize(size, resample)
