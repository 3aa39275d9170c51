from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gsoft_diffusion.dataset import (
    CROPS,
    EXIF_ORIENTATION,
    BatchPositions,
    DreamBoothDataset,
    Photos,
    Variant,
    derived_seed,
    list_images,
    open_image,
    square,
    variants,
)
from gsoft_diffusion.errors import UserError


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def dataset(photos: Photos, prior: Photos | None = None, seed: int = 0) -> DreamBoothDataset:
    return DreamBoothDataset(photos, prior, resolution=16, latent_shape=(4, 8, 8), num_timesteps=1000, seed=seed)


def as_moments(pixels: torch.Tensor) -> torch.Tensor:
    """Stands in for the VAE: a function of the pixels that tells pictures apart."""
    return pixels.mean(dim=1, keepdim=True).repeat(1, 8, 1, 1)


# Files


def test_pictures_are_sorted_and_the_rest_is_counted(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "10.jpeg"):
        picture().save(tmp_path / name)
    for name in ("notes.txt", ".DS_Store", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.png").mkdir()
    paths, skipped = list_images(tmp_path, "--flag")
    assert [path.name for path in paths] == ["10.jpeg", "a.jpg", "b.PNG", "c.webp"]
    assert skipped == 4


def test_no_pictures_no_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"--flag .*no picture"):
        list_images(tmp_path, "--flag")
    with pytest.raises(UserError, match=r"--flag .*nowhere"):
        list_images(tmp_path / "nowhere", "--flag")
    with pytest.raises(UserError, match=r"--flag .*notes"):
        list_images(tmp_path / "notes.txt", "--flag")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    smooth.save(path)
    image, turned = open_image(path)
    assert (image.mode, image.size, turned) == ("RGB", (32, 32), False)
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).max() <= 8


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "picture.HEIC"
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pillow_heif.from_pillow(smooth).save(path, quality=95)
    image, _ = open_image(path)
    assert (image.mode, image.size) == ("RGB", (64, 64))
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).max() <= 8


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    path = tmp_path / "picture.heic"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"picture\.heic.*pip install pillow-heif"):
        open_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_reported(tmp_path, orientation):
    path, image = tmp_path / "turned.png", picture()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image.save(path, exif=exif)
    upright, turned = open_image(path)
    with Image.open(path) as again:
        expected = ImageOps.exif_transpose(again)
    assert turned == (orientation != 1)
    assert upright.size == ((30, 20) if orientation >= 5 else (20, 30))
    assert np.array_equal(np.asarray(upright), np.asarray(expected))


def test_transparent_becomes_white(tmp_path):
    path = tmp_path / "transparent.png"
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(path)
    upright, _ = open_image(path)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palette_becomes_white(tmp_path):
    path = tmp_path / "palette.png"
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(path, transparency=0)
    upright, _ = open_image(path)
    assert upright.getpixel((0, 0)) == (0, 255, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(path)
    image, _ = open_image(path)
    assert image.getpixel((0, 0)) == (127, 127, 127)


def test_cmyk(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    red, green, blue = open_image(path)[0].getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "huge"])
def test_damaged_files_are_named(tmp_path, damage, monkeypatch):
    path = tmp_path / "broken.png"
    picture(60, 60).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a picture")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"broken\.png"):
        open_image(path)


# Crops


def test_variants_are_finite_and_distinct():
    assert variants((10, 10), center_crop=False, random_flip=False) == [Variant()]
    assert variants((10, 20), center_crop=True, random_flip=False) == [Variant()]
    assert len(set(variants((10, 20), center_crop=False, random_flip=False))) == CROPS
    assert len(set(variants((10, 20), center_crop=False, random_flip=True))) == 2 * CROPS
    assert variants((10, 10), center_crop=False, random_flip=True) == [Variant(), Variant(flip=True)]


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (30, 20), (20, 30), (3, 500), (17, 16)])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
def test_square_has_the_size_and_range(size, place):
    pixels = square(picture(*size), 16, Variant(place))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_square_keeps_pixels_where_nothing_is_resized():
    image = picture(16, 24)
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(square(image, 16, Variant(0.0)), array[:, :16])
    assert torch.equal(square(image, 16, Variant(1.0)), array[:, 8:])
    assert torch.equal(square(image, 16, Variant(0.5, flip=True)), array[:, 4:20].flip(-1))


# Samples


def test_photos_count(photos):
    folder = Photos(photos, "--flag")
    assert (len(folder), folder.skipped, folder.turned) == (4, 1, 0)
    assert [len(ways) for ways in folder.variants] == [1, CROPS, CROPS, CROPS]


def test_photos_limit(photos):
    assert len(Photos(photos, "--flag", limit=2)) == 2


def test_a_damaged_photo_is_found_at_once(photos):
    (photos / "broken.jpg").write_text("no")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        Photos(photos, "--flag")


def test_a_sample_is_a_function_of_seed_and_position(photos):
    first, second = dataset(Photos(photos, "--flag")), dataset(Photos(photos, "--flag"))
    wanted = first[1234]
    for position in (0, 1233, 77):
        second[position]
    again = second[1234]
    assert wanted.keys() == again.keys()
    assert all(torch.equal(wanted[name], again[name]) for name in wanted)
    other_seed = dataset(Photos(photos, "--flag"), seed=1)[1234]
    assert not torch.equal(wanted["noise"], other_seed["noise"])


def test_noises_of_a_run_are_all_different(photos):
    samples = [dataset(Photos(photos, "--flag"), Photos(photos, "--flag"))[position] for position in range(40)]
    numbers = torch.stack([torch.stack((s["noise"], s["latent_noise"])).flatten() for s in samples])
    correlation = torch.corrcoef(numbers) - torch.eye(len(samples))
    assert correlation.abs().max() < 0.3  # 512 numbers each: standard deviation 0.044


def test_timesteps_are_uniform(photos):
    drawn = torch.stack([dataset(Photos(photos, "--flag"))[position]["timestep"] for position in range(2000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts - 200).abs().max() < 60  # standard deviation 13.4


def test_every_epoch_shows_every_photo_once_in_another_order(photos):
    folder = Photos(photos, "--flag")
    folder.moments = [[torch.full((8, 8, 8), float(index))] * len(ways) for index, ways in enumerate(folder.variants)]
    samples = dataset(folder)
    shown = [int(samples[position]["moments"][0, 0, 0]) for position in range(40)]
    epochs = [tuple(shown[start : start + 4]) for start in range(0, 40, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(epochs)) > 3


def test_subject_and_class_alternate(photos):
    samples = dataset(Photos(photos, "--flag"), Photos(photos, "--flag"))
    assert [bool(samples[position]["is_prior"]) for position in range(6)] == [False, True] * 3
    assert not any(dataset(Photos(photos, "--flag"))[position]["is_prior"] for position in range(6))


def test_caching_changes_nothing(photos):
    """Flips and crops survive the cache: every sample shows the same picture as without it."""
    plain, cached = (Photos(photos, "--flag", random_flip=True) for _ in range(2))
    cached.cache(as_moments, 16)
    seen = set()
    for position in range(60):
        without, with_cache = dataset(plain)[position], dataset(cached)[position]
        assert torch.equal(as_moments(without.pop("pixels")[None])[0], with_cache.pop("moments"))
        assert all(torch.equal(without[name], with_cache[name]) for name in without)
        seen.add(with_cache["timestep"].item())
    assert len(seen) > 30


def test_all_variants_come_up(photos):
    folder = Photos(photos, "--flag", random_flip=True)
    folder.cache(as_moments, 16)
    samples = dataset(folder)
    shown = {samples[position]["moments"].numpy().tobytes() for position in range(600)}
    assert len(shown) == sum(len(ways) for ways in folder.variants)


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
