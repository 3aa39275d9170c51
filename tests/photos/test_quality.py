"""Photos that are blurred, or taken twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from gsoft_diffusion.photos.folder import nearly_copies, read_folder
from gsoft_diffusion.photos.quality import alike, is_blurred, look

SUBJECTS = sorted(path for path in (Path(__file__).parents[2] / "data" / "subjects").iterdir() if path.is_dir())


def scene(seed: int, size: int = 512) -> Image.Image:
    """Shapes with sharp edges on a ground of another colour, as in a photo of a thing."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), rng.integers(60, 200, 3), dtype=np.uint8)
    for _ in range(30):
        x, y, w, h = rng.integers(0, size - 60, 2).tolist() + rng.integers(20, size // 3, 2).tolist()
        pixels[y : y + h, x : x + w] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("radius", "blurred"), [(0, False), (1, False), (8, True), (14, True)])
def test_blur_is_seen_at_the_size_of_the_picture(radius, blurred):
    for size in (512, 1024):
        image = scene(1, size)
        scaled = radius * size / 1024
        assert is_blurred(image.filter(ImageFilter.GaussianBlur(scaled)) if radius else image) == blurred


def test_small_and_flat_pictures_are_not_judged():
    assert not is_blurred(scene(1, 1024).filter(ImageFilter.GaussianBlur(20)).resize((128, 128)))
    assert not is_blurred(Image.new("RGB", (512, 512), "red"))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((200, 200), Image.Resampling.BICUBIC),
        lambda image: ImageEnhance.Brightness(image).enhance(1.15),
        lambda image: image.crop((4, 4, image.width - 4, image.height - 4)),
    ],
)
def test_the_same_view_is_recognised(change):
    images = [scene(seed) for seed in range(5)]
    looks = [look(image) for image in (*images, change(images[3]))]
    assert list(alike(looks)) == [(3, 5)]


@pytest.mark.parametrize("folder", SUBJECTS, ids=lambda path: path.name)
def test_the_bundled_photos_are_sharp_and_different(folder):
    photos = read_folder(folder, "--instance_data_dir", "a photo").photos
    assert [note for photo in photos for note in photo.notes] == []
    assert list(nearly_copies(photos)) == []


def test_a_folder_says_what_is_blurred_and_what_was_taken_twice(tmp_path):
    image = scene(2)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.jpg", quality=80)
    scene(3).filter(ImageFilter.GaussianBlur(10)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    folder = read_folder(tmp_path, "--instance_data_dir", "a photo")
    assert str(folder) == "4 pictures, 1 blurred"
    pairs = [(first.path.name, later.path.name) for first, later in nearly_copies(folder.photos)]
    assert pairs == [("a.png", "b.jpg")]  # d.png is a copy, which is said otherwise


def test_class_images_are_not_judged(tmp_path):
    scene(3).filter(ImageFilter.GaussianBlur(10)).save(tmp_path / "c.png")
    folder = read_folder(tmp_path, "--class_data_dir", "a dog", masks=False)
    assert str(folder) == "1 picture"
