"""Subjects: what is taken from a stranger's hand, and what training is given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.app import subjects as module
from gsoft_diffusion.app.subjects import MOST_BYTES, new_subject, subject_of, subjects
from gsoft_diffusion.config.concept import Concept
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos import folder as folder_module
from gsoft_diffusion.photos.folder import read_folder


@pytest.fixture
def dog(workspace):
    return new_subject(workspace, "My Dog!", "a dog", "sks")


@pytest.fixture
def upload(tmp_path):
    """A picture as it was uploaded."""
    rng = np.random.default_rng(0)
    path = tmp_path / "upload"
    Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(path, "PNG")
    return path


def test_a_subject_is_found_again(workspace, dog):
    assert subjects(workspace) == [("My Dog!", "my-dog")]
    again = subject_of(workspace, "my-dog")
    assert (again.class_word, again.token, again.concept.name) == ("dog", "sks", "a sks dog")
    again.keep({"base": "a/b", "resolution": 512, "settings": {"max_train_steps": 7}})
    kept = subject_of(workspace, "my-dog")
    assert (kept.base, kept.resolution, kept.settings) == ("a/b", 512, {"max_train_steps": 7})


@pytest.mark.parametrize(("name", "word", "says"), [("x", " ", "say in a word or two"), ("my dog", "cat", "already")])
def test_a_subject_without_a_word_or_with_a_taken_name_is_refused(workspace, dog, name, word, says):
    with pytest.raises(UserError, match=says):
        new_subject(workspace, name, word, "sks")


@pytest.mark.parametrize("name", ["", "..", "../my-dog", "my-dog/..", "cat", "My Dog"])
def test_other_names_are_no_subjects(workspace, dog, name):
    with pytest.raises(UserError, match="there is no subject"):
        subject_of(workspace, name)


@pytest.mark.parametrize(
    ("called", "kept"),
    [
        ("IMG 1.PNG", "img-1.png"),
        ("../../etc/passwd.png", "passwd.png"),
        ("..\\..\\x.jpg", "x.jpg"),
        ("<script>.png", "script.png"),
        ("дом.webp", "picture.webp"),
        ("a-masklabel.png", "a-masklabel-2.png"),
        (".png.png", "png.png"),
    ],
)
def test_photos_get_plain_names(dog, upload, called, kept):
    assert dog.add_photo(upload, called).name == kept
    assert [path.name for path in dog.photos.iterdir()] == [kept]


def test_photos_of_one_name_stay_apart(dog, upload):
    names = [dog.add_photo(upload, name).name for name in ("a.png", "a.jpg", "A.png")]
    assert names == ["a.png", "a-2.jpg", "a-3.png"]


def test_captions_and_prompts_follow_the_token(dog, upload):
    dog.add_photo(upload, "a.png")
    (dog.photos / "a.txt").write_text("a photo of a sks dog with risks, sks!")
    dog.keep({"settings": {"validation_prompts": ["a sks dog in the snow"], "max_train_steps": 5}})
    dog.keep({"token": "ohwx", "base": "x"})
    assert dog.seen()[0].photo.prompt == "a photo of a ohwx dog with risks, ohwx!"
    assert dog.settings == {"validation_prompts": ["a ohwx dog in the snow"], "max_train_steps": 5}


def test_a_run_with_the_former_token_keeps_its_captions(dog, upload):
    """One that waits in the queue, or goes on later."""
    dog.add_photo(upload, "a.png")
    dog.set_caption("a.png", "a sks dog on a sofa")
    run = Concept(str(dog.photos), "dog", "sks")
    dog.keep({"token": "ohwx"})
    photos = read_folder(run.instance_data_dir, "--instance_data_dir", "", run.named).photos
    assert [photo.prompt for photo in photos] == ["a sks dog on a sofa"]


def test_a_caption_with_a_name_that_is_not_known_is_refused(dog, upload):
    dog.add_photo(upload, "a.png")
    with pytest.raises(UserError, match=r"\{2\} stands for subject 2, but there are 1"):
        dog.set_caption("a.png", "a {0} {1} with a {2} {3}")
    dog.set_caption("a.png", "a {0} {1} asleep")
    assert dog.seen()[0].photo.prompt == "a sks dog asleep"


def test_names_of_any_letters_are_kept(workspace):
    made = [
        new_subject(workspace, name, word, "sks") for name, word in (("Рекс", "dog"), ("小明", "dog"), ("Мурка", "кот"))
    ]
    assert [subject.name for subject in made] == ["dog", "dog-2", "subject"]
    assert sorted(subjects(workspace)) == [("Мурка", "subject"), ("Рекс", "dog"), ("小明", "dog-2")]
    with pytest.raises(UserError, match="there is a subject Рекс already"):
        new_subject(workspace, "Рекс", "dog", "sks")


def test_a_mask_that_is_the_photos_transparency_cannot_be_taken_away(dog, tmp_path):
    picture = Image.new("RGBA", (70, 70), (9, 9, 9, 0))
    picture.paste((200, 30, 30, 255), (0, 0, 30, 70))
    picture.save(tmp_path / "upload.png")
    dog.add_photo(tmp_path / "upload.png", "a.png")
    with pytest.raises(UserError, match="its mask is its own transparency"):
        dog.set_mask("a.png", None)


@pytest.mark.parametrize("called", ["x.svg", "x.html", "x", "x.png.exe", "x.gif", ""])
def test_other_kinds_of_file_are_refused_by_name(dog, upload, called):
    with pytest.raises(UserError, match="is no kind of picture known here"):
        dog.add_photo(upload, called)
    assert list(dog.photos.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50)])
def test_what_is_no_picture_inside_is_refused_and_not_kept(dog, tmp_path, content):
    path = tmp_path / "upload"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^x\.png: damaged or not a picture"):
        dog.add_photo(path, "x.png")
    assert list(dog.photos.iterdir()) == []


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (Image.new("RGBA", (70, 70), (9, 9, 9, 0)), r"^x\.png: transparent everywhere"),
        (Image.new("RGB", (1, 70)), r"^x\.png: only 1×70 pixels"),
    ],
)
def test_what_training_refuses_is_refused_and_not_kept(dog, tmp_path, picture, says):
    picture.save(tmp_path / "upload", "PNG")
    with pytest.raises(UserError, match=says):
        dog.add_photo(tmp_path / "upload", "x.png")
    assert list(dog.photos.iterdir()) == []
    assert [path.name for path in dog.folder.iterdir() if path.is_dir()] == ["photos"]


def test_large_files_and_many_pixels_are_refused(dog, upload, monkeypatch):
    monkeypatch.setattr(module, "MOST_PIXELS", 80 * 90 - 1)
    with pytest.raises(UserError, match=r"^x\.png: has 90×80 pixels, too many"):
        dog.add_photo(upload, "x.png")
    with upload.open("r+b") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(UserError, match=r"^x\.png: has 50 MB, and 50 are allowed"):
        dog.add_photo(upload, "x.png")
    assert list(dog.photos.iterdir()) == []


def test_a_picture_that_unpacks_to_very_much_is_refused_before_it_does(dog, tmp_path):
    path = tmp_path / "upload"
    Image.new("1", (20_000, 20_000)).save(path, "PNG")
    with pytest.raises(UserError, match=r"^x\.png: too large a picture"):
        dog.add_photo(path, "x.png")


def test_a_link_is_no_upload(dog, upload, tmp_path):
    (tmp_path / "link").symlink_to(upload)
    with pytest.raises(UserError, match="is no file"):
        dog.add_photo(tmp_path / "link", "x.png")


def test_too_many_photos_are_refused(dog, upload, monkeypatch):
    monkeypatch.setattr(module, "MOST_PHOTOS", 2)
    dog.add_photo(upload, "a.png")
    dog.add_photo(upload, "b.png")
    with pytest.raises(UserError, match="there are 2 photos already"):
        dog.add_photo(upload, "c.png")


def test_a_full_disk_is_said_and_leaves_nothing(dog, upload, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"^a\.png: cannot be kept \(No space left on device\)"):
        dog.add_photo(upload, "a.png")
    assert list(dog.photos.iterdir()) == []


def test_photos_are_read_once_as_long_as_nothing_changes(workspace, dog, upload, monkeypatch):
    """Each thumbnail and each press asks for them, and a photo of a camera takes a quarter of a second to read."""
    read, real = [], folder_module.read_picture
    monkeypatch.setattr(folder_module, "read_picture", lambda path: read.append(path.name) or real(path))
    for name in ("a.png", "b.png"):
        dog.add_photo(upload, name)
    assert read == ["a.png", "b.png"]  # each when it came, and not those before it
    for _ in range(3):
        again = subject_of(workspace, "my-dog")
        assert [each.photo for each in again.seen()] == [again.photo("a.png"), again.photo("b.png")]
    assert read == ["a.png", "b.png"] * 2
    dog.set_caption("a.png", "a sks dog on a sofa")
    dog.keep({"resolution": 512})
    assert dog.photo("a.png").prompt == "a sks dog on a sofa"
    assert "enlarged to 512" in dog.seen()[0].remarks[0]


def test_remarks_are_said_beside_the_photo(dog, upload):
    dog.add_photo(upload, "a.png")
    dog.add_photo(upload, "b.png")
    dog.keep({"resolution": 512})
    first, second = dog.seen()
    assert first.remarks == ("90×80 pixels, enlarged to 512×512: it will look soft",)
    assert second.remarks[0] == "the same picture as a.png"


def test_captions_and_masks_are_what_training_reads(dog, upload):
    dog.add_photo(upload, "a.png")
    dog.set_caption("a.png", "  a sks dog\non a sofa ")
    mask = Image.new("L", (45, 40))
    mask.paste(255, (0, 0, 20, 40))
    dog.set_mask("a.png", mask)
    (photo,) = read_folder(dog.photos, "--instance_data_dir", "a photo of a sks dog").photos
    assert photo.prompt == "a sks dog on a sofa"
    assert photo.mask == dog.photos / "a-masklabel.png"
    dog.set_caption("a.png", "a photo of a sks dog")  # what it would be without one
    dog.set_mask("a.png", None)
    (photo,) = dog.seen()
    assert (photo.photo.prompt, photo.photo.mask) == ("a photo of a sks dog", None)
    assert [path.name for path in dog.photos.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Image.new("L", (90, 80), 76), "goes only from grey 76 to grey 76 of 255"),
        (Image.new("L", (80, 90), 255), "has 80×90 pixels, and the photo 90×80; give it the photo's shape"),
        (Image.new("L", (90, 80)), "black everywhere: white marks the subject"),
        (Image.new("L", (45, 45), 255), "has 45×45 pixels, and the photo 90×80"),
    ],
)
def test_a_mask_that_training_would_refuse_is_refused_and_the_one_before_stays(dog, upload, mask, says):
    dog.add_photo(upload, "a.png")
    half = Image.new("L", (90, 80))
    half.paste(255, (0, 0, 45, 80))
    dog.set_mask("a.png", half)
    kept = (dog.photos / "a-masklabel.png").read_bytes()
    with pytest.raises(UserError, match=rf"^the mask of a\.png: {says}"):
        dog.set_mask("a.png", mask)
    assert (dog.photos / "a-masklabel.png").read_bytes() == kept


def test_a_mask_that_is_painted_all_over_is_taken(dog, upload):
    dog.add_photo(upload, "a.png")
    dog.set_mask("a.png", Image.new("L", (90, 80), 255))
    assert dog.seen()[0].remarks == ("with a mask that is white everywhere, which has no effect",)


@pytest.mark.parametrize("bad", ["a-masklabel.png", "b.png"])
def test_a_file_that_cannot_be_used_does_not_lock_the_subject(dog, upload, bad):
    """As somebody may put into the folder; each of the page's buttons still does what it says."""
    for name in ("a.png", "b.png"):
        dog.add_photo(upload, name)
    Image.new("RGBA", (90, 80), (0, 0, 0, 0)).save(dog.photos / bad)
    with pytest.raises(UserError, match=f"{bad}: transparent everywhere"):
        dog.seen()
    dog.set_caption("a.png", "a sks dog asleep")
    dog.set_mask("a.png", None)
    dog.remove_photo("b.png")
    (left,) = dog.seen()
    assert (left.photo.path.name, left.photo.prompt, left.photo.mask) == ("a.png", "a sks dog asleep", None)


def test_a_photo_goes_with_its_caption_and_mask(dog, upload):
    for name in ("a.png", "b.png"):
        dog.add_photo(upload, name)
        dog.set_caption(name, "a sks dog asleep")
        dog.set_mask(name, Image.linear_gradient("L").resize((90, 80)))
    dog.remove_photo("a.png")
    assert sorted(path.name for path in dog.photos.iterdir()) == ["b-masklabel.png", "b.png", "b.txt"]


def test_a_photo_that_was_removed_is_put_back_with_its_caption_and_mask(dog, upload):
    dog.add_photo(upload, "a.png")
    dog.set_caption("a.png", "a sks dog asleep")
    dog.set_mask("a.png", Image.linear_gradient("L").resize((90, 80)))
    (before,) = dog.seen()
    dog.remove_photo("a.png")
    assert (dog.removed, dog.seen()) == ("a.png", ())
    assert dog.put_back() == "a.png"
    assert (dog.removed, dog.seen()) == (None, (before,))
    with pytest.raises(UserError, match="my-dog has no photo that was removed"):
        dog.put_back()


def test_the_photo_that_was_removed_last_comes_back_first_beside_one_that_has_its_name_now(dog, upload):
    for name in ("a.png", "b.png"):
        dog.add_photo(upload, name)
        dog.set_caption(name, f"a sks dog, {name}")
        dog.remove_photo(name)
    dog.add_photo(upload, "b.png")
    assert [dog.put_back(), dog.put_back()] == ["b-2.png", "a.png"]
    prompts = {each.photo.path.name: each.photo.prompt for each in dog.seen()}
    assert prompts == {"a.png": "a sks dog, a.png", "b.png": "a photo of a sks dog", "b-2.png": "a sks dog, b.png"}


def test_a_photo_in_capitals_that_is_put_back_replaces_none_of_its_name(dog, upload):
    (dog.photos / "IMG_1.png").write_bytes(upload.read_bytes())
    dog.remove_photo("IMG_1.png")
    (dog.photos / "IMG_1.png").write_bytes(upload.read_bytes())
    assert dog.put_back() == "IMG_1-2.png"
    assert sorted(path.name for path in dog.photos.iterdir()) == ["IMG_1-2.png", "IMG_1.png"]


def test_a_photo_that_is_put_back_has_the_new_name_in_its_caption(dog, upload):
    dog.add_photo(upload, "a.png")
    dog.set_caption("a.png", "a sks dog asleep")
    dog.remove_photo("a.png")
    dog.keep({"token": "ohwx", "base": "x"})
    dog.put_back()
    assert dog.seen()[0].photo.prompt == "a ohwx dog asleep"


def test_only_so_many_photos_that_were_removed_stay(dog, upload, monkeypatch):
    monkeypatch.setattr(module, "MOST_REMOVED", 2)
    for name in ("a.png", "b.png", "c.png"):
        dog.add_photo(upload, name)
        dog.remove_photo(name)
    assert [dog.put_back(), dog.put_back(), dog.removed] == ["c.png", "b.png", None]


def test_a_photo_that_cannot_be_removed_is_said_and_stays(dog, upload, monkeypatch):
    def refused(path, target):
        raise OSError(30, "Read-only file system")

    dog.add_photo(upload, "a.png")
    monkeypatch.setattr(module.Path, "rename", refused)
    with pytest.raises(UserError, match=r"^a\.png: cannot be removed \(Read-only file system\)"):
        dog.remove_photo("a.png")
    assert (dog.removed, len(dog.seen())) == (None, 1)


def test_names_that_differ_in_capitals_stay_apart(dog, upload):
    """On file systems to which they are one, the second would take the first one's place."""
    (dog.photos / "IMG.PNG").write_bytes(upload.read_bytes())
    assert dog.add_photo(upload, "img.png").name == "img-2.png"


def test_a_folder_that_no_subject_has_is_not_offered(workspace, dog):
    (workspace.subjects / "My Cat").mkdir()
    assert subjects(workspace) == [("My Dog!", "my-dog")]


@pytest.mark.parametrize("name", ["../subject.json", "b.png", "", "a.txt"])
def test_what_is_no_photo_of_the_subject_is_left_alone(dog, upload, name):
    dog.add_photo(upload, "a.png")
    dog.set_caption("a.png", "a sks dog asleep")
    before = sorted(dog.folder.rglob("*"))
    for action in (dog.remove_photo, lambda name: dog.set_caption(name, "x"), lambda name: dog.set_mask(name, None)):
        with pytest.raises(UserError, match="has no photo"):
            action(name)
    assert sorted(dog.folder.rglob("*")) == before
