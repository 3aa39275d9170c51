"""How well the miniature encoders rank pictures, on subjects and scenes that they have not seen.

    python -m pretraining.check_encoders --clip data/mini_clip --dino data/mini_dino --work <work folder> --out <file>
        [--photos <folder in the public DreamBooth layout>]

For each encoder: how often a demo subject's nearest other picture is of the same subject; how often a scene's nearest
other scene is of the same class; and, on real photos, mean similarity within a subject, between subjects of one class,
and between classes, which should fall in this order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.subjects import Subject, read_subjects
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.scoring.encoders import ImageEncoder, load_encoders
from gsoft_diffusion.scoring.metrics import cosines

SCENES = 2048  # the first ones, which no training has seen


def retrieval(embeddings: Tensor, labels: Sequence[Any]) -> float:
    """Share of pictures whose nearest other picture has the same label."""
    similarity = cosines(embeddings, embeddings).fill_diagonal_(-2)
    nearest = similarity.argmax(dim=1).tolist()
    return float(np.mean([labels[other] == label for other, label in zip(nearest, labels, strict=True)]))


def ranks(embeddings: Tensor, subjects: Sequence[Subject]) -> dict[str, float]:
    """Mean similarity of different pictures: of one subject, of two subjects of one class, of two classes."""
    similarity = cosines(embeddings, embeddings)
    names = np.array([subject.name for subject in subjects])
    words = np.array([subject.class_word for subject in subjects])
    same_subject = torch.from_numpy(names[:, None] == names).fill_diagonal_(False)
    same_class = torch.from_numpy((words[:, None] == words) & (names[:, None] != names))
    other_class = torch.from_numpy(words[:, None] != words)
    groups = {"same_subject": same_subject, "same_class": same_class, "other_class": other_class}
    return {name: similarity[group].mean().item() for name, group in groups.items() if group.any()}


def embed_subjects(encoder: ImageEncoder, folder: Path) -> tuple[Tensor, list[Subject]]:
    """Embeddings of all photos of all subjects, and whose each is."""
    pairs = [(path, subject) for subject in read_subjects(folder) for path in subject.photos()]
    return encoder.embed_images(open_image(path) for path, _ in pairs), [subject for _, subject in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder of the miniature CLIP")
    parser.add_argument("--dino", required=True, help="folder of the miniature DINO")
    parser.add_argument(
        "--work", type=expanded_path, required=True, help="work folder of the pretraining, for its scenes"
    )
    parser.add_argument("--subjects", type=expanded_path, default=Path("data/subjects"), help="held-out subjects")
    parser.add_argument("--photos", type=expanded_path, help="real photos in the public DreamBooth layout")
    parser.add_argument("--out", type=expanded_path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the slow work, not after it
    encoders = load_encoders(args.clip, args.dino)
    scenes = [Image.fromarray(scene) for scene in np.load(args.work / "scenes.npy", mmap_mode="r")[:SCENES]]
    facts = [json.loads(line) for _, line in zip(scenes, (args.work / "scenes.jsonl").open(), strict=False)]
    report: dict[str, Any] = {}
    for name, encoder in (("clip", encoders.clip), ("dino", encoders.dino)):
        embeddings, subjects = embed_subjects(encoder, args.subjects)
        drawn = encoder.embed_images(scenes)
        found: dict[str, Any] = {
            "encoder": encoder.identity.to_dict(),
            "subject_retrieval": retrieval(embeddings, [subject.name for subject in subjects]),
            "scene_class_retrieval": retrieval(drawn, [fact["class_word"] for fact in facts]),
            "demo_subjects": ranks(embeddings, subjects),
        }
        if args.photos:
            found["real_photos"] = ranks(*embed_subjects(encoder, args.photos))
        report[name] = found
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
