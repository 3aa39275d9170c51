"""The photo, its crop and the noise of each sample of a run.

Nothing here depends on what was drawn before: sample number `p` of a run is a pure function of (seed, p), and of the
batch size where photos come in several sizes. So a resumed run continues exactly, and the number of processes changes
nothing but the grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from tqdm.auto import tqdm

from gsoft_diffusion.photos.crops import Variant, nearest_size, pixels, subject_weights, variants, view
from gsoft_diffusion.photos.folder import Photo, Size

ORDER, DRAWS, DROPOUT, SIZES, FIRST_VALUES = range(5)  # what random numbers are for, so that none are used twice


def derived_seed(*key: int) -> int:
    """A seed of 64 bits that depends only on the key, and is unrelated for different keys."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator_for(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*key))


@lru_cache(maxsize=64)
def shuffled(count: int, *key: int) -> list[int]:
    """The numbers below `count` in an order that depends only on the key."""
    return torch.randperm(count, generator=generator_for(*key)).tolist()


@dataclass(frozen=True)
class ViewSettings:
    """How photos are shown.

    sizes: latent shape (C, h, w) of each size in pixels that there may be; each photo takes the nearest.
    center_crop, random_flip, unmasked_weight: as in `TrainingConfig`.
    """

    sizes: Mapping[Size, tuple[int, ...]]
    center_crop: bool = False
    random_flip: bool = False
    unmasked_weight: float = 1.0


class DreamBoothDataset(Dataset[dict[str, Tensor]]):
    """Sample `p` of the run, for `p` = 0, 1, 2, …: a photo of a subject, or one of a class if `p` is odd.

    Without class photos every sample is a subject's. Each sample is a dict of
    `moments` (2·C, h, w) if latents are cached, else `pixels` (3, H, W) in [-1, 1];
    `view` (6,), how the photo is shown (see `crops.view`); `weights` (1, h, w) of the loss, if masks are used;
    `latent_noise` and `noise` (C, h, w): what draws the latents, and what diffusion adds; `offset` (C, 1, 1);
    `timestep` (), a whole number; `prompt` (), a number in `prompts`; `is_prior` (), bool.

    All samples of a batch have one size. A cycle of as many batches as there are subject's photos gives each size as
    many batches as photos have it, in random order, so all photos come up equally often. Class photos are cropped to
    the size of the batch they are in.
    """

    def __init__(
        self,
        instance: Sequence[Photo],
        prior: Sequence[Photo],
        view_settings: ViewSettings,
        *,
        batch_size: int,
        num_timesteps: int,
        seed: int,
    ) -> None:
        """instance: the subjects' photos.
        prior: the class images; none without prior preservation.
        view_settings: the sizes, and how photos are cropped, mirrored and weighted.
        batch_size: subject's photos in a batch, and as many of the class.
        num_timesteps: of the noise schedule; timesteps are drawn below it.
        seed: the run's, from which all that is random follows.
        """
        self.streams = [instance, prior] if prior else [instance]
        self.view_settings = view_settings
        self.batch_size = batch_size
        self.num_timesteps = num_timesteps
        self.seed = seed
        self.prompts = list(dict.fromkeys(photo.prompt for photos in self.streams for photo in photos))
        self.sizes = [nearest_size(photo.size, list(view_settings.sizes)) for photo in instance]  # one for each photo
        self.by_size: dict[Size, list[Photo]] = {}
        for photo, size in zip(instance, self.sizes, strict=True):
            self.by_size.setdefault(size, []).append(photo)
        self._cache: dict[tuple[Photo, Variant], dict[str, Tensor]] = {}

    def cache(self, encode_images: Callable[[Tensor], Tensor], positions: Iterable[int]) -> None:
        """Encode the photos as the samples at these positions show them, and keep the results in main memory.

        encode_images: the base model's, from pixels (1, 3, H, W) in [-1, 1] to moments (1, 2·C, h, w).
        positions: numbers of samples of the run.
        """
        shown = self._shown(positions)
        for photo, variant in tqdm(shown, desc="encoding photos", unit="picture", disable=len(shown) < 50):
            picture = self._picture(photo, variant)
            picture["moments"] = encode_images(picture.pop("pixels")[None])[0].cpu()
            self._cache[photo, variant] = picture

    @property
    def crops(self) -> bool:
        """Whether any photo is cropped."""
        return any(
            len(variants(photo.size, size, center_crop=False, random_flip=False)) > 1
            for size, own in self.by_size.items()
            for photo in chain(own, *self.streams[1:])
        )

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        photo, variant, generator = self._draw(position)
        shape = self.view_settings.sizes[variant.size]
        return (self._cache.get((photo, variant)) or self._picture(photo, variant)) | {
            "latent_noise": torch.randn(shape, generator=generator),
            "noise": torch.randn(shape, generator=generator),
            "offset": torch.randn((shape[0], 1, 1), generator=generator),
            "timestep": torch.randint(self.num_timesteps, (), generator=generator),
            "prompt": torch.tensor(self.prompts.index(photo.prompt)),
            "is_prior": torch.tensor(position % len(self.streams) == 1),
        }

    def _draw(self, position: int) -> tuple[Photo, Variant, torch.Generator]:
        """The photo at a position, how it is shown, and the generator of the sample's further numbers."""
        number, stream = divmod(position, len(self.streams))
        batch, within = divmod(number, self.batch_size)
        size, turn = self._size_of(batch)
        if stream == 0:
            photos: Sequence[Photo] = self.by_size[size]
            epoch, place = divmod(turn * self.batch_size + within, len(photos))
        else:
            photos = self.streams[stream]
            epoch, place = divmod(number, len(photos))
        photo = photos[shuffled(len(photos), self.seed, ORDER, stream, epoch)[place]]
        generator = generator_for(self.seed, DRAWS, stream, number)
        choices = self._variants(photo, size)
        return photo, choices[int(torch.randint(len(choices), (), generator=generator))], generator

    def _shown(self, positions: Iterable[int]) -> list[tuple[Photo, Variant]]:
        """What the samples at these positions show, each once, and one photo's variants together."""
        most = sum(
            len(self._variants(photo, size))
            for size, own in self.by_size.items()
            for photos in (own, *self.streams[1:])  # class photos are shown in every size
            for photo in photos
        )
        shown: set[tuple[Photo, Variant]] = set()
        for position in positions:
            shown.add(self._draw(position)[:2])
            if len(shown) == most:  # there is no more to find, however long the run
                break
        return sorted(shown, key=lambda each: (each[0].path, each[1].size, each[1].place, each[1].flip))

    def _size_of(self, batch: int) -> tuple[Size, int]:
        """The size of a batch, and how many batches of that size came before it."""
        cycle, place = divmod(batch, len(self.sizes))
        order = shuffled(len(self.sizes), self.seed, SIZES, cycle)
        size = self.sizes[order[place]]
        return size, cycle * len(self.by_size[size]) + sum(self.sizes[index] == size for index in order[:place])

    def _variants(self, photo: Photo, size: Size) -> list[Variant]:
        return variants(photo.size, size, self.view_settings.center_crop, self.view_settings.random_flip)

    def _picture(self, photo: Photo, variant: Variant) -> dict[str, Tensor]:
        picture = {"pixels": pixels(photo, variant), "view": view(photo, variant)}
        if self.view_settings.unmasked_weight != 1:
            _, height, width = self.view_settings.sizes[variant.size]
            picture["weights"] = subject_weights(photo, variant, (width, height), self.view_settings.unmasked_weight)
        return picture


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: the samples' tensors stacked, and prompts that several samples share only once.

    samples: one or more, as `DreamBoothDataset` makes them. In place of each sample's `prompt`, the batch has the
    different prompts' numbers, `prompts` (K,), and the place of each sample's among them, `prompt_of` (B,).
    """
    batch = default_collate(samples)
    # Here, and not where they are encoded: a GPU would be waited for to tell how many they are.
    batch["prompts"], batch["prompt_of"] = batch.pop("prompt").unique(return_inverse=True)
    return batch


class BatchPositions(Sampler[list[int]]):
    """The positions of this process's batches, from the `first` batch of the run to the last.

    A batch takes the next `batch_size · num_processes` positions of the run, and each process its share.
    """

    def __init__(
        self, first: int, last: int, batch_size: int, *, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """first, last: numbers of batches of the run, the last one not included.
        batch_size: samples in a batch of one process, class images included.
        process_index, num_processes: which process this is, from 0, and how many there are.
        """
        self.batches = range(first, last)
        self.batch_size = batch_size
        self.process_index, self.num_processes = process_index, num_processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(start, start + self.batch_size))
