"""Cut-out pictures of the miniature world's things, read from an openly licensed emoji collection.

Fluent Emoji 3D (MIT), as packed in the npm package `@lobehub/fluent-emoji-3d`. `npm install --prefix <folder>
@lobehub/fluent-emoji-3d@1.1.0` puts it where `Sprites` reads. One collection, so that everything has one look.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gsoft_diffusion.config.command_line import expanded_path

SPRITE_SIZE = 64  # px; scenes draw things at 30-54 px, so this is sharp enough and cheap to turn and shrink

# class word -> code points of its sprites
ANIMALS: dict[str, list[str]] = {
    "dog": ["1f436", "1f415", "1f415-200d-1f9ba"],
    "cat": ["1f431", "1f408", "1f638", "1f63c"],
    "bear": ["1f43b", "1f43b-200d-2744-fe0f", "1f428"],
    "rabbit": ["1f430"],
    "fox": ["1f98a"],
    "owl": ["1f989"],
    "duck": ["1f986"],
    "penguin": ["1f427"],
    "turtle": ["1f422"],
    "fish": ["1f41f", "1f421", "1f988"],
    "butterfly": ["1f98b"],
    "frog": ["1f438"],
    "elephant": ["1f418"],
}
THINGS: dict[str, list[str]] = {
    "car": ["1f697", "1f6fb", "1f693", "1f698", "1f696", "1f694"],
    "bus": ["1f68c", "1f68d", "1f690"],
    "boat": ["26f5", "1f6e5-fe0f", "1f6a2", "26f4-fe0f"],
    "rocket": ["1f680"],
    "shoe": ["1f45e", "1f97e", "1f97f", "1f462", "1f460"],
    "clock": ["23f0", "23f1-fe0f", "1f552", "23f2-fe0f"],
    "book": ["1f4d5", "1f4d8", "1f4d9", "1f4d2", "1f4d4"],
    "flower": ["1f337", "1f339", "1f33b", "1f33c", "1f338"],
    "apple": ["1f34e", "1f34f"],
    "mug": ["2615", "1f375"],
    "hat": ["1f3a9", "1f452"],
    "guitar": ["1f3b8"],
    "umbrella": ["2602-fe0f", "2614"],
    "balloon": ["1f388"],
    "ball": ["26bd", "1f3c0", "1f3d0"],
    "backpack": ["1f392"],
    "glasses": ["1f576-fe0f", "1f453"],
    "mushroom": ["1f344"],
    "candle": ["1f56f-fe0f"],
    "cake": ["1f370", "1f382", "1f9c1"],
}
CLASSES = {**ANIMALS, **THINGS}

# things no training picture shows, while their class is known: the subjects of demo and benchmark
HELD_OUT: dict[str, tuple[str, str]] = {  # name -> (class word, code point)
    "poodle": ("dog", "1f429"),
    "black_cat": ("cat", "1f408-200d-2b1b"),
    "teddy_bear": ("bear", "1f9f8"),
    "blue_car": ("car", "1f699"),
    "running_shoe": ("shoe", "1f45f"),
    "tropical_fish": ("fish", "1f420"),
    "mantel_clock": ("clock", "1f570-fe0f"),
    "speedboat": ("boat", "1f6a4"),
    "green_book": ("book", "1f4d7"),
    "hibiscus": ("flower", "1f33a"),
}
# kept out as well: the subjects on which settings are chosen, none of which is shown
TUNING: dict[str, tuple[str, str]] = {
    "panda": ("bear", "1f43c"),
    "taxi": ("car", "1f695"),
    "roller_skate": ("shoe", "1f6fc"),
    "standing_rabbit": ("rabbit", "1f407"),
    "cap": ("hat", "1f9e2"),
}
TREES = ["1f332", "1f333"]
TOP_HAT = "1f3a9"


@dataclass(frozen=True)
class Sprite:
    """One thing: `rgba` is SPRITE_SIZE square, cropped to its outline and centred; `code` is its code point."""

    code: str
    rgba: Image.Image


def _fit(picture: Image.Image) -> Image.Image:
    """Crop to the visible part and centre it in a square of SPRITE_SIZE."""
    picture = picture.convert("RGBA")
    visible = Image.fromarray((np.asarray(picture)[..., 3] > 24).astype(np.uint8) * 255)
    picture = picture.crop(visible.getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


class Sprites:
    """Reads sprites by code point from the collection installed below `folder` by npm."""

    def __init__(self, folder: Path) -> None:
        self.assets = folder / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"

    def get(self, code: str) -> Sprite:
        """The sprite of one code point, with or without the emoji variation selector; FileNotFoundError if none."""
        for spelling in (code, code.replace("-fe0f", ""), f"{code}-fe0f"):
            path = self.assets / f"{spelling}.webp"
            if path.exists():
                return Sprite(code, _fit(Image.open(path)))
        raise FileNotFoundError(f"{self.assets} has no picture of {code}")


def sprites_folder(text: str) -> Path:
    """The type of an option that is the folder in which npm has installed the sprites."""
    folder = expanded_path(text)
    if not Sprites(folder).assets.is_dir():
        raise argparse.ArgumentTypeError(
            f"{folder}: npm has installed no sprites there; pretraining/sprites.py says how"
        )
    return folder


def add_sprites(parser: argparse.ArgumentParser) -> None:
    """Give a program the option `--sprites`."""
    parser.add_argument(
        "--sprites", type=sprites_folder, required=True, help="folder that npm installed the sprites in"
    )
