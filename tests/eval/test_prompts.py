"""Subjects and prompts: the bundled set, the public one, and a person's own folder."""

from __future__ import annotations

import pytest
from PIL import Image

from eval.prompts import UNRELATED, fill, prompts_for, read_templates
from eval.subjects import Subject, is_live, read_subjects
from gsoft_diffusion import UserError


def photo(folder, name="0.png"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / name)


def test_bundled_subjects_are_complete():
    subjects = read_subjects("data/subjects")
    assert len(subjects) >= 6
    assert all(4 <= len(subject.photos()) <= 5 for subject in subjects)
    assert {subject.live for subject in subjects} == {True, False}


def test_public_layout(tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\nbear_plushie,stuffed animal\ncat2,cat\ngone,vase\n\nPrompts\n\na,b\n"
    )
    for name in ("bear_plushie", "cat2", "a", "not_listed"):
        photo(tmp_path / name)
    assert read_subjects(tmp_path) == [
        Subject("bear_plushie", "stuffed animal", False, tmp_path / "bear_plushie"),
        Subject("cat2", "cat", True, tmp_path / "cat2"),
    ]


def test_tables_as_spreadsheets_save_them(tmp_path):
    photo(tmp_path / "hu\u0308ndin")
    table = "\ufeffsubject,class_word,kind\nhündin,dog,live\n"
    (tmp_path / "subjects.csv").write_text(table, encoding="utf-8", newline="\r\n")
    assert read_subjects(tmp_path) == [Subject("hündin", "dog", True, tmp_path / "hu\u0308ndin")]


def test_subjects_that_are_left_out_or_named_twice_are_refused(tmp_path):
    photo(tmp_path / "rex")
    table = tmp_path / "subjects.csv"
    table.write_text("subject,class_word,kind\nrex,dog,live\nmax,dog,live\n")
    with pytest.raises(UserError, match="subject max has no folder of that name"):
        read_subjects(tmp_path)
    table.write_text("subject,class_word,kind\nrex,dog,live\nrex,cat,live\n")
    with pytest.raises(UserError, match="subject rex comes twice"):
        read_subjects(tmp_path)


def test_own_folder_needs_a_class_word(tmp_path):
    photo(tmp_path / "rex")
    with pytest.raises(UserError, match="say what the photos show"):
        read_subjects(tmp_path / "rex")
    assert read_subjects(tmp_path / "rex", "dog") == [Subject("rex", "dog", True, tmp_path / "rex")]
    (tmp_path / "subjects.csv").write_text("subject,class_word,kind\nrex,dog,live\n")
    with pytest.raises(UserError, match="leave out the class word cat"):
        read_subjects(tmp_path, "cat")


def test_tables_do_not_lead_out_of_the_folder(tmp_path):
    photo(tmp_path / "secret")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "subjects.csv").write_text("subject,class_word,kind\n../secret,dog,live\n")
    with pytest.raises(UserError, match=r"subjects\.csv: subject \.\./secret has no folder of that name beside"):
        read_subjects(tmp_path / "set")


def test_folders_that_hold_no_subjects_are_named(tmp_path):
    with pytest.raises(UserError, match="neither photos nor"):
        read_subjects(tmp_path)
    (tmp_path / "subjects.csv").write_text("name\nx\n")
    with pytest.raises(UserError, match="has no column subject"):
        read_subjects(tmp_path)


@pytest.mark.parametrize(
    ("template", "token", "word", "expected"),
    [
        ("a {0} {1} on the beach", "sks", "dog", "a sks dog on the beach"),
        ("a {0} {1} on the beach", None, "dog", "a dog on the beach"),
        ("a {0} {1} on the beach", None, "owl", "an owl on the beach"),
        ("a red {0} {1}", None, "owl", "a red owl"),
        ("a photo of a {0} {1}", None, "unicorn", "a photo of a unicorn"),
        ("a {0} {1}", "sks", r"\1 {0}", r"a sks \1 {0}"),  # words are never read as patterns
    ],
)
def test_fill(template, token, word, expected):
    assert fill(template, token, word) == expected


def test_prompts_of_a_subject(tmp_path):
    live, thing = Subject("rex", "dog", True, tmp_path), Subject("cup", "cup", False, tmp_path)
    prompts = prompts_for(live, "sks")
    kinds = [prompt.kind for prompt in prompts]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "context": 25,
        "base": 1,
        "class": 1,
        "unrelated": len(UNRELATED),
    }
    assert prompts[0].text == "a sks dog in the jungle"
    assert prompts[0].plain == "a dog in the jungle"
    assert next(p for p in prompts if p.kind == "class").text == "a photo of a dog"
    assert {p.text for p in prompts_for(thing, "sks") if "wheat" in p.text}
    assert not {p.text for p in prompts if "wheat" in p.text}  # the other list
    assert len(prompts_for(live, "sks", max_prompts=3)) == 5 + len(UNRELATED)


def test_own_templates(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff  # two scenes\na {0} {1} in space\n\na {0} {1} at sea\n")
    assert read_templates(str(path), live=True) == ["a {0} {1} in space", "a {0} {1} at sea"]
    path.write_text("a dog in space\n")
    with pytest.raises(UserError, match='"a dog in space" has no place for the subject'):
        read_templates(str(path), live=True)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_templates(str(path), live=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_templates("no_such_file.txt", live=True)


@pytest.mark.parametrize(
    ("class_word", "live"),
    [
        ("dog", True),
        ("Dog", True),
        ("white puppy", True),
        ("woman", True),
        ("stuffed animal", False),
        ("hot dog bun", False),
        ("", False),
    ],
)
def test_class_words_say_who_is_live(class_word, live):
    assert is_live(class_word) is live
