"""Photos from a folder, and which of them, cropped how and with what noise, each sample of a run is made of.

Nothing here depends on what was drawn before: sample number `p` of a run is a pure function of (seed, p). So a resumed
run continues exactly, and the batch size or the number of processes changes nothing but the grouping.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gsoft_diffusion.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif", ".bmp", ".tif", ".tiff"}
EXIF_ORIENTATION = 0x0112
ORDER, DRAWS, DROPOUT = range(3)  # what random numbers are for, so that none are used twice
CROPS = 5  # places along a photo's longer side that a random crop chooses from


# Files and pictures


def list_images(folder: str | Path, flag: str) -> tuple[list[Path], int]:
    """The folder's pictures in order of their names, and how many other files it holds.

    Raises UserError, naming `flag`, if there is no such folder or no picture in it.
    """
    folder = Path(folder)
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be read as a folder ({error.strerror})") from error
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not images:
        raise UserError(f"{flag} {folder}: holds no picture (known are {', '.join(sorted(IMAGE_SUFFIXES))})")
    return images, len(files) - len(images)


def open_image(path: Path) -> tuple[Image.Image, bool]:
    """The picture upright and in RGB, transparent parts white; and whether its EXIF data asked to turn it.

    Raises UserError naming the file if it is damaged, or so large that it may be an attack (Pillow's limit).
    """
    if path.suffix.lower() in (".heic", ".heif"):
        _enable_heic(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error, and enough
            with Image.open(path) as image:
                turned = image.getexif().get(EXIF_ORIENTATION, 1) != 1
                return _to_rgb(ImageOps.exif_transpose(image)), turned
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too large a picture, make it smaller ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise for damaged files
        raise UserError(f"{path}: damaged or not a picture; repair or remove it ({error})") from error


def _enable_heic(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{path}: reading HEIC needs a library: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Variant:
    """One way of making a square out of a photo.

    place: where along the longer side, 0 (left or top) to 1.
    flip: mirrored left to right.
    """

    place: float = 0.5
    flip: bool = False


def variants(size: tuple[int, int], center_crop: bool, random_flip: bool) -> list[Variant]:
    """All the ways in which augmentation may show a photo of this size: finitely many, so that all can be cached."""
    places = [0.5] if center_crop or size[0] == size[1] else [index / (CROPS - 1) for index in range(CROPS)]
    return [Variant(place, flip) for place in places for flip in ((False, True) if random_flip else (False,))]


def square(image: Image.Image, resolution: int, variant: Variant) -> Tensor:
    """The photo's largest square at the variant's place: (3, resolution, resolution) in [-1, 1]."""
    side = min(image.size)
    left, top = (variant.place * (length - side) for length in image.size)
    box = (left, top, left + side, top + side)
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    if variant.flip:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Photos:
    """The pictures of one folder that share a prompt, each in all its variants.

    paths: the files, in order. skipped, turned: how many files were no pictures, how many pictures EXIF turned.
    moments: after `cache`, for each photo and variant what the VAE's encoder says, (2·C, h, w).
    """

    def __init__(
        self,
        folder: str | Path,
        flag: str,
        center_crop: bool = False,
        random_flip: bool = False,
        *,
        limit: int | None = None,
    ) -> None:
        """flag: the option that named the folder, for error messages. limit: use only so many pictures."""
        self.paths, self.skipped = list_images(folder, flag)
        self.paths = self.paths[:limit]
        self.turned = 0
        self.variants: list[list[Variant]] = []
        self.moments: list[list[Tensor]] | None = None
        for path in self.paths:  # reads every file once, so that a damaged one is found now and not an hour later
            image, turned = open_image(path)
            self.turned += turned
            self.variants.append(variants(image.size, center_crop, random_flip))

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, index: int, variant: int, resolution: int) -> Tensor:
        """Photo `index` in one of its variants, (3, resolution, resolution) in [-1, 1]."""
        image, _ = open_image(self.paths[index])
        return square(image, resolution, self.variants[index][variant])

    def cache(self, encode_images: Callable[[Tensor], Tensor], resolution: int) -> None:
        """Encode every variant of every photo; `encode_images` is `Models.encode_images`."""
        self.moments = []
        for index, path in enumerate(self.paths):
            image, _ = open_image(path)
            pixels = (square(image, resolution, variant) for variant in self.variants[index])
            self.moments.append([encode_images(picture[None])[0].cpu() for picture in pixels])


# Samples of a run


def derived_seed(*key: int) -> int:
    """A seed of 64 bits that depends on nothing but the key, and is unrelated for keys that differ."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator_for(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*key))


@lru_cache(maxsize=4)
def _order(seed: int, stream: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator_for(seed, ORDER, stream, epoch)).tolist()


class DreamBoothDataset(Dataset[dict[str, Tensor]]):
    """Sample `p` of the run, for `p` = 0, 1, 2, …: a photo of the subject, or one of the class if `p` is odd.

    Without class photos every sample is the subject's. Each sample is a dict of
    `moments` (2·C, h, w) if latents are cached, else `pixels` (3, H, W) in [-1, 1];
    `latent_noise` and `noise` (C, h, w): what draws the latents, and what diffusion adds; `offset` (C, 1, 1);
    `timestep` (); `is_prior` (), bool.
    """

    def __init__(
        self,
        instance: Photos,
        prior: Photos | None,
        *,
        resolution: int,
        latent_shape: Sequence[int],
        num_timesteps: int,
        seed: int,
    ) -> None:
        self.sources = [instance] if prior is None else [instance, prior]
        self.resolution = resolution
        self.latent_shape = tuple(latent_shape)
        self.num_timesteps = num_timesteps
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        number, stream = divmod(position, len(self.sources))
        photos = self.sources[stream]
        epoch, place = divmod(number, len(photos))
        index = _order(self.seed, stream, epoch, len(photos))[place]
        generator = generator_for(self.seed, DRAWS, stream, number)
        variant = int(torch.randint(len(photos.variants[index]), (), generator=generator))
        channels = self.latent_shape[0]
        picture = (
            {"pixels": photos.pixels(index, variant, self.resolution)}
            if photos.moments is None
            else {"moments": photos.moments[index][variant]}
        )
        return picture | {
            "latent_noise": torch.randn(self.latent_shape, generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "offset": torch.randn((channels, 1, 1), generator=generator),
            "timestep": torch.randint(self.num_timesteps, (), generator=generator),
            "is_prior": torch.tensor(stream == 1),
        }


class BatchPositions(Sampler[list[int]]):
    """The positions of this process's batches, from the `first` batch of the run to the last.

    A batch takes the next `batch_size · num_processes` positions of the run, and each process its share.
    """

    def __init__(
        self, first: int, last: int, batch_size: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self.batches = range(first, last)
        self.batch_size = batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(start, start + self.batch_size))
