"""Sheets of a comparison's pictures."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from eval import subjects
from eval.cells import Cell
from eval.results import cell_folder
from eval.subject_sheets import DESCRIPTION, LARGEST, read_subject_sheet, sheet_path, write_subject_sheet
from eval.subjects import Subject
from gsoft_diffusion import UserError
from gsoft_diffusion.foundation.bundled import found
from gsoft_diffusion.sampling.contact_sheets import SHEET_PIXELS

PROMPTS = {f"context-{number:02d}-seed0.png": f"a dog {place}" for number, place in enumerate(("here", "там"))}
BASE, LORA, OTHER = (
    Cell("base", None, None, "rex", 0),
    Cell("lora", "medium", 1e-3, "rex", 0),
    Cell("lora", "medium", 1e-2, "rex", 0),
)


@pytest.fixture
def subject(tmp_path) -> Subject:
    folder = tmp_path / "photos" / "rex"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(
        folder / "0.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    return Subject("rex", "dog", True, folder)


def finished_cell(cell, out, shade, size=(64, 64)):
    """The cell's result; each of its pictures in a shade of its own."""
    cell_folder(cell, out).mkdir(parents=True, exist_ok=True)
    pictures = [{"file": file, "prompt": prompt, "seed": 0, "kind": "context"} for file, prompt in PROMPTS.items()]
    others = [{"file": "class-09-seed0.png", "prompt": "a dog", "seed": 0, "kind": "class"}]
    others += [{"file": "context-00-seed1.png", "prompt": "a dog here", "seed": 1, "kind": "context"}]
    for number, picture in enumerate(pictures + others):
        Image.new("RGB", size, (shade, 40 * number, 90)).save(cell_folder(cell, out) / picture["file"])
    return {"cell": vars(cell), "pictures": pictures + others}


def has_red(path):
    """Whether anything on the sheet has the photos' colour."""
    red, green, blue = np.moveaxis(np.asarray(Image.open(path).convert("RGB")), -1, 0)
    return ((red > 180) & (green < 60) & (blue < 60)).any()


def colour(picture):
    return [round(value) for value in np.asarray(picture, dtype=float).mean((0, 1))]


def test_pictures_come_back_from_the_sheet(subject, tmp_path):
    cells = [("Base model", finished_cell(BASE, tmp_path, 10)), ("LoRA medium", finished_cell(LORA, tmp_path, 200))]
    write_subject_sheet(subject, cells, tmp_path)
    sheet = read_subject_sheet(sheet_path("rex", tmp_path))
    assert dict(sheet.columns) == PROMPTS  # one seed, and no picture of another kind
    assert [row.label for row in sheet.rows.values()] == ["Base model", "LoRA medium"]
    assert list(sheet.rows) == [BASE.id, LORA.id]
    for shade, row in zip((10, 200), sheet.rows.values(), strict=True):
        assert [picture.size for picture in row.pictures.values()] == [(64, 64)] * 2
        for number, picture in enumerate(row.pictures.values()):
            assert np.allclose(colour(picture), (shade, 40 * number, 90), atol=6)


def test_photos_of_others_are_not_on_it(subject, tmp_path, monkeypatch):
    """Whoever passes on a sheet does not pass on photos, except those that the repository has anyway."""
    cells = [("Base model", finished_cell(BASE, tmp_path, 10))]
    write_subject_sheet(subject, cells, tmp_path)
    path = sheet_path("rex", tmp_path)
    assert read_subject_sheet(path).photos == []
    assert not has_red(path)
    height = Image.open(path).height
    path.unlink()
    monkeypatch.setattr(subjects, "BUNDLED", str(subject.folder.resolve().parent))
    write_subject_sheet(subject, cells, tmp_path)
    (photo,) = read_subject_sheet(path).photos
    assert photo.size == (20, 40)  # upright
    assert np.allclose(colour(photo), (254, 0, 0), atol=12)
    assert has_red(path)
    assert Image.open(path).height > height


@pytest.mark.parametrize("place", ["dreambooth/dataset/dog", "data/subjects/dog/more", "data/dog", "data/subjects"])
def test_only_subjects_of_the_repository_are_bundled(place):
    assert not Subject("dog", "dog", True, found(place)).is_bundled
    assert Subject("poodle", "dog", True, found("data/subjects/poodle")).is_bundled


def test_a_sheet_only_gains(subject, tmp_path):
    """Rows that it has stay without their cells' folders, and when another learning rate is chosen."""
    results = {cell: finished_cell(cell, tmp_path, shade) for cell, shade in ((BASE, 10), (LORA, 200))}
    write_subject_sheet(subject, [(cell.id, result) for cell, result in results.items()], tmp_path)
    shutil.rmtree(tmp_path / "work")
    before = sheet_path("rex", tmp_path).read_bytes()
    write_subject_sheet(subject, [(cell.id, result) for cell, result in results.items()], tmp_path)
    assert sheet_path("rex", tmp_path).read_bytes() == before  # not even compressed again
    results[OTHER] = finished_cell(OTHER, tmp_path, 120)
    write_subject_sheet(subject, [(cell.id, results[cell]) for cell in (BASE, OTHER)], tmp_path)
    rows = read_subject_sheet(sheet_path("rex", tmp_path)).rows
    assert list(rows) == [BASE.id, OTHER.id, LORA.id]
    shades = [colour(row.pictures["context-00-seed0.png"])[0] for row in rows.values()]
    assert np.allclose(shades, [10, 120, 200], atol=8)


def test_pictures_that_are_nowhere_stay_blank(subject, tmp_path):
    cells = [("Base model", finished_cell(BASE, tmp_path, 10)), ("LoRA medium", finished_cell(LORA, tmp_path, 200))]
    shutil.rmtree(cell_folder(LORA, tmp_path))
    write_subject_sheet(subject, cells, tmp_path)
    rows = read_subject_sheet(sheet_path("rex", tmp_path)).rows
    assert (len(rows[BASE.id].pictures), len(rows[LORA.id].pictures)) == (2, 0)


def test_a_damaged_picture_is_named_with_what_to_do(subject, tmp_path):
    cells = [("Base model", finished_cell(BASE, tmp_path, 10))]
    (cell_folder(BASE, tmp_path) / "context-01-seed0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"context-01-seed0\.png: damaged .*: delete \S+ and run eval.benchmark again"):
        write_subject_sheet(subject, cells, tmp_path)
    assert not sheet_path("rex", tmp_path).exists()


def test_large_pictures_are_reduced(subject, tmp_path):
    write_subject_sheet(subject, [("Base model", finished_cell(BASE, tmp_path, 10, (1024, 512)))], tmp_path)
    (row,) = read_subject_sheet(sheet_path("rex", tmp_path)).rows.values()
    assert {picture.size for picture in row.pictures.values()} == {(LARGEST, LARGEST // 2)}


def test_many_rows_make_no_sheet_that_cannot_be_read(subject, tmp_path):
    cells = [Cell("lora", "medium", rate / 1000, "rex", 0) for rate in range(1, 100)]
    first = finished_cell(BASE, tmp_path, 10, (512, 512))
    rows = [("Base model", first)]
    for cell in cells:
        cell_folder(cell, tmp_path).symlink_to(cell_folder(BASE, tmp_path), target_is_directory=True)
        rows.append((cell.id, first | {"cell": vars(cell)}))
    write_subject_sheet(subject, rows, tmp_path)
    path = sheet_path("rex", tmp_path)
    assert len(read_subject_sheet(path).rows) == 100
    assert Image.open(path).width * Image.open(path).height < 2 * SHEET_PIXELS


@pytest.mark.parametrize(
    "description",
    [
        *("", "[]", "{}", "{", '{"photos": 3}'),
        '{"photos": [[0, 0, 9, 999999999]], "columns": {}, "rows": {}}',
        '{"photos": [[5, 5, 5, 9]], "columns": {}, "rows": {}}',
        '{"photos": [], "columns": [], "rows": {}}',
    ],
)
def test_a_picture_that_is_no_sheet_is_refused(tmp_path, description):
    exif = Image.Exif()
    exif[DESCRIPTION] = description
    Image.new("RGB", (99, 99)).save(tmp_path / "rex.webp", exif=exif)
    with pytest.raises(UserError, match=r"rex\.webp: does not say which pictures are where; put back"):
        read_subject_sheet(tmp_path / "rex.webp")


def test_a_sheet_that_is_cut_off_is_damaged(tmp_path):
    path = tmp_path / "rex.webp"
    with path.open("wb") as file:
        Image.effect_noise((64, 64), 50).save(file, "PNG")  # Pillow goes by what is in a file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"rex\.webp: damaged or not a picture"):
        read_subject_sheet(path)


def test_a_sheet_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rex\.webp: is not there; run eval.benchmark again"):
        read_subject_sheet(tmp_path / "rex.webp")
