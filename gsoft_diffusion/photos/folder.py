"""Photos: pictures in a folder, with captions and masks beside them.

dog1.jpg
dog1.txt               its caption, used as its prompt; or a line of metadata.jsonl or metadata.csv:
metadata.jsonl         {"file_name": "dog1.jpg", "text": "a photo of a sks dog in the snow"}
dog1-masklabel.png     where the subject is, white on black; or the transparency of the photo itself
10_sks dog/            more of the same, in a folder as kohya's tools name them
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError, printable
from gsoft_diffusion.foundation.text_files import on_disk
from gsoft_diffusion.photos.captions import read_captions
from gsoft_diffusion.photos.image_files import IMAGE_SUFFIXES, Picture, content, read_picture
from gsoft_diffusion.photos.masks import find_masks, is_mask, is_white, read_mask, read_opacity, trouble
from gsoft_diffusion.photos.quality import alike, is_blurred, look

SMALLEST = 2  # pixels along the shorter side
NAMED = 5  # files that are left out by name; of more only how many
FOLDER = "/ (a folder)"  # after the name of one that is left out
LIKE_A_MASK = re.compile(r"(.+?)[-_. ]?masks?", re.IGNORECASE)
BLANK = ("of one single colour",)
KOHYA = re.compile(r"(\d+)_(.*\S.*)")  # repeats and words

Size = tuple[int, int]  # width and height in pixels, as in Pillow


@dataclass(frozen=True)
class Photo:
    """A picture and what it is trained with.

    prompt: its caption, or the prompt of its folder if it has none.
    size: upright. notes: what was done to it or is odd about it, in words that follow a number of photos.
    mask: the file that says where the subject is: another one, or the photo itself by its transparency.
    look: what it looks like, by which `alike` finds photos that were taken twice; None if that was not asked.
    """

    path: Path
    prompt: str
    size: Size
    notes: tuple[str, ...] = ()
    mask: Path | None = None
    look: int | None = None


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    images: its pictures in order of their names, masks not among them. others: the other files.
    left_out: names of what is no file to be used. subfolders: those that pictures and other files are in as well.
    """

    images: tuple[Path, ...]
    others: tuple[Path, ...]
    left_out: tuple[str, ...]
    subfolders: tuple[Path, ...]


@dataclass(frozen=True)
class Folder:
    """The photos of a folder in order of their names.

    captions: how many have one. left_out: names of what else is there. surplus: pictures above the limit.
    subfolders: names of those that photos came from.
    """

    photos: tuple[Photo, ...]
    captions: int
    left_out: tuple[str, ...] = ()
    surplus: int = 0
    subfolders: tuple[str, ...] = ()

    def __str__(self) -> str:
        masks = sum(photo.mask is not None for photo in self.photos)
        count = len(self.photos)
        parts = [f"{count} picture{'' if count == 1 else 's'}"]
        parts += [f"{self.captions} with captions"] if self.captions else []
        parts += [f"{masks} with masks"] if masks else []
        notes = Counter(note for photo in self.photos for note in photo.notes)
        parts += [f"{count} {note}" for note, count in sorted(notes.items())]
        said = [", ".join(parts)]
        if self.subfolders:
            said.append(
                f"from {', '.join(map(printable, self.subfolders))} (repeats are not used, all photos count the same)"
            )
        if self.surplus:
            said.append(f"{self.surplus} more than are asked for, which are not used")
        if self.left_out:
            named, more = self.left_out[:NAMED], len(self.left_out) - NAMED
            said.append(f"left out: {', '.join(map(printable, named))}{f' and {more} more' if more > 0 else ''}")
        return "; ".join(said)


def read_folder(
    folder: str | Path,
    flag: str,
    prompt: str,
    fill: Callable[[str], str] = str,
    *,
    limit: int | None = None,
    masks: bool = True,
) -> Folder:
    """The photos in a folder with their captions and masks.

    folder: its path.
    flag: the option that named the folder, for error messages.
    prompt: of photos that have no caption.
    fill: puts the subject's name into a caption, and raises UserError if it cannot.
    limit: use only so many pictures; None for all.
    masks: whether these are photos of a subject, which may have masks and should be good; class images are not.

    Every file is read once, so that a damaged one is found now and not an hour later. Raises UserError naming the file
    for whatever is damaged, ambiguous or does not belong together.
    """
    listing = list_folder(folder, flag)
    captions, caption_files = read_captions(listing.images, listing.others)
    mask_files = find_masks(listing.images, listing.others) if masks else {}
    stems = {path.stem for path in listing.images}
    photos = []
    for path in listing.images[:limit]:
        picture = read_picture(path)
        size, notes, mask = picture.image.size, _notes(picture), None
        if masks and is_blurred(picture.image):
            notes.append("blurred")
        if masks and picture.drawn:
            notes.append("drawn by this program and not photographed")
        if masks and (named := LIKE_A_MASK.fullmatch(path.stem)) and named[1] in stems:
            notes.append("used as a photo although named like a mask (which is called like dog1-masklabel.png)")
        if min(size) < SMALLEST:
            found = "×".join(map(str, size))
            raise UserError(f"{path}: only {found} pixels, too small to show anything; use a larger picture")
        if masks:
            mask, note = _checked_mask(path, picture, mask_files.get(path))
            notes += [note] if note else []
        seen = look(picture.image) if masks else None
        caption = _filled(captions[path], path, fill) if path in captions else prompt
        photos.append(Photo(path, caption, size, tuple(notes), mask, seen))
    used = {*caption_files, *mask_files.values()}
    base = on_disk(Path(folder))
    unknown = [path.relative_to(base).as_posix() for path in listing.others if path not in used]
    return Folder(
        tuple(photos),
        sum(photo.path in captions for photo in photos),
        (*sorted(unknown), *listing.left_out),
        len(listing.images) - len(photos),
        tuple(path.name for path in listing.subfolders),
    )


def list_images(folder: str | Path, flag: str) -> list[Path]:
    """The pictures that `read_folder` would read, in the same order.

    folder, flag: as in `list_folder`, and so are the UserErrors.
    """
    return list(list_folder(folder, flag).images)


def list_folder(folder: str | Path, flag: str) -> Listing:
    """The folder's files.

    folder: its path. flag: the option that named it, for messages.

    Raises UserError if there is no such folder or no picture in it.
    """
    try:
        listing = scan(on_disk(Path(folder)))
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be read as a folder ({error.strerror})") from error
    if not listing.images:
        below = "; only those of its folders are looked into that are named like `10_sks dog`"
        folders = any(name.endswith(FOLDER) for name in listing.left_out)
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{flag} {folder}: holds no picture (known are {known}){below if folders else ''}")
    return listing


def scan(folder: Path, *, below: bool = True) -> Listing:
    """What is in the folder and, if asked for, in its subfolders.

    folder: its path. below: whether to look into those subfolders that are named as kohya's. Raises OSError.
    """
    images: list[Path] = []
    others: list[Path] = []
    left_out, hidden, subfolders = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            hidden.append(f"{path.name} (hidden)")
        elif path.is_dir():
            inside = scan(path, below=False) if below and KOHYA.fullmatch(path.name) else None
            if inside is None or not inside.images:
                left_out.append(f"{path.name}{FOLDER}")
                continue
            subfolders.append(path)
            images += inside.images
            others += inside.others
            left_out += [f"{path.name}/{name}" for name in inside.left_out]
        elif not path.is_file():
            left_out.append(f"{path.name} ({'a dangling link' if path.is_symlink() else 'no file'})")
        elif path.suffix.lower() in IMAGE_SUFFIXES and not is_mask(path):
            images.append(path)
        else:
            others.append(path)
    return Listing(tuple(images), tuple(others), (*left_out, *hidden), tuple(subfolders))


def open_mask(photo: Photo) -> Image.Image:
    """Where the subject is, in shades from black (not there) to white, in the size of the photo."""
    assert photo.mask is not None
    return read_opacity(photo.path) if photo.mask == photo.path else read_mask(photo.mask)


def copies(photos: Iterable[Photo]) -> Iterator[tuple[Photo, Photo]]:
    """Photos that are the same, byte for byte, as one before them: that one, and the copy.

    Raises UserError for one that cannot be read any more.
    """
    seen: dict[str, Photo] = {}
    for photo in photos:
        first = seen.setdefault(hashlib.sha256(content(photo.path)).hexdigest(), photo)
        if first is not photo:
            yield first, photo


def nearly_copies(photos: Sequence[Photo]) -> Iterator[tuple[Photo, Photo]]:
    """Photos that look nearly the same as one before them, and are no copies of it: that one, and the later."""
    same = {(id(first), id(copy)) for first, copy in copies(photos)}
    looks = [(photo, photo.look) for photo in photos if photo.look is not None and not set(BLANK) & set(photo.notes)]
    for first, later in alike(bits for _, bits in looks):
        pair = looks[first][0], looks[later][0]
        if (id(pair[0]), id(pair[1])) not in same:
            yield pair


def is_blank(image: Image.Image) -> bool:
    """Whether the picture is black or of any other single colour, as numbers that are not finite leave it."""
    pixels = np.asarray(image)
    return bool((pixels == pixels[0, 0]).all())


def _filled(caption: str, path: Path, fill: Callable[[str], str]) -> str:
    try:
        return fill(caption)
    except UserError as error:
        raise UserError(f"{path}: its caption: {error}") from error


def _notes(picture: Picture) -> list[str]:
    notes = ["turned upright by EXIF data"] if picture.turned else []
    notes += [picture.colours] if picture.colours else []
    return notes + (list(BLANK) if is_blank(picture.image) else [])


def _checked_mask(path: Path, picture: Picture, file: Path | None) -> tuple[Path | None, str]:
    """The photo's mask file, if any, and a note if a candidate is not used. Raises UserError for a bad file."""
    if file is None:
        if picture.opacity is None:
            return None, ""
        if picture.opacity.getextrema() == (0, 0):
            raise UserError(f"{path}: transparent everywhere")
        if trouble(picture.opacity):
            return None, "about equally transparent everywhere, so without a mask"
        return path, ""
    mask = read_mask(file)
    if mask.size != picture.image.size:
        found, wanted = ("×".join(map(str, size)) for size in (mask.size, picture.image.size))
        turned = picture.turned and mask.size == picture.image.size[::-1]
        do = (
            "is turned by EXIF data to have {wanted}; turn the mask as well"
            if turned
            else "has {wanted}; make them equal"
        )
        raise UserError(f"{file}: the mask has {found} pixels, but {path.name} {do.format(wanted=wanted)}")
    if is_white(mask):
        return None, "with a mask that is white everywhere, which has no effect"
    if why := trouble(mask):
        raise UserError(f"{file}: {why}")
    return file, ""
