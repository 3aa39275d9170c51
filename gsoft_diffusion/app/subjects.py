"""Subjects: their photos, captions and masks in a folder as training reads it, and what was chosen for them."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from gsoft.whole_file import whole_file
from gsoft_diffusion.app.workspace import NAME, Workspace, latest_first, read_json, write_json
from gsoft_diffusion.config.concept import Concept
from gsoft_diffusion.config.prompts import plain_noun
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.photos.folder import Photo, Size, copies, nearly_copies, read_folder, scan
from gsoft_diffusion.photos.image_files import IMAGE_SUFFIXES, opened, read_picture
from gsoft_diffusion.photos.masks import MASK_END, is_white, trouble
from gsoft_diffusion.photos.preview import enlarged
from gsoft_diffusion.sampling.pictures import slug

MOST_BYTES = 50_000_000  # of a photo
MOST_PIXELS = 120_000_000  # more than phones have; Pillow's own limit is half as much again
MOST_PHOTOS = 100
MOST_REMOVED = 20  # photos of a subject that can be put back; of more, the first that were removed are deleted
LONGEST_NAME = 60  # letters of what a subject is called
FACTS = "subject.json"


@dataclass(frozen=True)
class Seen:
    """A photo, and what is to be said of it."""

    photo: Photo
    remarks: tuple[str, ...]


class Subject:
    """A subject in the page's folder."""

    def __init__(self, folder: Path) -> None:
        """folder: of the subject, which is there."""
        self.folder, self.photos, self._removed = folder, folder / "photos", folder / "removed"
        self.facts = read_json(folder / FACTS)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def called(self) -> str:
        """What its owner calls it, which may have any letters."""
        return str(self.facts.get("called") or self.name)

    @property
    def class_word(self) -> str:
        """What it is: dog."""
        return str(self.facts.get("class_word", ""))

    @property
    def token(self) -> str:
        """Its name in prompts: sks."""
        return str(self.facts.get("token", ""))

    @property
    def base(self) -> str:
        """The base model that was chosen for it."""
        return str(self.facts.get("base", BUNDLED_BASE))

    @property
    def resolution(self) -> int:
        """Side of the base model's pictures, in pixels."""
        return int(self.facts.get("resolution", 64))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its last run that differ from the defaults, by name."""
        settings = self.facts.get("settings")
        return dict(settings) if isinstance(settings, dict) else {}

    @property
    def concept(self) -> Concept:
        """The subject as training knows it."""
        return Concept(str(self.photos), self.class_word, self.token).resolved()

    def keep(self, facts: Mapping[str, Any]) -> None:
        """Keep facts by name: called, class_word, token, base, resolution, settings. Raises UserError if it cannot.

        Prompts that were written with another token get the new one. Captions get `{0}`, which stands for either: runs
        with the former token are trained with it to their end.
        """
        changed = self.facts | dict(facts)
        if changed.get("class_word"):
            Concept(str(self.photos), changed["class_word"], changed.get("token") or None).resolved()
        before, now = self.token, str(changed.get("token", ""))
        if before and now and before != now:
            self._unname_captions(before)
            changed["settings"] = with_token(changed.get("settings", {}), before, now)
        write_json(self.folder / FACTS, changed)
        self.facts = changed

    def _unname_captions(self, token: str) -> None:
        for path in (*self.photos.glob("*.txt"), *self._removed.glob("*/*.txt")):
            try:
                text = path.read_bytes().decode(errors="surrogateescape")
                with whole_file(path) as file:
                    file.write(with_token(text, token, "{0}").encode(errors="surrogateescape"))
            except OSError as error:
                raise UserError(f"{path.name}: the caption cannot be written ({error.strerror})") from error

    def seen(self) -> tuple[Seen, ...]:
        """Its photos with what training says of them. Raises UserError as `read_folder`; none if there is none."""
        try:
            listing = scan(self.photos)
            state = tuple((path, *_state(path)) for path in (*listing.images, *listing.others))
        except OSError as error:
            raise UserError(f"{self.photos}: cannot be read as a folder ({error.strerror})") from error
        return _seen(self.photos, state, self.concept, self.resolution) if listing.images else ()

    @property
    def count(self) -> int:
        """How many photos it has, whether or not training takes them."""
        try:
            return len(scan(self.photos).images)
        except OSError:
            return 0

    def photo(self, name: str) -> Photo:
        """One of its photos by the name of its file. Raises UserError if there is none, and as `seen`."""
        photos = {each.photo.path: each.photo for each in self.seen()}
        return photos[self._path(name)]

    def _path(self, name: str) -> Path:
        """The file of one of its photos, which training may refuse. Raises UserError if there is none of that name."""
        found = next((path for path in scan(self.photos).images if path.name == name), None)
        if found is None:
            raise UserError(f"{self.name} has no photo {name}")
        return found

    def add_photo(self, upload: Path, called: str) -> Path:
        """Take over an uploaded file, under a name of letters and digits that no other has. Returns its path.

        upload: the file, which may be anything. called: what its sender calls it.

        Raises UserError if it is no photo that training can use, or if the disk is full.
        """
        suffix = Path(called).suffix.lower()
        shown = Path(called.replace("\\", "/")).name
        if suffix not in IMAGE_SUFFIXES:
            raise UserError(f"{shown}: is no kind of picture known here; known are {', '.join(sorted(IMAGE_SUFFIXES))}")
        if upload.is_symlink() or not upload.is_file():
            raise UserError(f"{shown}: is no file")
        if (size := upload.stat().st_size) > MOST_BYTES:
            raise UserError(
                f"{shown}: has {size / 1e6:.0f} MB, and {MOST_BYTES / 1e6:.0f} are allowed; make it smaller"
            )
        if sum(path.suffix.lower() in IMAGE_SUFFIXES for path in self.photos.iterdir()) >= MOST_PHOTOS:
            raise UserError(f"{shown}: there are {MOST_PHOTOS} photos already, and 3 to 5 are enough")
        place = self._free(slug(Path(shown).stem, 40), suffix)
        try:
            with TemporaryDirectory(dir=self.folder) as alone:  # it is kept once training would take it
                copy = Path(alone) / place.name
                shutil.copyfile(upload, copy)
                check_size(copy)
                read_folder(alone, "photos", "")
                return copy.rename(place)
        except OSError as error:
            raise UserError(f"{shown}: cannot be kept ({error.strerror})") from error
        except UserError as error:
            raise UserError(str(error).replace(str(copy), shown)) from error

    def _free(self, stem: str, suffix: str) -> Path:
        """A path whose stem no other file has, because captions and masks are found by it."""
        taken = {path.stem.casefold() for path in self.photos.iterdir()}  # A and a may be one name to a file system
        candidate, number = stem, 1
        while candidate.casefold() in taken or candidate.endswith(MASK_END):
            number += 1
            candidate = f"{stem}-{number}"
        return self.photos / (candidate + suffix)

    def set_caption(self, name: str, text: str) -> None:
        """Give a photo a caption; an empty one, or the prompt that it has without, takes it away.

        name: of its file. Raises UserError if there is no such photo, if the caption has the place of a name that is
        not known, or if it cannot be written.
        """
        path = _caption(self._path(name))
        words = " ".join(unicodedata.normalize("NFC", text).split())
        read = self.concept.named(words)
        try:
            if words and read != self.concept.instance_prompt:
                with whole_file(path) as file:
                    file.write(words.encode())
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{name}: its caption cannot be written ({error.strerror})") from error

    def set_mask(self, name: str, mask: Image.Image | None) -> None:
        """Say where the subject is in a photo; None takes its mask away.

        name: of its file. mask: in shades of grey, white where the subject is, in the photo's shape; it is scaled to
        the photo's size.

        Raises UserError if there is no such photo, if training would refuse the mask, or if it cannot be written.
        """
        photo = self._path(name)
        path = _mask(photo)
        try:
            if mask is None:
                path.unlink(missing_ok=True)
                if (opacity := read_picture(photo).opacity) and not trouble(opacity):
                    raise UserError(f"{name}: its mask is its own transparency; drop the photo without it instead")
            else:
                fitted = _fitted(mask, name, read_picture(photo).image.size)
                with whole_file(path) as file:
                    fitted.save(file, "PNG")
        except OSError as error:
            raise UserError(f"{name}: its mask cannot be written ({error.strerror})") from error

    def remove_photo(self, name: str) -> None:
        """Take a photo away with its caption and mask, so that `put_back` can bring it back.

        name: of its file. Raises UserError if there is none of that name, or if it cannot be moved.
        """
        path = self._path(name)
        before = self._removals()
        place = self._removed / f"{int(before[-1].name) + 1 if before else 1:04d}"
        try:
            place.mkdir(parents=True)
            for each in (_caption(path), _mask(path), path):  # the photo last: a mask without one would be an error
                if each.exists():
                    each.rename(place / each.name)
        except OSError as error:
            raise UserError(f"{name}: cannot be removed ({error.strerror})") from error
        for older in before[: len(before) + 1 - MOST_REMOVED]:
            shutil.rmtree(older, ignore_errors=True)

    @property
    def removed(self) -> str | None:
        """The name of the photo that was removed last and can be put back, None if there is none."""
        found = [photo for place in reversed(self._removals()) for photo in scan(place).images]
        return found[0].name if found else None

    def put_back(self) -> str:
        """Bring back the photo that was removed last, with its caption and mask.

        Returns its name, which is another one if a photo has its name by now. Raises UserError if there is none, or if
        it cannot be moved.
        """
        place = next((place for place in reversed(self._removals()) if scan(place).images), None)
        if place is None:
            raise UserError(f"{self.name} has no photo that was removed")
        photo = scan(place).images[0]
        try:
            target = self._free(photo.stem, photo.suffix)
            pairs = [(photo, target), (_caption(photo), _caption(target)), (_mask(photo), _mask(target))]
            for removed, back in pairs:
                if removed.exists():
                    removed.rename(back)
        except OSError as error:
            raise UserError(f"{photo.name}: cannot be put back ({error.strerror})") from error
        shutil.rmtree(place, ignore_errors=True)
        return target.name

    def _removals(self) -> list[Path]:
        """A folder for each photo that was removed, the first one first."""
        found = [path for path in self._removed.glob("*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))


def _caption(photo: Path) -> Path:
    return photo.with_suffix(".txt")


def _mask(photo: Path) -> Path:
    return photo.with_name(f"{photo.stem}{MASK_END}.png")


def with_token(value: Any, old: str, now: str) -> Any:
    """A text, or settings with texts in them, that have the new token for the old one.

    value: a text, a number or None, or lists and mappings of such. old, now: the tokens; if one is "", nothing changes.
    """
    if not old or not now or old == now:
        return value
    if isinstance(value, str):
        return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: now, value)
    if isinstance(value, list):
        return [with_token(each, old, now) for each in value]
    return {key: with_token(each, old, now) for key, each in value.items()} if isinstance(value, dict) else value


def _state(path: Path) -> tuple[int, int]:
    """A file's size in bytes and the time of its last change in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=32)
def _seen(photos: Path, state: object, concept: Concept, resolution: int) -> tuple[Seen, ...]:
    """The photos in a folder with what is to be said of them. state: is another one when its files are others."""
    found = read_folder(photos, "photos", concept.instance_prompt or "", concept.named).photos
    said: dict[Path, list[str]] = {photo.path: list(photo.notes) for photo in found}
    for first, copy in copies(found):
        said[copy.path].append(f"the same picture as {first.path.name}")
    for first, later in nearly_copies(found):
        said[later.path].append(f"nearly the same as {first.path.name}; different views teach more")
    for photo in found:
        if remark := enlarged(photo, [(resolution, resolution)]):
            said[photo.path].append(remark)
    return tuple(Seen(photo, tuple(said[photo.path])) for photo in found)


def check_size(path: Path) -> None:
    """Raise UserError if the file is no picture, or has very many pixels. It is not unpacked for this.

    path: of an upload.
    """
    with opened(path) as image:
        width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(f"{path}: has {width}×{height} pixels, too many; make it smaller")


def _fitted(mask: Image.Image, name: str, size: Size) -> Image.Image:
    """A mask in its photo's size. Raises UserError if it has another shape, or does not tell the subject from the rest.

    mask: in shades of grey. name, size: the photo's.
    """
    (across, down), (width, height) = mask.size, size
    if abs(across * height - down * width) > max(size):  # by more than a scaled picture's last row may be rounded
        raise UserError(
            f"the mask of {name}: has {across}×{down} pixels, and the photo {width}×{height}; give it the photo's shape"
        )
    fitted = mask.resize(size, Image.Resampling.BILINEAR)
    if not is_white(fitted) and (why := trouble(fitted)):
        raise UserError(f"the mask of {name}: {why}")
    return fitted


def subjects(workspace: Workspace) -> list[tuple[str, str]]:
    """What each subject is called, and its name; the latest first."""
    there = (path for path in workspace.subjects.iterdir() if NAME.fullmatch(path.name))
    found = [path for path in there if path.is_dir() and not path.is_symlink()]
    return [(Subject(path).called, path.name) for path in latest_first(found)]


def subject_of(workspace: Workspace, name: str) -> Subject:
    """The subject of that name. Raises UserError if there is none."""
    if not NAME.fullmatch(name or "") or name not in (known for _, known in subjects(workspace)):
        raise UserError(f"there is no subject {name}")
    return Subject(workspace.subjects / name)


def new_subject(workspace: Workspace, name: str, class_word: str, token: str) -> Subject:
    """Make a subject, whose photos are still to come.

    name: what its owner calls it. class_word: what it is. token: its name in prompts.

    Raises UserError if the class word says nothing, or if there is a subject of that name.
    """
    if not plain_noun(class_word).strip():
        raise UserError("--class_word: say in a word or two what it is: dog, mug, toy car")
    called = " ".join(unicodedata.normalize("NFC", name.strip() or class_word).split())[:LONGEST_NAME]
    for known, _ in subjects(workspace):
        if called == known or slug(called, default="") == slug(known, default="") != "":
            raise UserError(f"--name: there is a subject {known} already; choose it above, or give another name")
    folder = _place(workspace, called, class_word)
    Concept(str(folder), class_word, token).resolved()
    try:
        (folder / "photos").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--name: {folder} cannot be made ({error.strerror})") from error
    subject = Subject(folder)
    subject.keep({"called": called, "class_word": plain_noun(class_word), "token": token})
    return subject


def _place(workspace: Workspace, *words: str) -> Path:
    """A folder that is not there, named by the first of the words that has letters or digits for it."""
    stem = next((found for text in words if (found := slug(text, 40, default=""))), "subject")
    number = 1
    while (place := workspace.subjects / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return place
