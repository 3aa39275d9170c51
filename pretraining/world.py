"""The miniature world: captioned 64 px scenes of one thing somewhere, drawn as fast as a model can eat them.

A scene is a sprite (turned, flipped, sometimes recoloured, sometimes wearing a hat or standing next to a tree) in
front of one of the `BACKGROUNDS`; its caption comes from a small grammar in the words of the DreamBooth prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pretraining.sprites import ANIMALS, CLASSES, HELD_OUT, SPRITE_SIZE, TOP_HAT, TREES, TUNING, Sprite, Sprites

SIZE = 64  # px, side of a scene
_CANVAS = 80  # px, side of a stored background: scenes are random SIZE crops of it
UNKNOWN_NAME_LETTERS = "bcdfghjklmnpqrtvwxz"  # of names that captions put before class words
_VARIANTS = 160  # drawings kept of every background
COLORED = 0.12  # share of scenes whose thing has another colour

COLORS = {
    "red": (226, 38, 42),
    "orange": (250, 140, 30),
    "yellow": (250, 216, 50),
    "green": (52, 170, 60),
    "blue": (40, 96, 225),
    "purple": (140, 62, 190),
    "pink": (245, 120, 180),
    "black": (28, 28, 32),
    "white": (246, 246, 246),
}

BACKGROUNDS = {
    "snow": ["in the snow"],
    "beach": ["on the beach"],
    "jungle": ["in the jungle"],
    "wooden floor": ["on top of a wooden floor", "on a wooden floor"],
    "brick wall": ["in front of a brick wall", "with a brick wall in the background"],
    "city": ["in a city at night", "with a city in the background"],
    "mountain": ["with a mountain in the background", "in the mountains"],
    "water": ["in the water", "floating on top of water"],
    "grass": ["on green grass", "in a field of grass"],
    "desert": ["in the desert"],
    "leaves": ["on autumn leaves", "on top of autumn leaves"],
    "cobblestone": ["on a cobblestone street"],
    "space": ["in space"],
}


@dataclass(frozen=True)
class Scene:
    """One drawn scene and everything that is true of it."""

    image: np.ndarray  # (SIZE, SIZE, 3) uint8
    caption: str
    class_word: str
    background: str  # a key of BACKGROUNDS or of COLORS
    color: str | None  # what the thing was recoloured to
    sprite: str


def article(words: str) -> str:
    """`words` with its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Backgrounds, drawn at twice the stored size

_DRAW = 2 * _CANVAS


def _noise(rng: np.random.Generator, cells: int, side: int = _DRAW) -> np.ndarray:
    """Smooth noise in [0, 1], (side, side), with about `cells` bumps across."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255


def _blend(low: tuple[int, int, int], high: tuple[int, int, int], mix: np.ndarray) -> np.ndarray:
    """Colours between `low` and `high`, (H, W, 3), by a map (H, W) in [0, 1]."""
    return np.asarray(low, np.float32) + (np.asarray(high, np.float32) - low) * mix[..., None]


def _ramp() -> np.ndarray:
    return np.repeat(np.linspace(0, 1, _DRAW, dtype=np.float32)[:, None], _DRAW, 1)


def _sky(low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    return _blend(high, low, _ramp())


def _to_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def _horizon(rng: np.random.Generator, sky: np.ndarray, ground: np.ndarray, low: float, high: float) -> np.ndarray:
    """`sky` above a gently waved line at a height between `low` and `high` of the picture, `ground` below it."""
    x = np.arange(_DRAW)
    line = rng.uniform(low, high) * _DRAW + rng.uniform(0, 6) * np.sin(x / rng.uniform(18, 40) + rng.uniform(0, 6))
    return np.where((np.arange(_DRAW)[:, None] > line)[..., None], ground, sky)


def _dots(
    rng: np.random.Generator, picture: Image.Image, n: int, size: tuple[float, float], colors: list
) -> Image.Image:
    draw = ImageDraw.Draw(picture)
    for x, y in rng.uniform(0, _DRAW, (n, 2)):
        r = rng.uniform(*size)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colors[rng.integers(len(colors))])
    return picture


def _leaf_litter(
    rng: np.random.Generator, ground: tuple[int, int, int], colors: list, n: int, long: float
) -> Image.Image:
    picture = Image.new("RGB", (_DRAW, _DRAW), ground)
    draw = ImageDraw.Draw(picture)
    for x, y in rng.uniform(0, _DRAW, (n, 2)):
        a, size = rng.uniform(0, np.pi), rng.uniform(9, 16)
        u, v = size * long * np.array([np.cos(a), np.sin(a)]), size * 0.42 * np.array([-np.sin(a), np.cos(a)])
        shade = rng.uniform(0.65, 1.15)
        color = tuple(int(min(255, c * shade)) for c in colors[rng.integers(len(colors))])
        draw.polygon([tuple(np.array([x, y]) + d) for d in (u, v, -u, -v)], fill=color)
    return picture


def _snow(rng: np.random.Generator) -> Image.Image:
    ground = _blend((214, 226, 242), (252, 254, 255), _noise(rng, 5))
    sky = _sky((226, 238, 250), (150, 188, 228))
    return _dots(rng, _to_image(_horizon(rng, sky, ground, 0.35, 0.55)), 70, (1, 2.6), [(255, 255, 255)])


def _beach(rng: np.random.Generator) -> Image.Image:
    sand = _blend((228, 190, 128), (250, 222, 166), _noise(rng, 9))
    sea = _blend((20, 130, 190), (60, 190, 215), _ramp())
    sky = _sky((200, 236, 252), (96, 186, 246))
    top = rng.uniform(0.28, 0.4)
    water = np.where((np.arange(_DRAW)[:, None] > top * _DRAW)[..., None], sea, sky)
    return _to_image(_horizon(rng, water, sand, top + 0.14, top + 0.26))


def _jungle(rng: np.random.Generator) -> Image.Image:
    return _leaf_litter(rng, (10, 46, 18), [(24, 110, 40), (14, 82, 30), (60, 150, 52), (30, 130, 70)], 130, 1.9)


def _wooden_floor(rng: np.random.Generator) -> Image.Image:
    y = np.arange(_DRAW)
    plank = y // int(rng.integers(22, 30))
    shade = rng.uniform(0.75, 1.1, plank.max() + 1)[plank]
    grain = np.asarray(Image.fromarray((rng.random((60, 4)) * 255).astype(np.uint8)).resize((_DRAW, _DRAW))) / 255
    wood = _blend((150, 92, 48), (204, 140, 84), grain.astype(np.float32)) * shade[:, None, None]
    wood[np.r_[True, np.diff(plank) > 0] | np.r_[np.diff(plank) > 0, True]] *= 0.5
    return _to_image(wood)


def _brick_wall(rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (_DRAW, _DRAW), (206, 196, 186))
    draw = ImageDraw.Draw(picture)
    height, width = int(rng.integers(14, 18)), int(rng.integers(32, 40))
    for row in range(_DRAW // height + 1):
        for col in range(-1, _DRAW // width + 1):
            x, y, s = col * width + (row % 2) * width // 2, row * height, rng.uniform(0.8, 1.1)
            draw.rectangle((x, y, x + width - 4, y + height - 4), fill=(int(184 * s), int(78 * s), int(58 * s)))
    return picture


def _city(rng: np.random.Generator) -> Image.Image:
    picture = _to_image(_sky((58, 44, 110), (14, 14, 46)))
    draw = ImageDraw.Draw(picture)
    x = -4
    while x < _DRAW:
        w, top = int(rng.integers(20, 34)), int(rng.uniform(0.12, 0.5) * _DRAW)
        draw.rectangle((x, top, x + w - 3, _DRAW), fill=(20, 20, 36) if rng.random() < 0.5 else (34, 32, 56))
        for wy in range(top + 6, _DRAW, 11):
            for wx in range(x + 4, x + w - 8, 8):
                if rng.random() < 0.5:
                    draw.rectangle((wx, wy, wx + 3, wy + 5), fill=(255, 214, 96))
        x += w
    return picture


def _mountain(rng: np.random.Generator) -> Image.Image:
    picture = _to_image(_sky((196, 220, 242), (104, 156, 214)))
    draw = ImageDraw.Draw(picture)
    for _ in range(3):
        x, top, w = rng.uniform(0, _DRAW), rng.uniform(0.08, 0.3) * _DRAW, rng.uniform(0.4, 0.6) * _DRAW
        base = 0.72 * _DRAW
        draw.polygon([(x - w, base), (x, top), (x + w, base)], fill=(112, 118, 132))
        draw.polygon(
            [(x - w * 0.3, top + 0.3 * (base - top)), (x, top), (x + w * 0.3, top + 0.3 * (base - top))],
            fill=(248, 250, 255),
        )
    meadow = _blend((74, 112, 66), (110, 150, 84), _noise(rng, 8))
    return _to_image(_horizon(rng, np.asarray(picture, np.float32), meadow, 0.64, 0.72))


def _water(rng: np.random.Generator) -> Image.Image:
    picture = _to_image(_blend((22, 92, 178), (44, 132, 214), _noise(rng, 7)))
    draw = ImageDraw.Draw(picture)
    for x, y in rng.uniform(-10, _DRAW, (34, 2)):
        w = rng.uniform(8, 20)
        draw.arc((x, y, x + w, y + w * 0.5), 180, 360, fill=(168, 222, 248), width=3)
    return picture


def _grass(rng: np.random.Generator) -> Image.Image:
    ground = _to_image(_blend((62, 150, 44), (116, 196, 70), _noise(rng, 12)))
    draw = ImageDraw.Draw(ground)
    for x, y in rng.uniform(0, _DRAW, (150, 2)):
        draw.line((x, y, x + rng.uniform(-3, 3), y - rng.uniform(6, 11)), fill=(44, 128, 36), width=2)
    sky = _sky((206, 236, 252), (110, 190, 246))
    return _to_image(_horizon(rng, sky, np.asarray(ground, np.float32), 0.22, 0.36))


def _desert(rng: np.random.Generator) -> Image.Image:
    x, y = np.meshgrid(np.arange(_DRAW), np.arange(_DRAW))
    dunes = np.sin((y + 12 * np.sin(x / rng.uniform(20, 30) + rng.uniform(0, 6))) / rng.uniform(6, 8)) * 0.5 + 0.5
    sand = _blend((206, 132, 62), (240, 178, 98), dunes.astype(np.float32))
    sky = _sky((255, 226, 170), (250, 190, 110))
    return _to_image(_horizon(rng, sky, sand, 0.25, 0.42))


def _leaves(rng: np.random.Generator) -> Image.Image:
    return _leaf_litter(rng, (104, 58, 24), [(214, 96, 26), (190, 50, 28), (228, 160, 40), (150, 74, 30)], 170, 1.1)


def _cobblestone(rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (_DRAW, _DRAW), (58, 58, 60))
    draw = ImageDraw.Draw(picture)
    step = int(rng.integers(19, 24))
    for row in range(-1, _DRAW // step + 1):
        for col in range(-1, _DRAW // step + 2):
            x, y = col * step + (row % 2) * step // 2, row * step
            v = int(rng.integers(118, 186))
            draw.rounded_rectangle((x + 1, y + 1, x + step - 3, y + step - 3), 7, fill=(v, v, min(255, v + 4)))
    return picture


def _space(rng: np.random.Generator) -> Image.Image:
    nebula = _blend((6, 5, 18), (62, 22, 88), np.clip(_noise(rng, 4) * 1.6 - 0.75, 0, 1))
    return _dots(rng, _to_image(nebula), 75, (0.8, 2.2), [(255, 255, 255), (200, 214, 255)])


_PAINTERS = {
    "snow": _snow,
    "beach": _beach,
    "jungle": _jungle,
    "wooden floor": _wooden_floor,
    "brick wall": _brick_wall,
    "city": _city,
    "mountain": _mountain,
    "water": _water,
    "grass": _grass,
    "desert": _desert,
    "leaves": _leaves,
    "cobblestone": _cobblestone,
    "space": _space,
}


# Things in another colour


_TO_LMS = np.array(
    [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
)
_TO_OKLAB = np.array(
    [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
)


def _to_oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to Oklab (Ottosson 2020), the last axis being the channels: lightness in [0, 1], then a and b."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_OKLAB.T


def _from_oklab(lab: np.ndarray) -> np.ndarray:
    """The inverse of `_to_oklab`; what no screen can show is clipped."""
    linear = ((lab @ np.linalg.inv(_TO_OKLAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _clusters(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means: centres (count, 3), and the share of the points that each has."""
    centres = points[np.argsort(points[:, 0])[np.linspace(0, len(points) - 1, count).astype(int)]]
    for _ in range(12):
        nearest = ((points[:, None] - centres) ** 2).sum(-1).argmin(1)
        centres = np.stack([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(count)])
    return centres, np.bincount(nearest, minlength=count) / len(points)


def _recolored(sprite: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The thing in another colour. What was of its main colours takes the new one and keeps its light and shade;
    eyes, windows, wheels and the like stay as they are.
    """
    rgba = np.asarray(sprite, np.float32) / 255
    lab, visible = _to_oklab(rgba[..., :3]), rgba[..., 3] > 0.25
    points = lab * (0.4, 1, 1)  # shading matters less than hue
    centres, shares = _clusters(points[visible], 5)
    order = sorted(range(len(shares)), key=lambda i: (centres[i, 0] < 0.4 * 0.35, -shares[i]))  # dark parts last
    main: list[int] = []
    while shares[main].sum() < 0.7:
        main.append(order[len(main)])
    distances = ((points[..., None, :] - centres) ** 2).sum(-1)
    closeness = np.exp((distances.min(-1, keepdims=True) - distances) / 0.05**2)
    weight = (closeness[..., main].sum(-1) / closeness.sum(-1))[..., None]
    target = _to_oklab(np.asarray(color, np.float32) / 255)
    middle = (centres[main, 0] * shares[main]).sum() / shares[main].sum() / 0.4
    lightness = target[0] + 0.7 * (lab[..., :1] - middle)
    new = np.concatenate([lightness.clip(0.05, 1), np.broadcast_to(target[1:], (*lab.shape[:2], 2))], -1)
    mixed = _from_oklab(weight * new + (1 - weight) * lab)
    return Image.fromarray((np.concatenate([mixed, rgba[..., 3:]], -1) * 255).round().astype(np.uint8), "RGBA")


def _posed(thing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The thing turned by up to 15°, leaned and squeezed a little, about its middle and in its own frame."""
    angle = np.deg2rad(rng.uniform(-15, 15))
    lean, squeeze = rng.uniform(-0.12, 0.12), np.exp(rng.uniform(-0.14, 0.14))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    back = np.diag([squeeze, 1 / squeeze]) @ np.array([[1, lean], [0, 1]]) @ turn  # from the picture to the thing
    middle = np.array(thing.size) / 2
    (a, b), (d, e) = back * 1.06  # a little smaller, so that corners stay inside
    c, f = middle - 1.06 * back @ middle
    return thing.transform(thing.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)


class World:
    """Draws scenes.

    folder: holds the npm packages that `Sprites` reads. seed: of the backgrounds. subjects: whether `sample` draws the
    things that are kept out as well, for a judge that must know them.
    """

    def __init__(self, folder: Path, seed: int = 0, subjects: bool = False) -> None:
        sprites = Sprites(folder)
        self.classes: dict[str, list[Sprite]] = {
            word: [sprites.get(code) for code in codes] for word, codes in CLASSES.items()
        }
        self.held_out, self.tuning = (
            {name: (word, sprites.get(code)) for name, (word, code) in kept_out.items()}
            for kept_out in (HELD_OUT, TUNING)
        )
        if subjects:
            for word, sprite in (*self.held_out.values(), *self.tuning.values()):
                self.classes[word].append(sprite)
        self.trees = [sprites.get(code) for code in TREES]
        self.hat = sprites.get(TOP_HAT).rgba
        self._in_colors: dict[tuple[str, str], Image.Image] = {}
        rng = np.random.default_rng(seed)
        self.backgrounds = {
            name: [paint(rng).resize((_CANVAS, _CANVAS), Image.Resampling.BOX) for _ in range(_VARIANTS)]
            for name, paint in _PAINTERS.items()
        }

    def background(self, rng: np.random.Generator, name: str) -> Image.Image:
        """A SIZE×SIZE picture of the named background or plain colour, a little brighter or darker at random."""
        if name in COLORS:
            top = np.asarray(COLORS[name], np.float32)
            picture = _to_image(_blend(tuple(top), tuple(top * 0.8), _ramp()[::2, ::2]))
        else:
            picture = self.backgrounds[name][rng.integers(_VARIANTS)]
        x, y = rng.integers(0, _CANVAS - SIZE + 1, 2)
        picture = picture.crop((x, y, x + SIZE, y + SIZE))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        brightness = rng.uniform(0.88, 1.1)
        return picture.point(lambda v: min(255, int(v * brightness)))

    def draw(
        self,
        rng: np.random.Generator,
        sprite: Sprite,
        background: str,
        *,
        color: str | None = None,
        hat: bool = False,
        tree: bool = False,
        size: tuple[int, int] = (40, 54),
    ) -> np.ndarray:
        """One scene, (SIZE, SIZE, 3) uint8; the thing's longer side is `size` px."""
        scene = self.background(rng, background)
        thing = sprite.rgba
        if color:
            thing = self._in_color(sprite, color)
        if rng.random() < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = int(rng.integers(size[0], size[1] + 1))
        if hat:
            side = min(side, 44)
            thing = self._with_hat(thing)
        if tree:
            side = min(side, 38)
            other = self.trees[rng.integers(len(self.trees))].rgba.resize((46, 46), Image.Resampling.LANCZOS)
        # premultiplied alpha, so that turning and shrinking leave no dark fringe
        thing = _posed(thing.convert("RGBa"), rng)
        thing = thing.resize(
            (side, side * thing.height // thing.width), Image.Resampling.BOX if side < 40 else Image.Resampling.BILINEAR
        )
        thing = thing.convert("RGBA")
        free_x, free_y = (SIZE - side) / 2, (SIZE - thing.height) / 2
        if tree:
            left = rng.random() < 0.5
            scene.paste(other, ((-6 if left else 24), int(rng.integers(4, 12))), other)
            x = (SIZE - side - rng.integers(0, 3)) if left else int(rng.integers(0, 3))
            y = int(free_y + rng.uniform(0.2, 0.8) * free_y)
        else:
            x = int(free_x + rng.uniform(-0.6, 0.6) * free_x)
            y = int(free_y + rng.uniform(-0.3, 0.7) * max(free_y, 0))
        scene.paste(thing, (int(x), y), thing)
        return np.asarray(scene)

    def _in_color(self, sprite: Sprite, color: str) -> Image.Image:
        key = sprite.code, color
        if key not in self._in_colors:
            self._in_colors[key] = _recolored(sprite.rgba, COLORS[color])
        return self._in_colors[key]

    def _with_hat(self, thing: Image.Image) -> Image.Image:
        """A top hat on the highest part of the thing: (SPRITE_SIZE, 1.35·SPRITE_SIZE), the thing at the bottom."""
        room = int(0.35 * SPRITE_SIZE)
        visible = np.asarray(thing)[..., 3] > 60
        top = np.argmax(visible.any(1))
        head = np.flatnonzero(visible[top : top + 8].any(0))
        side = SPRITE_SIZE // 2
        tall = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE + room))
        tall.paste(thing, (0, room))
        hat = self.hat.resize((side, side), Image.Resampling.LANCZOS)
        x = int(np.clip(head.mean() - side / 2, 0, SPRITE_SIZE - side))
        tall.alpha_composite(hat, (x, max(0, room + int(top) - int(side * 0.78))))
        return tall

    def sample(self, rng: np.random.Generator, colored: float = COLORED) -> Scene:
        """A random scene with its caption; the thing is recoloured with probability `colored`."""
        word = str(rng.choice(list(self.classes)))
        sprite = self.classes[word][rng.integers(len(self.classes[word]))]
        background = str(rng.choice(list(COLORS))) if rng.random() < 0.15 else str(rng.choice(list(BACKGROUNDS)))
        color = str(rng.choice(list(COLORS))) if rng.random() < colored else None
        hat = word in ANIMALS and rng.random() < 0.08
        tree = not hat and rng.random() < 0.05
        image = self.draw(rng, sprite, background, color=color, hat=hat, tree=tree)
        return Scene(image, caption(rng, word, background, color, hat, tree), word, background, color, sprite.code)


def caption(
    rng: np.random.Generator, word: str, background: str, color: str | None, hat: bool = False, tree: bool = False
) -> str:
    """The words for a scene; now and then they leave out where it is."""
    thing = article(f"{color} {word}" if color else word)
    if (
        rng.random() < 0.04
    ):  # a name nobody knows, so that one in a prompt is passed over as it is by a model of the web
        thing = article(f"{_unknown_name(rng)} {color + ' ' if color else ''}{word}")
    if hat:
        thing += " wearing a hat"
    if tree:
        thing += " next to a tree"
    if rng.random() < 0.92:
        if background in COLORS:
            thing += f" on {article(background)} background"
        else:
            phrases = BACKGROUNDS[background]
            thing += " " + phrases[rng.integers(len(phrases))]
    return f"a photo of {thing}" if rng.random() < 0.5 else thing


def _unknown_name(rng: np.random.Generator) -> str:
    """Two to four letters without a vowel; never "sks", which stays unseen for DreamBooth to claim."""
    letters = "".join(rng.choice(list(UNKNOWN_NAME_LETTERS), rng.integers(2, 5)))
    return str(letters)
