"""Photos as training sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gsoft_diffusion.photos.crops import Variant, pixels
from gsoft_diffusion.photos.folder import read_folder
from gsoft_diffusion.photos.preview import enlarged, preview

SIZES = [(32, 32)]


@pytest.fixture
def photo(photos):
    return read_folder(photos, "--instance_data_dir", "a photo").photos[1]  # 64×40


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_it_is_what_training_is_shown(photo, place):
    shown = np.asarray(preview(photo, SIZES, place))
    trained = ((pixels(photo, Variant((32, 32), place)) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, trained)


def test_of_several_sizes_the_photo_gets_the_nearest(photo):
    assert preview(photo, [(32, 32), (48, 32), (32, 48)]).size == (48, 32)


def test_what_the_mask_leaves_out_is_red(photo, photos):
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (0, 0, 32, 40))
    mask.save(photos / "1-masklabel.png")
    masked = read_folder(photos, "--instance_data_dir", "a photo").photos[1]
    shown, plain = (np.asarray(preview(each, SIZES), dtype=int) for each in (masked, photo))
    np.testing.assert_array_equal(shown[:, :15], plain[:, :15])
    outside = shown[:, 17:]
    assert outside[..., 0].min() > 140
    assert outside[..., 1:].max() < 100


def test_photos_with_fewer_pixels_are_named(photo):
    assert enlarged(photo, [(32, 32)]) == ""
    assert enlarged(photo, [(64, 64)]) == "64×40 pixels, enlarged to 64×64: it will look soft"
