"""Draw subjects, things that the base has never seen: five scenes each, and `subjects.csv` with their words.

python -m pretraining.subjects --sprites <npm folder> --out data/subjects
python -m pretraining.subjects --sprites <npm folder> --which tuning --out <work folder>/tuning
"""

from __future__ import annotations

import argparse
import csv

import numpy as np
from PIL import Image

from gsoft_diffusion.config.command_line import expanded_path
from pretraining.sprites import ANIMALS, Sprite, add_sprites
from pretraining.world import BACKGROUNDS, World

PICTURES = 5


def photo(world: World, rng: np.random.Generator, sprite: Sprite, place: str) -> Image.Image:
    """A picture of a subject in one of the `BACKGROUNDS`."""
    return Image.fromarray(world.draw(rng, sprite, place, size=(38, 54)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sprites(parser)
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to fill, one subfolder per subject")
    parser.add_argument(
        "--which", choices=("demo", "tuning"), default="demo", help="those shown, or those that settings are chosen on"
    )
    args = parser.parse_args()
    world = World(args.sprites)
    rows = []
    subjects = world.held_out if args.which == "demo" else world.tuning
    for number, (name, (word, sprite)) in enumerate(subjects.items()):
        rng = np.random.default_rng(100 + number)
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, place in enumerate(rng.permutation(list(BACKGROUNDS))[:PICTURES]):
            photo(world, rng, sprite, str(place)).save(folder / f"{i:02d}.png")
        rows.append({"subject": name, "class_word": word, "kind": "live" if word in ANIMALS else "object"})
    with (args.out / "subjects.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["subject", "class_word", "kind"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
