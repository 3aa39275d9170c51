"""Score a folder of generated pictures against a folder of photos of the subject.

    python -m eval.score --images outputs/dog/images --photos photos_of_my_dog

Pictures that inference.py drew carry their prompts; for others give --prompt, or leave CLIP-T out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.prompts import without_words
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.models.loading import best_device, known_device
from gsoft_diffusion.photos.folder import list_images
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.pictures import read_facts
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders, load_encoders
from gsoft_diffusion.scoring.pictures import embed, picture_scores


def score_folder(
    images: str | Path,
    photos: str | Path,
    encoders: Encoders,
    prompt: str | None = None,
    unique_token: str | None = None,
) -> dict[str, Any]:
    """Scores of every picture and their means, with the encoders, as JSON values.

    images: folder of generated pictures; contact sheets and the base model's are left out. photos: folder of the
    subject's. encoders: what scores. prompt: what all pictures were asked to show; by default what each says.
    unique_token: left out of the captions; by default those that the pictures say their subjects have. Raises UserError
    for folders without pictures.
    """
    paths, prompts = [], []
    tokens = {unique_token} if unique_token else set()
    found = list_images(images, "--images")
    for path in found:
        if path.name.startswith("contact_sheet"):
            continue
        facts = read_facts(path)
        if facts.get("model") == "base":
            continue
        paths.append(path)
        prompts.append(prompt or facts.get("prompt"))
        if unique_token is None:
            tokens |= _tokens(facts)
    if not paths:
        raise UserError(f"--images {images}: holds nothing but contact sheets and the base model's pictures")
    captions = [without_words(text, tokens) for text in prompts if text]
    texts = encoders.clip.embed_texts(captions) if len(captions) == len(paths) else None
    real = embed(encoders, _open(list_images(photos, "--photos")))
    scores = picture_scores(embed(encoders, _open(paths)), real, texts)
    rows = [{"file": path.name, "prompt": text, **row} for path, text, row in zip(paths, prompts, scores, strict=True)]
    means = {name: metrics.mean([row[name] for row in scores]) for name in scores[0]}
    ceilings = {"clip_i": real.clip, "dino": real.dino} if len(real.clip) > 1 else {}
    return {
        "encoders": encoders.to_dict(),
        "mean": means,
        "photos": {name: metrics.real_photo_ceiling(embedded) for name, embedded in ceilings.items()},
        "captions": _captions_are(tokens) if texts is not None else None,
        "left_out": len(found) - len(paths),
        "pictures": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The means in words."""
    names = {
        "clip_i": "CLIP-I, similarity with the photos",
        "dino": "DINO, similarity with the photos",
        "clip_nearest": "CLIP-I with the nearest photo",
        "dino_nearest": "DINO with the nearest photo",
        "clip_t": "CLIP-T, similarity with the prompt",
    }
    lines = [f"{len(result['pictures'])} pictures"]
    for name, value in result["mean"].items():
        ceiling = result["photos"].get(name)
        lines.append(
            f"  {names[name]:38} {value:.3f}" + (f"   (the photos among each other {ceiling:.3f})" if ceiling else "")
        )
    if result["left_out"]:
        lines.append(f"  left out: {result['left_out']} contact sheets and pictures of the base model")
    if result["captions"] is None:
        lines.append("  no CLIP-T: the pictures carry no prompt; give --prompt")
    else:
        lines.append(f"  CLIP-T compares with {result['captions']}")
    return "\n".join(lines)


def _tokens(facts: dict[str, Any]) -> set[str]:
    """The unique tokens of the subjects in a picture's metadata."""
    subjects = facts.get("subjects")
    named = [subject for subject in subjects if isinstance(subject, dict)] if isinstance(subjects, list) else []
    return {token for subject in named if isinstance(token := subject.get("unique_token"), str) and token}


def _captions_are(tokens: set[str]) -> str:
    if tokens:
        return f"the prompts without {', '.join(sorted(tokens))}"
    return "the prompts as they are: no unique token is known, and --unique_token names none"


def _open(paths: Sequence[Path]) -> Iterable[Image.Image]:
    return (open_image(path) for path in paths)


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add `--clip`, `--dino` and `--device`, which `chosen_encoders` reads."""
    parser.add_argument(
        "--clip", default="auto", help="CLIP: a folder, or open_clip's model/tag (default: %(default)s)"
    )
    parser.add_argument("--dino", default="auto", help="DINO: a folder, or a name on the hub (default: %(default)s)")
    parser.add_argument("--device", default=best_device(), help="where models run (default: a GPU if there is one)")


def chosen_encoders(args: argparse.Namespace) -> Encoders:
    """The encoders that these options ask for, which are said. Raises UserError if they cannot be had."""
    encoders = load_encoders(args.clip, args.dino, known_device(args.device))
    print(f"encoders: {encoders}", flush=True)
    return encoders


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=expanded_path, required=True, help="folder of generated pictures")
    parser.add_argument("--photos", type=expanded_path, required=True, help="folder of photos of the subject")
    parser.add_argument("--prompt", help="what all pictures were asked to show")
    parser.add_argument(
        "--unique_token", help="left out of the captions (default: as inference.py noted in the pictures)"
    )
    parser.add_argument("--out", type=expanded_path, help="JSON file for the scores of every picture")
    add_encoder_options(parser)
    args = parser.parse_args()
    for folder, flag in ((args.images, "--images"), (args.photos, "--photos")):
        list_images(folder, flag)  # before encoders are fetched, which takes long
    with new_places("--out", *([args.out] if args.out else [])) as places:
        result = score_folder(args.images, args.photos, chosen_encoders(args), args.prompt, args.unique_token)
        for place in places:
            place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    run(main)
