"""The subjects that scores are averaged over: folders of photos with a class word each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from gsoft_diffusion.foundation.bundled import lasting_path, places
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import composed, on_disk, read_csv, read_text
from gsoft_diffusion.photos.folder import list_images, scan

TABLE, DREAMBOOTH = "subjects.csv", "prompts_and_classes.txt"
# Who is asked to wear a hat, and not to be cube shaped. Of the public data set these are its dogs and cats, as it says.
# fmt: off
LIVE_CLASSES = {
    "baby", "bear", "bird", "boy", "bunny", "cat", "chicken", "child", "cow", "dog", "donkey", "elephant", "ferret",
    "fish", "fox", "frog", "girl", "goat", "hamster", "hen", "horse", "kid", "kitten", "lion", "lizard", "man",
    "monkey", "mouse", "owl", "panda", "parrot", "penguin", "person", "pig", "pony", "puppy", "rabbit", "rat", "sheep",
    "snake", "squirrel", "tiger", "tortoise", "turtle", "wolf", "woman", "zebra",
}
# fmt: on
BUNDLED = "data/subjects"  # drawn for the miniature, no photos of anyone


@dataclass(frozen=True)
class Subject:
    """What is learned from one folder of photos.

    live: an animal or person, which takes DreamBooth's prompts for live subjects instead of those for objects.
    """

    name: str
    class_word: str
    live: bool
    folder: Path

    @property
    def is_bundled(self) -> bool:
        """Whether the subject comes with this repository, so that its photos may be passed on."""
        return lasting_path(self.folder.resolve().parent) == BUNDLED

    def photos(self) -> list[Path]:
        """The photos' paths, in order. Raises UserError if there are none."""
        return list_images(self.folder, f"photos of {self.name}:")


def read_subjects(folder: str | Path, class_word: str | None = None) -> list[Subject]:
    """The subjects in a data set's folder, in order of their names; or the one in a folder of photos.

    folder: a data set is a folder of folders beside `subjects.csv` (subject, class_word, kind: live or object) or
    beside the public DreamBooth set's `prompts_and_classes.txt`. class_word: what a folder of photos shows, and only
    for such a one. Without the table, class words decide who is live.

    Raises UserError if the folder is none of these, the class word is missing or one too many, or a table is not sound.
    """
    folder = _find(folder)
    if class_word and ((folder / TABLE).is_file() or (folder / DREAMBOOTH).is_file()):
        raise UserError(f"{folder}: names its own subjects; leave out the class word {class_word}")
    if (folder / TABLE).is_file():
        subjects = _from_table(folder)
    elif (folder / DREAMBOOTH).is_file():
        subjects = _from_dreambooth(folder)
    elif scan(folder).images:
        if not class_word:
            raise UserError(f"{folder}: say what the photos show by a class word, for example dog")
        subjects = [Subject(folder.resolve().name, class_word, is_live(class_word), folder)]
    else:
        raise UserError(f"{folder}: holds neither photos nor {TABLE} nor {DREAMBOOTH} beside folders of photos")
    if not subjects:
        raise UserError(f"{folder}: has a folder for none of the subjects that it names")
    return subjects


def is_live(class_word: str) -> bool:
    """Whether a class word, such as "white puppy", names an animal or a person, by its last word."""
    return class_word.lower().rpartition(" ")[2] in LIVE_CLASSES


def _find(folder: str | Path) -> Path:
    for place in map(on_disk, places(folder)):
        if place.is_dir():
            return place
    raise UserError(f"{folder}: no such folder of subjects")


def _from_table(folder: Path) -> list[Subject]:
    try:
        found = [
            Subject(composed(row["subject"]), row["class_word"], row["kind"] == "live", folder / row["subject"])
            for _, row in read_csv(folder / TABLE)
        ]
    except KeyError as error:
        raise UserError(f"{folder / TABLE}: has no column {error.args[0]}") from error
    names = [subject.name for subject in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{folder / TABLE}: subject {twice[0]} comes twice")
    present = _present(found)
    if missing := sorted(set(names) - {subject.name for subject in present}):
        raise UserError(f"{folder / TABLE}: subject {missing[0]} has no folder of that name beside the table")
    return present


def _from_dreambooth(folder: Path) -> list[Subject]:
    """The table at the head of the file: lines `name,class`."""
    text = read_text(folder / DREAMBOOTH).partition("Prompts")[0]
    pairs = re.findall(r"^(\w+),([\w ]+)$", text, flags=re.MULTILINE)
    return _present([Subject(name, word, is_live(word), folder / name) for name, word in pairs])


def _present(subjects: list[Subject]) -> list[Subject]:
    """Those whose folder is there, and inside the data set."""
    named = [replace(s, folder=on_disk(s.folder)) for s in subjects if re.fullmatch(r"[\w-]+", s.name)]
    return sorted((s for s in named if s.folder.is_dir()), key=lambda subject: subject.name)
