"""Does a default run carry a subject into scenes? Train on every subject of a folder, draw, and let judges look.

    python -m pretraining.check_subjects --work <work folder> --base <pipeline folder> --subjects data/subjects \\
        --out <folder> [--set max_train_steps=400 --set learning_rate=2e-3]

For each subject: likeness (DINO's similarity of the drawn pictures to the photos, over that of the photos among each
other), the same for the base model's pictures, and what else `measure` says. Adapters, pictures and contact sheets lie
in `<out>/<subject>`, the figures in `<out>/subjects.json`; what is there already is neither trained nor measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from eval.subjects import Subject, read_subjects
from gsoft_diffusion.adapters.identity import fingerprint
from gsoft_diffusion.config import GenerationConfig, TrainingConfig
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.foundation.files import whole_file
from gsoft_diffusion.foundation.run_folder import METADATA_KEY, SETTINGS
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.drawing import draw
from gsoft_diffusion.scoring.encoders import ImageEncoder, load_dino
from gsoft_diffusion.scoring.metrics import cosines, image_similarity, nearest_photo, real_photo_ceiling
from gsoft_diffusion.training.train import train
from pretraining.check import share
from pretraining.train_judge import Judge, load_judge
from pretraining.train_vae import to_pixels
from pretraining.world import BACKGROUNDS

PLACES = ("snow", "beach", "city", "mountain", "space", "grass")
PICTURES = 2  # of each place


def read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings by name from texts `NAME=VALUE`: a value is JSON, such as 2e-3 or true, and else a text."""
    settings: dict[str, Any] = {}
    for name, _, value in (item.partition("=") for item in given):
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def training_config(subject: Subject, base: Path, settings: Mapping[str, Any], folder: Path) -> TrainingConfig:
    """How a user would train on the subject, but for `settings`. Raises UserError for settings that cannot be."""
    quiet = {"num_validation_images": 0, "report_to": "none", "checkpointing_steps": 0}
    values = {
        "instance_data_dir": str(subject.folder),
        "class_word": subject.class_word,
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder),
    }
    return TrainingConfig.from_dict(quiet | values | dict(settings), "--set")


def train_on(subject: Subject, base: Path, settings: Mapping[str, Any], folder: Path) -> Path:
    """Train by `training_config`; returns the adapter's file. What is there stays.

    Raises SystemExit if the folder has something else in it than a run, such as photos. A run that a signal ends leaves
    no adapter, since the next call would take it for a whole one; raises KeyboardInterrupt.
    """
    adapter = folder / "adapter.safetensors"
    if adapter.exists():
        return adapter
    if not (folder / SETTINGS).exists() and any(not path.name.startswith(".") for path in folder.glob("*")):
        raise SystemExit(f"{folder}: has something else in it than a run; choose another --out")
    shutil.rmtree(folder, ignore_errors=True)  # the rest of a run that was stopped
    result = train(training_config(subject, base, settings, folder))
    if result.interrupted:
        result.adapter.unlink()
        raise KeyboardInterrupt
    return result.adapter


def draw_places(adapter: Path, base: Path, guidance: float | None, folder: Path, compare: bool = False) -> None:
    """Draw the subject in every place into a new folder; compare: the base model's pictures as well."""
    shutil.rmtree(folder, ignore_errors=True)  # the rest of a call that was stopped
    draw(
        GenerationConfig(
            adapter=(str(adapter),),
            prompts=tuple(f"a {{0}} {{1}} {BACKGROUNDS[place][0]}" for place in PLACES),
            num_images=PICTURES,
            guidance_scale=guidance,
            pretrained_model_name_or_path=str(base),
            output_dir=str(folder),
            batch_size=12,
            compare=compare,
        )
    )


def drawn(folder: Path) -> dict[str, list[tuple[str, Image.Image]]]:
    """(place, picture) of all that was drawn into the folder, by whether `adapter` or `base` drew it."""
    pictures: dict[str, list[tuple[str, Image.Image]]] = {"adapter": [], "base": []}
    for path in sorted(folder.glob("*.png")):
        if not path.name.startswith("contact_sheet"):
            with Image.open(path) as image:
                facts = json.loads(image.info[METADATA_KEY])
                place = next(place for place in PLACES if facts["prompt"].endswith(BACKGROUNDS[place][0]))
                pictures[facts["model"]].append((place, image.convert("RGB")))
    return pictures


@dataclass(frozen=True)
class Album:
    """A subject's photos as the judges see them."""

    class_word: str
    features: Tensor  # (N, D), unit
    places: frozenset[str]
    class_right: float  # share of the photos whose class the second judge names


def read_albums(subjects: Sequence[Subject], dino: ImageEncoder, judge: Judge) -> dict[str, Album]:
    """The photos of every subject, by its name."""
    albums = {}
    for subject in subjects:
        photos = [open_image(path) for path in subject.photos()]
        answers = judge.answers(to_pixels(np.stack([np.asarray(photo) for photo in photos])))
        class_right = share([subject.class_word] * len(photos), answers["class_word"])
        features = dino.embed_images(photos)
        albums[subject.name] = Album(subject.class_word, features, frozenset(answers["background"]), class_right)
    return albums


def measure(
    name: str,
    albums: Mapping[str, Album],
    pictures: Sequence[tuple[str, Image.Image]],
    dino: ImageEncoder,
    judge: Judge,
) -> dict[str, float]:
    """What the judges say of pictures of a subject, each with the place that was asked for.

    likeness: to the photos, as a share of the photos' own.
    recognised: share of pictures whose nearest photo, of all subjects, is one of this subject.
    place, class: shares that the second judge names right; class_of_photos: the same for the photos, which says whether
    the judge knows the thing: it does if its scenes were drawn with `render --subjects`.
    copies: of the pictures in places that no photo shows, the share that is nearer to a photo than the photos are to
    each other.
    """
    album = albums[name]
    features = dino.embed_images(image for _, image in pictures)
    answers = judge.answers(to_pixels(np.stack([np.asarray(image) for _, image in pictures])))
    asked = [place for place, _ in pictures]
    elsewhere = features[[place not in album.places for place in asked]]
    return closeness(features, elsewhere, album.features) | {
        "recognised": recognised(features, name, {name: album.features for name, album in albums.items()}),
        "place": share(asked, answers["background"]),
        "class": share([album.class_word] * len(pictures), answers["class_word"]),
        "class_of_photos": album.class_right,
    }


def closeness(pictures: Tensor, elsewhere: Tensor, photos: Tensor) -> dict[str, float]:
    """`likeness` and `copies` of `measure`, from unit features (N, D); elsewhere: those of places without a photo."""
    among_photos = cosines(photos, photos).fill_diagonal_(-1).max()
    copies = nearest_photo(elsewhere, photos) > among_photos if len(elsewhere) else torch.zeros(1)
    return {
        "likeness": float(image_similarity(pictures, photos).mean()) / real_photo_ceiling(photos),
        "copies": float(copies.float().mean()),
    }


def recognised(pictures: Tensor, name: str, photos_of: Mapping[str, Tensor]) -> float:
    """Share of the pictures that are nearest to a photo of the named subject; unit features (N, D)."""
    nearest = torch.stack([nearest_photo(pictures, photos) for photos in photos_of.values()])  # (subjects, N)
    return float((nearest.argmax(0) == list(photos_of).index(name)).float().mean())


def mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each figure's mean over the subjects; rows: `subject` and its figures."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "subject"}


def measurements(path: Path, base: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of measurements, `settings` and `rows`; a new file has no rows.

    path: the file. base: the pipeline that is measured. settings: what else must not change between its rows.

    Raises SystemExit if the file was begun on another base or with other settings.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    wanted = dict(settings) | {"base": fingerprint(pipeline.unet, [pipeline.text_encoder])}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_measurements(path, {"settings": wanted, "rows": []})
    content: dict[str, Any] = json.loads(path.read_text())
    if content["settings"] != wanted:
        raise SystemExit(f"{path}: was measured on another base or with other settings; give another --out")
    return content


def write_measurements(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of measurements whole: a program that is killed meanwhile loses none of the earlier rows."""
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def runs_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of what all runs on subjects need: judges, base, subjects, and where results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder, for the second judge")
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline to train on")
    parser.add_argument("--subjects", type=expanded_path, required=True, help="folder of subjects with subjects.csv")
    parser.add_argument("--dino", type=expanded_path, default="data/mini_dino", help="DINO whose features are compared")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write")
    return parser


def main() -> int:
    parser = runs_parser(__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training")
    parser.add_argument("--guidance_scale", type=float, help="of the pictures; by default as in training")
    args = parser.parse_args()
    path = args.out / "subjects.json"
    settings, subjects = read_settings(args.set), read_subjects(args.subjects)
    for subject in subjects:
        training_config(subject, args.base, settings, args.out / subject.name)  # what is wrong is said at once
    report = measurements(path, args.base, settings | {"guidance_scale": args.guidance_scale})
    dino, judge = load_dino(str(args.dino)), load_judge(args.work / "judge.safetensors")
    albums = read_albums(subjects, dino, judge)
    rows: list[dict[str, Any]] = report["rows"]
    done = {row["subject"] for row in rows}
    for subject in subjects:
        if subject.name in done:
            continue
        folder = args.out / subject.name
        adapter = train_on(subject, args.base, settings, folder)
        draw_places(adapter, args.base, args.guidance_scale, folder / "images", compare=True)
        pictures = drawn(folder / "images")
        figures = measure(subject.name, albums, pictures["adapter"], dino, judge)
        figures["likeness_of_base"] = measure(subject.name, albums, pictures["base"], dino, judge)["likeness"]
        rows.append({"subject": subject.name} | figures)
        report["mean"] = mean_of(rows)
        write_measurements(path, report)
        print(json.dumps(rows[-1]))
    print("mean", json.dumps(report["mean"]))
    return 0


if __name__ == "__main__":
    run(main)
