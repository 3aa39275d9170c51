"""Text as systems and editors write it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import composed, on_disk, read_csv, read_prompts, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends(tmp_path, encoding, end):
    path = tmp_path / "text.txt"
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    path.write_bytes(f"{mark}größer{end}\u2028{end}".encode(encoding))
    assert read_text(path) == "größer\n\u2028\n"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\xe4", "text".encode("utf-16-le"), None])
def test_what_is_no_text_is_named(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^--flag f: cannot be read as text"):
        read_text(path, "--flag f")
    with pytest.raises(UserError, match=r"text\.txt: cannot be read as text"):
        read_text(path)


def test_prompts_without_comments(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeff# a comment\r\n\r\n  a dog # 1 \r\n\t# another\r\nu\u0308ber\r\n", encoding="utf-8", newline=""
    )
    assert read_prompts(path) == ["a dog # 1", "über"]


def test_tables(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('\ufeffa, b\r\n1,"x, ""y""\r\nz"\r\n2\r\n3, 4,\r\n', encoding="utf-8", newline="")
    assert list(read_csv(path)) == [(3, {"a": "1", "b": 'x, "y"\nz'}), (4, {"a": "2"}), (5, {"a": "3", "b": "4"})]
    path.write_text(f"a\n{'x' * 200_000}\n")
    with pytest.raises(UserError, match=r"table\.csv, line 2: cannot be read as a table"):
        list(read_csv(path))


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_paths_are_found_in_either_normal_form(tmp_path, monkeypatch, forms):
    given, kept = (Path(*(unicodedata.normalize(form, part) for part in ("Hündin", "größe.txt"))) for form in forms)
    (tmp_path / kept).parent.mkdir()
    (tmp_path / kept).write_text("x")
    assert on_disk(tmp_path / given) == tmp_path / kept
    assert read_text(tmp_path / given) == "x"
    monkeypatch.chdir(tmp_path)
    assert on_disk(given) == kept


def test_paths_that_are_not_there_stay(tmp_path):
    for path in (tmp_path / "ü" / "x", Path("nowhere"), tmp_path / ("x" * 300), Path("a\0b")):
        assert on_disk(path) == path
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "üé")).touch()
    neither = tmp_path / "u\u0308é"
    assert on_disk(neither) == neither  # could be either


def test_tables_with_cells_beyond_the_named_columns_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("file_name,text\n1.png,a dog, asleep\n")
    with pytest.raises(UserError, match=r"table\.csv, line 2: has more cells .* between quotes"):
        list(read_csv(path))


def test_joined_files_leave_no_marks(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(2 * "a dog\n# a comment\n".encode("utf-8-sig"))
    assert read_prompts(path) == ["a dog", "a dog"]


def test_what_is_new_in_a_folder_is_beside_what_is_there(tmp_path):
    kept, given = (unicodedata.normalize(form, "Hündin") for form in ("NFD", "NFC"))
    (tmp_path / kept).mkdir()
    assert on_disk(tmp_path / given / "new" / "x") == tmp_path / kept / "new" / "x"


def test_composed():
    assert composed("u\u0308") == "ü"
