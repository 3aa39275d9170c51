"""What would new photos of the demo subjects score? They are the reference for what `check_subjects` measures.

    python -m pretraining.check_new_photos --sprites <npm folder> --work <work folder> --subjects data/subjects \\
        --out docs/mini_base/new_photos.json

Each subject is drawn as for its photos, in the places that none of these shows, and measured as what an adapter draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from eval.subjects import read_subjects
from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.scoring.encoders import load_dino
from pretraining.check_subjects import mean_of, measure, read_albums
from pretraining.sprites import Sprite, add_sprites
from pretraining.subjects import photo
from pretraining.train_judge import load_judge
from pretraining.world import BACKGROUNDS, World

PICTURES = 8  # in each place


def new_photos(world: World, sprite: Sprite, shown: Sequence[str], seed: int) -> list[tuple[str, Image.Image]]:
    """(place, picture) of a subject, in every place that is not in `shown`."""
    rng = np.random.default_rng(seed)
    places = [place for place in BACKGROUNDS if place not in shown for _ in range(PICTURES)]
    return [(place, photo(world, rng, sprite, place)) for place in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sprites(parser)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder, for the second judge")
    parser.add_argument("--subjects", type=expanded_path, required=True, help="folder of the demo subjects")
    parser.add_argument("--dino", type=expanded_path, default="data/mini_dino", help="DINO whose features are compared")
    parser.add_argument("--out", type=expanded_path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the slow work, not after it
    dino, judge = load_dino(str(args.dino)), load_judge(args.work / "judge.safetensors")
    world = World(args.sprites)
    albums = read_albums(read_subjects(args.subjects), dino, judge)
    rows = []
    for number, (name, (_, sprite)) in enumerate(world.held_out.items()):
        pictures = new_photos(world, sprite, sorted(albums[name].places), number)
        rows.append({"subject": name} | measure(name, albums, pictures, dino, judge))
        print(json.dumps(rows[-1]), flush=True)
    mean = mean_of(rows)
    args.out.write_text(json.dumps({"pictures_of_a_place": PICTURES, "rows": rows, "mean": mean}, indent=1) + "\n")
    print("mean", json.dumps(mean))


if __name__ == "__main__":
    main()
