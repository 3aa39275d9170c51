"""The captions of photos: text files of their names, or a table beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from gsoft.file import strict_json
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.foundation.text_files import composed, read_csv, read_text
from gsoft_diffusion.photos.masks import beside

SUFFIXES = (".txt", ".caption")  # of a caption's file; the second as kohya's tools write it
JSONL, CSV = "metadata.jsonl", "metadata.csv"  # as Hugging Face's imagefolder names its tables


def read_captions(images: Sequence[Path], others: Sequence[Path]) -> tuple[dict[Path, str], set[Path]]:
    """The captions of those pictures that have one, and the files they came from.

    images: the pictures. others: the other files beside them, among which text files and tables are looked for.

    Raises UserError for an empty caption, two for one picture, one for a picture that is not there, and a file that
    cannot be read.
    """
    captions: dict[Path, str] = {}
    sources: dict[Path, Path] = {}
    for image, caption, source in _found(images, others):
        if image in captions:
            raise UserError(f"{source}: {image.name} has a caption in {sources[image].name} already; remove one")
        captions[image], sources[image] = " ".join(composed(caption).split()), source
        if not captions[image]:
            raise UserError(
                f"{image}: its caption is empty in {source.name}; write one, or remove it to use the instance prompt"
            )
    return captions, set(sources.values())


def _found(images: Sequence[Path], others: Sequence[Path]) -> Iterator[tuple[Path, str, Path]]:
    """Pictures with their captions and the files these are in."""
    for table in others:
        if table.name.lower() in (JSONL, CSV):
            yield from ((image, text, table) for image, text in _from_table(table, images))
    for suffix in SUFFIXES:
        for image, path in beside(images, others, suffix).items():
            yield image, read_text(path), path


def _from_table(table: Path, images: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The captions that a table has for pictures in its folder and below."""
    named = {
        composed(image.relative_to(table.parent).as_posix()): image
        for image in images
        if image.is_relative_to(table.parent)
    }
    seen = set()
    for number, name, text in (_csv_rows if table.suffix.lower() == ".csv" else _json_rows)(table):
        image = named.get(composed(PurePosixPath(name).as_posix()))  # without `./`
        image = image or named.get(composed(PureWindowsPath(name).as_posix()))
        if image is None:
            raise UserError(f"{table}, line {number}: there is no picture {name} in the folder")
        if image in seen:
            raise UserError(f"{table}, line {number}: a second caption for {name}; remove one of them")
        seen.add(image)
        yield image, text


def _json_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = strict_json(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            wanted = '{"file_name": "dog.jpg", "text": "a photo of a sks dog"}'
            raise UserError(f"{table}, line {number}: must be like {wanted} ({first_line(error)})") from error
        if not (isinstance(name, str) and isinstance(text, str)):
            raise UserError(f"{table}, line {number}: file_name and text must be texts")
        yield number, name, text


def _csv_rows(table: Path) -> Iterator[tuple[int, str, str]]:
    for number, row in read_csv(table):
        if missing := [column for column in ("file_name", "text") if column not in row]:
            raise UserError(f"{table}, line {number}: has no {missing[0]}; the first line must be file_name,text")
        yield number, row["file_name"], row["text"]
