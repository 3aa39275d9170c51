"""Folders of photos: what is read, and what is left out."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageOps

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.folder import copies, list_images, read_folder
from gsoft_diffusion.photos.image_files import EXIF_ORIENTATION, open_image


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_pictures_are_sorted(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "10.jpeg", "d.JFIF"):
        picture().save(tmp_path / name, "JPEG")
    (tmp_path / "folder.png").mkdir()
    paths = list_images(tmp_path, "--flag")
    assert [path.name for path in paths] == ["10.jpeg", "a.jpg", "b.PNG", "c.webp", "d.JFIF"]


def test_what_is_left_out_is_named(photos):
    """Whatever is no photo, caption or mask; hidden files last, and of many files only how many."""
    (photos / "raw").mkdir()
    (photos / "raw" / "1.png").touch()
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    (photos / ".DS_Store").touch()
    found = read_folder(photos, "--flag", "a")
    assert found.left_out == ("notes.txt", "gone.png (a dangling link)", "raw/ (a folder)", ".DS_Store (hidden)")
    assert str(found).endswith("; left out: notes.txt, gone.png (a dangling link), raw/ (a folder), .DS_Store (hidden)")
    for number in range(4):
        (photos / f"a{number}.pages").touch()
    listed = "left out: a0.pages, a1.pages, a2.pages, a3.pages, notes.txt and 3 more"
    assert str(read_folder(photos, "--flag", "a")).endswith(listed)


def test_names_cannot_steer_the_terminal(photos):
    (photos / "a\x1b[2Jb.bin").touch()
    assert "\x1b" not in str(read_folder(photos, "--flag", "a"))


def test_folders_as_kohya_names_them_are_read(photos):
    inside = photos / "10_sks dog"
    inside.mkdir()
    for name in ("0.png", "1.png"):
        picture().save(inside / name)
    (inside / "0.txt").write_text("sks dog asleep")
    (inside / "notes").touch()
    (photos / "5_nothing").mkdir()
    (inside / "3_deeper").mkdir()
    picture().save(inside / "3_deeper" / "0.png")
    found = read_folder(photos, "--flag", "a")
    prompts = {photo.path.relative_to(photos).as_posix(): photo.prompt for photo in found.photos}
    inside_ones = {"10_sks dog/0.png": "sks dog asleep", "10_sks dog/1.png": "a"}
    assert prompts == {f"{index}.png": "a" for index in range(4)} | inside_ones
    assert found.subfolders == ("10_sks dog",)
    assert set(found.left_out) == {
        "10_sks dog/notes",
        "10_sks dog/3_deeper/ (a folder)",
        "5_nothing/ (a folder)",
        "notes.txt",
    }
    assert "from 10_sks dog (repeats are not used, all photos count the same)" in str(found)


def test_only_a_folder_as_kohya_names_them(photos):
    photos.rename(photos.parent / "10_sks dog")
    photos.mkdir()
    (photos.parent / "10_sks dog").rename(photos / "10_sks dog")
    assert len(list_images(photos, "--flag")) == 4


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_folders_are_found_in_either_normal_form(photos, forms):
    given, kept = (unicodedata.normalize(form, "Hündin") for form in forms)
    photos.rename(photos.parent / kept)
    assert len(read_folder(photos.parent / given, "--flag", "a").photos) == 4


def test_no_pictures_no_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"--flag .*no picture"):
        list_images(tmp_path, "--flag")
    with pytest.raises(UserError, match=r"--flag .*nowhere"):
        list_images(tmp_path / "nowhere", "--flag")
    with pytest.raises(UserError, match=r"--flag .*notes"):
        list_images(tmp_path / "notes.txt", "--flag")


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
    assert photo.notes == (() if orientation == 1 else ("turned upright by EXIF data",))
    assert photo.size == upright.size == ((30, 20) if orientation >= 5 else (20, 30))
    assert np.array_equal(np.asarray(upright), np.asarray(expected))


def test_what_was_converted_is_said(tmp_path):
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    picture(8, 8).save(tmp_path / "usual.png")
    said = str(read_folder(tmp_path, "--instance_data_dir", "a photo"))
    assert "3 pictures" in said
    assert (
        "1 converted from 16 bits of grey to 8, "
        "1 converted from CMYK without a colour profile (colours are approximate)" in said
    )


def test_photos_count(photos):
    folder = read_folder(photos, "--flag", "a")
    assert (len(folder.photos), folder.captions, folder.left_out) == (4, 0, ("notes.txt",))
    assert str(folder) == "4 pictures; left out: notes.txt"


def test_the_surplus_is_said(photos):
    folder = read_folder(photos, "--flag", "a", limit=3)
    assert (len(folder.photos), folder.surplus) == (3, 1)
    assert "3 pictures; 1 more than are asked for, which are not used; left out" in str(folder)


def test_pictures_of_one_colour_are_said(photos):
    Image.new("RGB", (40, 40), "navy").save(photos / "dark.png")
    assert "5 pictures, 1 of one single colour;" in str(read_folder(photos, "--flag", "a"))


def test_copies_are_found(photos):
    (photos / "copy.png").write_bytes((photos / "1.png").read_bytes())
    found = list(copies(read_folder(photos, "--flag", "a").photos))
    assert [(first.path.name, copy.path.name) for first, copy in found] == [("1.png", "copy.png")]


def test_a_damaged_photo_is_found_at_once(photos):
    (photos / "broken.jpg").write_text("no")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read_folder(photos, "--flag", "a")


def test_a_folder_with_other_folders_only_says_which_are_looked_into(tmp_path):
    (tmp_path / "dog").mkdir()
    picture().save(tmp_path / "dog" / "1.png")
    with pytest.raises(
        UserError, match=r"holds no picture .*; only those of its folders are looked into .* `10_sks dog`"
    ):
        read_folder(tmp_path, "--flag", "a")
