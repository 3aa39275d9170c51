"""The subjects that scores are averaged over: folders of photos with a class word each."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from gsoft_diffusion.errors import UserError
from gsoft_diffusion.photos import IMAGE_SUFFIXES, list_images

TABLE, DREAMBOOTH = "subjects.csv", "prompts_and_classes.txt"
LIVE_CLASSES = {"dog", "cat"}  # of the public data set: its other subjects take the prompts for objects
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Subject:
    """What is learned from one folder of photos.

    live: an animal or person, which takes DreamBooth's prompts for live subjects instead of those for objects.
    """

    name: str
    class_word: str
    live: bool
    folder: Path

    def photos(self) -> list[Path]:
        """The photos' paths, in order. Raises UserError if there are none."""
        return list_images(self.folder, f"photos of {self.name}:")[0]


def read_subjects(folder: str | Path, class_word: str | None = None) -> list[Subject]:
    """The subjects in a data set's folder, in order of their names; or the one in a folder of photos.

    A data set is a folder of folders beside `subjects.csv` (subject, class_word, kind: live or object) or beside the
    public DreamBooth set's `prompts_and_classes.txt`. A folder of photos needs its `class_word`. Raises UserError.
    """
    folder = _find(folder)
    if class_word and ((folder / TABLE).is_file() or (folder / DREAMBOOTH).is_file()):
        raise UserError(f"{folder}: says itself what its subjects are; leave out the class word {class_word}")
    if (folder / TABLE).is_file():
        subjects = _from_table(folder)
    elif (folder / DREAMBOOTH).is_file():
        subjects = _from_dreambooth(folder)
    elif any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()):
        if not class_word:
            raise UserError(f"{folder}: say what the photos show by a class word, for example dog")
        subjects = [Subject(folder.resolve().name, class_word, class_word in LIVE_CLASSES, folder)]
    else:
        raise UserError(f"{folder}: holds neither photos nor {TABLE} nor {DREAMBOOTH} beside folders of photos")
    if not subjects:
        raise UserError(f"{folder}: none of the subjects it names has a folder there")
    return subjects


def _find(folder: str | Path) -> Path:
    for place in (Path(folder).expanduser(), REPOSITORY / folder):
        if place.is_dir():
            return place
    raise UserError(f"{folder}: no such folder of subjects")


def _from_table(folder: Path) -> list[Subject]:
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        found = [Subject(r["subject"], r["class_word"], r["kind"] == "live", folder / r["subject"]) for r in rows]
    except KeyError as error:
        raise UserError(f"{folder / TABLE}: has no column {error.args[0]}") from error
    return _present(found)


def _from_dreambooth(folder: Path) -> list[Subject]:
    """The table at the head of the file: lines `name,class`."""
    text = (folder / DREAMBOOTH).read_text(encoding="utf-8").partition("Prompts")[0]
    pairs = re.findall(r"^(\w+),([\w ]+)$", text, flags=re.MULTILINE)
    return _present([Subject(name, word, word in LIVE_CLASSES, folder / name) for name, word in pairs])


def _present(subjects: list[Subject]) -> list[Subject]:
    """Those whose folder is there, and inside the data set."""
    found = [s for s in subjects if re.fullmatch(r"[\w-]+", s.name) and s.folder.is_dir()]
    return sorted(found, key=lambda subject: subject.name)
