"""Captions in text files and tables."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.folder import read_folder


def picture(width: int = 20, height: int = 30, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


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
    assert (found.captions, found.left_out) == (2, ("notes.txt",))
    assert "2 with captions" in str(found)


@pytest.mark.parametrize("name", ["0.caption", "0.TXT", "0.Caption"])
def test_captions_by_other_suffixes(photos, name):
    (photos / name).write_text("it in the snow")
    assert prompts(photos)["0.png"] == "it in the snow"
    assert read_folder(photos, "--flag", "a").left_out == ("notes.txt",)


def test_captions_as_other_systems_write_them(photos):
    (photos / "0.txt").write_bytes(b"\xef\xbb\xbfit in\r\nthe snow\r\n")
    (photos / "1.txt").write_bytes("it, größer".encode("utf-16"))
    rows = lines({"file_name": "2.png", "text": "it\u2028there"}, {"file_name": "3.png", "text": "u\u0308ber"})
    (photos / "METADATA.JSONL").write_bytes(
        b"\xef\xbb\xbf" + rows.replace("\\u2028", "\u2028").encode().replace(b"\n", b"\r\n")
    )
    assert prompts(photos) == {"0.png": "it in the snow", "1.png": "it, größer", "2.png": "it there", "3.png": "über"}


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_a_table_names_pictures_in_subfolders(photos, table):
    inside = photos / "3_it"
    inside.mkdir()
    picture().save(inside / "x.png")
    row = {"file_name": "3_it/x.png", "text": 'it, "asleep"'}
    csv = '\ufefffile_name,text,other\r\n3_it/x.png,"it, ""asleep""",1\r\n'
    (photos / table).write_text(lines(row) if table.endswith("l") else csv, encoding="utf-8", newline="")
    assert prompts(photos)["x.png"] == 'it, "asleep"'


@pytest.mark.parametrize("name", ["./3_it/x.png", "3_it\\x.png", ".\\3_it\\x.png"])
def test_names_in_tables_may_be_written_as_other_systems_do(photos, name):
    (photos / "3_it").mkdir()
    picture().save(photos / "3_it" / "x.png")
    (photos / "metadata.csv").write_text(f"file_name, text\n{name}, a dog\n")
    assert prompts(photos)["x.png"] == "a dog"


def test_a_table_without_captions_is_left_out(photos):
    (photos / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv" in read_folder(photos, "--flag", "a").left_out


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("table", [None, "metadata.csv", "metadata.jsonl"])
def test_names_in_another_normal_form_match(photos, forms, table):
    image, named = (unicodedata.normalize(form, "Hündin") for form in forms)
    (photos / "0.png").rename(photos / f"{image}.png")
    if table is None:
        (photos / f"{named}.txt").write_text("it")
    elif table == "metadata.csv":
        (photos / table).write_text(f"file_name,text\n{named}.png,it\n", encoding="utf-8")
    else:
        (photos / table).write_text(lines({"file_name": f"{named}.png", "text": "it"}))
    assert prompts(photos)[f"{image}.png"] == "it"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": "  \n"}, r"0\.png: its caption is empty in 0\.txt"),
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
        ({"0.caption": "a", "0.txt": "a"}, r"0\.caption: 0\.png has a caption in 0\.txt already"),
        ({"0.TXT": "a", "0.txt": "a"}, r"0\.txt: 0\.png has 0\.TXT already"),
        ({"metadata.csv": "file_name;text\n0.png;a\n"}, r"csv, line 2: has no file_name; the first line must be"),
        ({"metadata.csv": "file_name,text\n0.png\n"}, r"csv, line 2: has no text"),
        ({"metadata.csv": "file_name,text\n0.png,a dog, asleep\n"}, r"csv, line 2: has more cells"),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": "a", "text": "b"}'}, r"jsonl, line 1: .*comes twice"),
        ({"metadata.csv": "file_name,text\n9.png,a\n"}, r"csv, line 2: there is no picture 9\.png"),
        ({"0.txt": b"a\0b"}, r"0\.txt: cannot be read as text \(it holds zero bytes\)"),
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
