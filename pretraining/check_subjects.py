"""Does a default run carry a subject into scenes? Train on every subject of a folder, draw, and let judges look.

    python -m pretraining.check_subjects --work <work folder> --base <pipeline folder> --subjects data/subjects \\
        --out <folder> [--set max_train_steps=400 --set learning_rate=2e-3]

For each subject: likeness (DINO's similarity of the drawn pictures to the photos, over that of the photos among each
other), the same for the base model's pictures, how often the second judge (`train_judge`) names class and place right,
and whether a picture is nearer to a photo than the photos are to each other. Adapters, pictures and contact sheets lie
in `<out>/<subject>`, the figures in `<out>/subjects.json`; subjects that are in it already are not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from eval.subjects import Subject, read_subjects
from gsoft_diffusion.config import GenerationConfig, TrainingConfig
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.run_folder import METADATA_KEY
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import draw
from gsoft_diffusion.scoring.encoders import load_dino
from gsoft_diffusion.scoring.metrics import cosines, image_similarity, nearest_photo, real_photo_ceiling
from gsoft_diffusion.training.train import train
from pretraining.train_judge import Judge, load_judge
from pretraining.train_vae import to_pixels
from pretraining.world import BACKGROUNDS

PLACES = ("snow", "beach", "city", "mountain", "space", "grass")
PICTURES = 2  # of each place


def train_on(subject: Subject, base: Path, settings: dict[str, Any], folder: Path) -> Path:
    """Train on the subject as a user would, but for `settings`; returns the adapter's file."""
    quiet = {"num_validation_images": 0, "report_to": "none", "checkpointing_steps": 0}
    values = {
        "instance_data_dir": str(subject.folder),
        "class_word": subject.class_word,
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder),
    }
    return train(TrainingConfig.from_dict(quiet | values | settings)).adapter


def draw_places(adapter: Path, base: Path, guidance: float | None, folder: Path, compare: bool = False) -> None:
    """Draw the subject in every place into a folder; compare: the base model's pictures as well."""
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


def closeness(pictures: Tensor, photos: Tensor) -> dict[str, float]:
    """How near pictures are to the photos, from the unit features (N, D) of both.

    Their likeness, as a share of the photos' own; the nearest pair of a picture and a photo, and of two photos; and the
    share of copies: pictures that are nearer to a photo than the photos are to each other.
    """
    nearest = nearest_photo(pictures, photos)
    among_photos = cosines(photos, photos).fill_diagonal_(-1).max()
    return {
        "likeness": float(image_similarity(pictures, photos).mean()) / real_photo_ceiling(photos),
        "nearest_photo": float(nearest.max()),
        "nearest_among_photos": float(among_photos),
        "copies": float((nearest > among_photos).float().mean()),
    }


def right(judge: Judge, word: str, pictures: Sequence[tuple[str, Image.Image]]) -> dict[str, float]:
    """How often the judge names the class and the place that were asked for."""
    answers = judge.answers(to_pixels(np.stack([np.asarray(image) for _, image in pictures])))
    places = [place == answer for (place, _), answer in zip(pictures, answers["background"], strict=True)]
    return {
        "class": float(np.mean([word == answer for answer in answers["class_word"]])),
        "place": float(np.mean(places)),
    }


def runs_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of what all runs on subjects need: judges, base, subjects, and where results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder, for the second judge")
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline to train on")
    parser.add_argument("--subjects", type=expanded_path, required=True, help="folder of subjects with subjects.csv")
    parser.add_argument("--dino", type=expanded_path, default="data/mini_dino", help="DINO whose features are compared")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write")
    return parser


def main() -> None:
    parser = runs_parser(__doc__)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training")
    parser.add_argument("--guidance_scale", type=float, help="of the pictures; by default as in training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "subjects.json"
    settings = {name: yaml.safe_load(value) for name, _, value in (item.partition("=") for item in args.set)}
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": settings, "subjects": {}}
    dino, judge = load_dino(str(args.dino)), load_judge(args.work / "judge.safetensors")
    for subject in read_subjects(args.subjects):
        if subject.name in report["subjects"]:
            continue
        folder = args.out / subject.name
        adapter = train_on(subject, args.base, settings, folder)
        draw_places(adapter, args.base, args.guidance_scale, folder / "images", compare=True)
        pictures = drawn(folder / "images")
        photos = dino.embed_images(map(open_image, subject.photos()))
        of_adapter, of_base = (
            dino.embed_images(image for _, image in pictures[model]) for model in ("adapter", "base")
        )
        row = closeness(of_adapter, photos) | right(judge, subject.class_word, pictures["adapter"])
        row["likeness_of_base"] = closeness(of_base, photos)["likeness"]
        report["subjects"][subject.name] = row
        rows = report["subjects"].values()
        report["mean"] = {name: float(np.mean([row[name] for row in rows])) for name in row}
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(subject.name, json.dumps(row))
    print("mean", json.dumps(report["mean"]))


if __name__ == "__main__":
    main()
