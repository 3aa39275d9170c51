"""Which photo, size and noise each sample of a run is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import pytest
import torch
from PIL import Image

from gsoft_diffusion.photos.crops import CROPS
from gsoft_diffusion.photos.folder import Photo, read_folder
from gsoft_diffusion.training.dataset import BatchPositions, DreamBoothDataset, ViewSettings, collate, derived_seed

SQUARE = {(16, 16): (4, 8, 8)}
BUCKETS = {(16, 16): (4, 8, 8), (20, 12): (4, 6, 10), (12, 20): (4, 10, 6)}
ENOUGH = 480  # samples for every variant to come up


@pytest.fixture
def some(photos) -> Sequence[Photo]:
    """Photos of 40×40, 64×40, 40×64 and 33×32 pixels."""
    return read_folder(photos, "--flag", "a photo of it").photos


def dataset(
    photos: Sequence[Photo],
    prior: Sequence[Photo] = (),
    *,
    sizes: dict = SQUARE,
    batch_size: int = 4,
    seed: int = 0,
    **view_settings,
) -> DreamBoothDataset:
    return DreamBoothDataset(
        photos, prior, ViewSettings(sizes, **view_settings), batch_size=batch_size, num_timesteps=1000, seed=seed
    )


def as_moments(pixels: torch.Tensor) -> torch.Tensor:
    """Stands in for the VAE: a function of the pixels that tells pictures apart."""
    return pixels.mean(dim=1, keepdim=True).repeat(1, 8, 1, 1)


def named(photos: Sequence[Photo], prefix: str = "") -> list[Photo]:
    """The photos, each with its name as its caption: so that a sample's prompt says which one it shows."""
    return [replace(photo, prompt=prefix + photo.path.name) for photo in photos]


def shown(samples: DreamBoothDataset, positions: Sequence[int]) -> list[str]:
    return [samples.prompts[int(samples[position]["prompt"])] for position in positions]


def test_a_batch_has_each_prompt_once(some):
    samples = dataset(named(some), [replace(photo, prompt="class") for photo in some])
    chosen = [samples[position] for position in range(8)]
    batch = collate(chosen)
    assert [int(number) for number in batch["prompts"][batch["prompt_of"]]] == [int(s["prompt"]) for s in chosen]
    assert len(batch["prompts"]) == len({int(sample["prompt"]) for sample in chosen}) < 8
    assert torch.equal(batch["noise"][5], chosen[5]["noise"])
    assert "prompt" not in batch


def test_a_sample_is_a_function_of_seed_and_position(some):
    first, second = (dataset(some, sizes=BUCKETS) for _ in range(2))
    wanted = first[1234]
    for position in (0, 1233, 77):
        second[position]
    again = second[1234]
    assert wanted.keys() == again.keys()
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    other_seed = dataset(some, sizes=BUCKETS, seed=1)[1234]
    assert wanted["noise"].sum() != other_seed["noise"].sum()


def test_noises_of_a_run_are_all_different(some):
    samples = [dataset(some, some)[position] for position in range(40)]
    numbers = torch.stack([torch.stack((s["noise"], s["latent_noise"])).flatten() for s in samples])
    correlation = torch.corrcoef(numbers) - torch.eye(len(samples))
    assert correlation.abs().max() < 0.3  # 512 numbers each: standard deviation 0.044


def test_timesteps_are_uniform(some):
    samples = dataset(some)
    drawn = torch.stack([samples[position]["timestep"] for position in range(2000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts - 200).abs().max() < 60  # standard deviation 13.4


def test_every_epoch_shows_every_photo_once_in_another_order(some):
    sequence = shown(dataset(named(some)), range(40))
    epochs = [tuple(sequence[start : start + 4]) for start in range(0, 40, 4)]
    assert all(sorted(epoch) == ["0.png", "1.png", "2.png", "3.png"] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_with_one_size_the_batch_size_changes_nothing(some):
    assert shown(dataset(named(some), batch_size=1), range(60)) == shown(dataset(named(some), batch_size=3), range(60))


def test_subject_and_class_alternate(some):
    samples = dataset(some, some)
    assert [bool(samples[position]["is_prior"]) for position in range(6)] == [False, True] * 3
    assert not any(dataset(some)[position]["is_prior"] for position in range(6))


def test_prompts_are_those_of_the_photos(some):
    samples = dataset(named(some), [replace(photo, prompt="class") for photo in some])
    assert samples.prompts == ["0.png", "1.png", "2.png", "3.png", "class"]
    assert set(shown(samples, range(1, 40, 2))) == {"class"}
    assert set(shown(samples, range(0, 40, 2))) == {"0.png", "1.png", "2.png", "3.png"}


def test_caching_changes_nothing(photos, some):
    """Flips, crops, sizes and masks survive the cache: every sample shows the same picture as without it."""
    Image.linear_gradient("L").resize((64, 40)).save(photos / "1-masklabel.png")
    some = read_folder(photos, "--flag", "a").photos
    options = {"sizes": BUCKETS, "random_flip": True, "unmasked_weight": 0.5}
    plain, cached = (dataset(some, some[:2], **options) for _ in range(2))
    cached.cache(as_moments, range(60))
    shapes, weights = set(), set()
    for position in range(60):
        without, with_cache = plain[position], cached[position]
        shapes.add(with_cache["moments"].shape)
        weights.add(with_cache["weights"].min().item())
        assert torch.equal(as_moments(without.pop("pixels")[None])[0], with_cache.pop("moments"))
        assert without.keys() == with_cache.keys()
        assert all(torch.equal(without[name], with_cache[name]) for name in without)
    assert len(shapes) == 3
    assert len(weights) > 1


def test_all_variants_come_up(some):
    samples = dataset(some, random_flip=True)
    samples.cache(as_moments, range(ENOUGH))
    seen = {samples[position]["moments"].numpy().tobytes() for position in range(ENOUGH)}
    assert len(seen) == 2 + 3 * 2 * CROPS


def test_all_samples_of_a_batch_have_one_size_and_all_photos_come_up_equally_often(some):
    samples = dataset(named(some), named(some[:3], "class "), sizes=BUCKETS, batch_size=3)
    cycle = 3 * 2 * len(some)  # batch size × streams × photos
    sizes = {photo.path.name: size for photo, size in zip(some, samples.sizes, strict=True)}
    assert sizes == {"0.png": (16, 16), "1.png": (20, 12), "2.png": (12, 20), "3.png": (16, 16)}
    orders = []
    for start in range(0, 3 * cycle, cycle):
        names = []
        for batch in BatchPositions(start // 6, (start + cycle) // 6, 6):
            together = [samples[position] for position in batch]
            assert len({sample["pixels"].shape for sample in together}) == 1
            assert [bool(sample["is_prior"]) for sample in together] == [False, True] * 3
            names.append(shown(samples, batch[::2]))
            _, height, width = together[0]["pixels"].shape
            assert all(sizes[name] == (width, height) for name in names[-1])
        assert Counter(chain(*names)) == dict.fromkeys(sizes, 3)
        orders.append(names)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("positions", [range(0), range(4), range(6, 24)])
def test_only_what_the_run_shows_is_encoded(photos, some, positions):
    """Photos with several crops and flips in several sizes: of all these a short run sees few."""
    prior = [replace(photo, prompt=f"class {number}") for number in range(10) for photo in some]
    plain, cached = (dataset(some, prior, sizes=BUCKETS, random_flip=True, batch_size=2) for _ in range(2))
    encoded = []
    cached.cache(lambda pixels: encoded.append(pixels) or as_moments(pixels), positions)
    shown = {plain[position]["pixels"].numpy().tobytes() for position in positions}
    assert {pixels[0].numpy().tobytes() for pixels in encoded} == shown
    assert len(encoded) <= len(positions)
    assert all("moments" in cached[position] for position in positions)


def test_a_long_run_is_not_searched_when_nothing_is_left_to_find(some):
    seen = []
    samples = dataset(some, center_crop=True)
    samples.cache(as_moments, (seen.append(position) or position for position in range(100_000)))
    assert len(seen) == 4  # an epoch shows each photo


def test_weights_only_where_masks_are_used(photos, some):
    assert "weights" not in dataset(some)[0]
    mask = Image.new("L", (40, 40), 128)
    mask.paste(0, (0, 0, 20, 40))
    mask.save(photos / "0-masklabel.png")
    masked = dataset(named(read_folder(photos, "--flag", "a").photos), some, unmasked_weight=0.0, center_crop=True)
    for position in range(8):
        sample = masked[position]
        expected = torch.ones(1, 8, 8)
        if shown(masked, [position]) == ["0.png"]:
            expected[:, :, :4], expected[:, :, 4:] = 0, 128 / 255
        torch.testing.assert_close(sample["weights"], expected)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_batches_cover_the_run_once_whatever_the_number_of_processes(num_processes):
    batch_size = 6 // num_processes
    shares = [
        list(BatchPositions(2, 5, batch_size, process_index=index, num_processes=num_processes))
        for index in range(num_processes)
    ]
    together = [sorted(chain(*batches)) for batches in zip(*shares, strict=True)]
    assert together == [list(range(12, 18)), list(range(18, 24)), list(range(24, 30))]


def test_a_later_start_continues_the_same_batches():
    assert list(BatchPositions(0, 6, 4))[3:] == list(BatchPositions(3, 6, 4))


def test_derived_seeds_differ():
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(5) for c in range(20)}
    assert len(seeds) == 500
    assert derived_seed(1, 2) == derived_seed(1, 2)
