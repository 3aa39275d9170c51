"""Files, captions, masks, sizes and crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gsoft_diffusion.errors import UserError
from gsoft_diffusion.photos import (
    CROPS,
    EXIF_ORIENTATION,
    Photo,
    Variant,
    bucket_sizes,
    list_images,
    nearest_size,
    open_image,
    open_mask,
    pixels,
    read_folder,
    subject_weights,
    variants,
    view,
)


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path) -> Photo:
    image.save(path)
    return Photo(path, "a photo", image.size)


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
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert np.abs(np.asarray(image, int) - np.asarray(smooth, int)).max() <= 8


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "picture.HEIC"
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    pillow_heif.from_pillow(smooth).save(path, quality=95)
    image = open_image(path)
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
    (photo,) = read_folder(tmp_path, "--flag", "a").photos
    upright = open_image(path)
    with Image.open(path) as again:
        expected = ImageOps.exif_transpose(again)
    assert photo.turned == (orientation != 1)
    assert photo.size == upright.size == ((30, 20) if orientation >= 5 else (20, 30))
    assert np.array_equal(np.asarray(upright), np.asarray(expected))


def test_transparent_becomes_white(tmp_path):
    path = tmp_path / "transparent.png"
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(path)
    upright = open_image(path)
    assert upright.getpixel((0, 0)) == (255, 0, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palette_becomes_white(tmp_path):
    path = tmp_path / "palette.png"
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 1)
    image.save(path, transparency=0)
    upright = open_image(path)
    assert upright.getpixel((0, 0)) == (0, 255, 0)
    assert upright.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_are_scaled(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(path)
    image = open_image(path)
    assert image.getpixel((0, 0)) == (127, 127, 127)


def test_cmyk(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    red, green, blue = open_image(path).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_what_was_converted_is_said(tmp_path):
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    picture(8, 8).save(tmp_path / "usual.png")
    said = str(read_folder(tmp_path, "--instance_data_dir", "a photo"))
    assert "3 pictures" in said
    assert "1 converted from CMYK to RGB, 1 converted from I;16 to RGB" in said


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


# Captions


def prompts(folder: Path) -> dict[str, str]:
    return {photo.path.name: photo.prompt for photo in read_folder(folder, "--flag", "a photo of it").photos}


def lines(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def test_captions_from_text_files_and_from_the_table(photos):
    (photos / "0.txt").write_text("it in\n the  snow \n")
    (photos / "metadata.jsonl").write_text(lines({"file_name": "2.png", "text": "it, größer", "other": 1}, ""))
    found = read_folder(photos, "--flag", "a photo of it")
    assert prompts(photos) == {"0.png": "it in the snow", "1.png": "a photo of it", "2.png": "it, größer"} | {
        "3.png": "a photo of it"
    }
    assert (found.captions, found.skipped) == (2, 1)
    assert "2 with captions" in str(found)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": "  \n"}, r"0\.png: its caption is empty"),
        ({"0.txt": b"\xff\xfe\x00"}, r"0\.txt: cannot be read as text"),
        ({"metadata.jsonl": b"\xff\xfe\x00"}, r"metadata\.jsonl: cannot be read as text"),
        ({"metadata.jsonl": lines({"file_name": "0.png", "text": ""})}, r"0\.png: its caption is empty"),
        ({"metadata.jsonl": lines({"file_name": "9.png", "text": "a"})}, r"jsonl, line 1: .*no picture 9\.png"),
        ({"metadata.jsonl": lines({"file_name": "../photos/0.png", "text": "a"})}, r"no picture \.\./photos"),
        ({"metadata.jsonl": lines("", {"file_name": "0.png"})}, r"jsonl, line 2: must be like .*text"),
        ({"metadata.jsonl": lines(["0.png", "a"])}, r"jsonl, line 1: must be like"),
        ({"metadata.jsonl": "[" * 100000}, r"jsonl, line 1: must be like"),
        ({"metadata.jsonl": lines({"file_name": "0.png", "text": 5})}, r"jsonl, line 1: file_name and text"),
        ({"metadata.jsonl": lines({"file_name": [], "text": "a"})}, r"jsonl, line 1: file_name and text"),
        ({"metadata.jsonl": lines(*[{"file_name": "0.png", "text": "a"}] * 2)}, r"jsonl, line 2: a second caption"),
        (
            {"metadata.jsonl": lines({"file_name": "0.png", "text": "a"}), "0.txt": "a"},
            r"0\.txt: 0\.png has a caption in metadata\.jsonl already",
        ),
    ],
)
def test_captions_that_are_wrong_are_named(photos, files, message):
    for name, content in files.items():
        (photos / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_folder(photos, "--flag", "a photo of it")


@pytest.mark.parametrize("name", ["1.txt", "1-masklabel.png"])
def test_files_that_belong_to_two_pictures_are_named(photos, name):
    picture(64, 40).save(photos / "1.jpg")
    picture(64, 40).save(photos / "1-masklabel.png")
    (photos / name).touch()
    with pytest.raises(UserError, match=rf"{name}: belongs to 1\.jpg and 1\.png"):
        read_folder(photos, "--flag", "a photo of it")


# Masks


def half(width: int, height: int) -> Image.Image:
    """White in the left half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_masks_beside_photos_and_in_their_transparency(photos):
    half(64, 40).save(photos / "1-masklabel.png")
    transparent = picture(40, 64)
    transparent.putalpha(half(40, 64))
    transparent.save(photos / "2.png")
    opaque = picture(33, 32)
    opaque.putalpha(255)
    opaque.save(photos / "3.png")
    found = read_folder(photos, "--flag", "a")
    masks = {photo.path.name: photo.mask and photo.mask.name for photo in found.photos}
    assert masks == {"0.png": None, "1.png": "1-masklabel.png", "2.png": "2.png", "3.png": None}
    assert "2 with masks" in str(found)
    assert found.skipped == 1
    for photo in found.photos[1:3]:
        assert np.array_equal(np.asarray(open_mask(photo)), np.asarray(half(*photo.size)))


def test_a_mask_file_goes_before_transparency(photos):
    transparent = picture(64, 40)
    transparent.putalpha(half(64, 40))
    transparent.save(photos / "1.png")
    Image.new("L", (64, 40), 255).save(photos / "1-masklabel.png")
    photo = read_folder(photos, "--flag", "a").photos[1]
    assert photo.mask == photos / "1-masklabel.png"


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("1-masklabel.png", half(40, 64), r"1-masklabel\.png: the mask has 40×64 pixels, but 1\.png has 64×40"),
        ("1-masklabel.png", Image.new("L", (64, 40)), r"1-masklabel\.png: black everywhere"),
        ("7-masklabel.png", half(64, 40), r"7-masklabel\.png: is the mask of no picture"),
        ("1-masklabel.jpg", half(64, 40), r"1-masklabel\.jpg: .* takes 1-masklabel\.png"),
        ("1.png", Image.new("RGBA", (4, 4)), r"1\.png: transparent everywhere"),
    ],
)
def test_masks_that_are_wrong_are_named(photos, name, mask, message):
    mask.save(photos / name)
    with pytest.raises(UserError, match=message):
        read_folder(photos, "--flag", "a")


def test_a_mask_is_turned_like_its_photo(tmp_path):
    """The camera's EXIF data say that the photo lies on its side; the mask was painted over the upright one."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture(64, 40).save(tmp_path / "0.jpg", exif=exif)
    half(40, 64).save(tmp_path / "0-masklabel.png")
    (photo,) = read_folder(tmp_path, "--flag", "a").photos
    assert photo.size == open_mask(photo).size == (40, 64)


def test_weights_follow_the_crop(tmp_path):
    half(64, 32).save(tmp_path / "mask.png")
    photo = Photo(tmp_path / "photo.png", "a", (64, 32), mask=tmp_path / "mask.png")

    def weights(place: float, flip: bool = False) -> list[float]:
        weights = subject_weights(photo, Variant((16, 16), place, flip), (4, 4), 0.25)
        assert weights.shape == (1, 4, 4)
        return weights[0, 0].tolist()

    assert weights(0.0) == [1, 1, 1, 1]
    assert weights(1.0) == [0.25] * 4
    assert weights(0.5) == [1, 1, 0.25, 0.25]
    assert weights(0.5, flip=True) == [0.25, 0.25, 1, 1]
    wide = subject_weights(photo, Variant((32, 16)), (8, 4), 0.25)
    assert wide[0].tolist() == [[1] * 4 + [0.25] * 4] * 4
    assert subject_weights(Photo(photo.path, "a", (64, 32)), Variant((32, 16)), (8, 4), 0.25).eq(1).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 32)])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (16, 16)])
def test_the_view_says_what_was_cropped(tmp_path, shape, size, place, flip):
    """As in SDXL's training: scale the (mirrored) photo, then cut the picture out at the edges that the view names."""
    ramp = np.linspace(0, 255, shape[0])[None, :, None] + np.linspace(0, 255, shape[1])[:, None, None]
    photo = saved(Image.fromarray((ramp / 2).astype(np.uint8).repeat(3, axis=2)), tmp_path / "photo.png")
    height, width, top, left, *target = view(photo, Variant(size, place, flip)).tolist()
    assert (width, height) == shape
    assert tuple(reversed(target)) == size
    image = open_image(photo.path)
    scale = max(across / side for across, side in zip(size, shape, strict=True))
    image = image.resize((round(shape[0] * scale), round(shape[1] * scale)), Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip else image
    expected = np.asarray(image.crop((left, top, left + size[0], top + size[1])), dtype=float)
    found = ((pixels(photo, Variant(size, place, flip)) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).mean() < 4


# Sizes and crops


def test_bucket_sizes_of_stable_diffusion():
    sizes = bucket_sizes(512, 64)
    assert (512, 512) in sizes
    assert {(768, 320), (320, 768), (640, 384), (256, 1024)} <= set(sizes)
    assert all(width % 64 == height % 64 == 0 and width * height <= 512**2 for width, height in sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (96, 32), (1024, 64), (32, 4), (64, 64)])
def test_bucket_sizes_hold_the_square(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert all(resolution // 2 <= side <= 2 * resolution and side % step == 0 for size in sizes for side in size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 100), (512, 512)), ((3000, 2000), (640, 384)), ((2000, 3000), (384, 640)), ((1, 90), (256, 1024))],
)
def test_nearest_size(size, expected):
    assert nearest_size(size, bucket_sizes(512, 64)) == expected


def test_variants_are_finite_and_distinct():
    square = (16, 16)
    assert variants((10, 10), square, center_crop=False, random_flip=False) == [Variant(square)]
    assert variants((10, 20), square, center_crop=True, random_flip=False) == [Variant(square)]
    assert variants((10, 20), (16, 32), center_crop=False, random_flip=False) == [Variant((16, 32))]
    assert len(set(variants((10, 20), square, center_crop=False, random_flip=False))) == CROPS
    assert len(set(variants((10, 20), square, center_crop=False, random_flip=True))) == 2 * CROPS
    flipped = Variant(square, flip=True)
    assert variants((10, 10), square, center_crop=False, random_flip=True) == [Variant(square), flipped]


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (30, 20), (20, 30), (3, 500), (17, 16)])
@pytest.mark.parametrize("place", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("wanted", [(16, 16), (24, 8), (8, 28)])
def test_pixels_have_the_size_and_range(tmp_path, size, place, wanted):
    shown = pixels(saved(picture(*size), tmp_path / "0.png"), Variant(wanted, place))
    assert shown.shape == (3, wanted[1], wanted[0])
    assert shown.dtype == torch.float32
    assert shown.min() >= -1
    assert shown.max() <= 1


def test_pixels_stay_where_nothing_is_resized(tmp_path):
    photo = saved(picture(16, 24), tmp_path / "0.png")
    array = torch.from_numpy(np.array(open_image(photo.path))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels(photo, Variant((16, 16), 0.0)), array[:, :16])
    assert torch.equal(pixels(photo, Variant((16, 16), 1.0)), array[:, 8:])
    assert torch.equal(pixels(photo, Variant((16, 16), 0.5, flip=True)), array[:, 4:20].flip(-1))
    assert torch.equal(pixels(photo, Variant((16, 24))), array)
    assert torch.equal(pixels(photo, Variant((8, 24), 1.0)), array[:, :, 8:])


# Folders


def test_photos_count(photos):
    folder = read_folder(photos, "--flag", "a")
    assert (len(folder.photos), folder.skipped, folder.captions) == (4, 1, 0)
    assert str(folder) == "4 pictures, 0 turned upright by their EXIF data; 1 other files skipped"


def test_photos_limit(photos):
    assert len(read_folder(photos, "--flag", "a", limit=2).photos) == 2


def test_a_damaged_photo_is_found_at_once(photos):
    (photos / "broken.jpg").write_text("no")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read_folder(photos, "--flag", "a")
