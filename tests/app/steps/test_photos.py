"""What the buttons of step 1 do, called as Gradio calls them."""

from __future__ import annotations

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from gsoft_diffusion.app.steps.photos import Handlers
from gsoft_diffusion.app.subjects import new_subject

SIZE = (90, 80)


@pytest.fixture
def dog(page):
    return new_subject(page.workspace, "dog", "dog", "sks")


@pytest.fixture
def does(page, dog) -> Handlers:
    return Handlers(page)


@pytest.fixture
def uploaded(page):
    """Saves a picture as a browser's upload, and returns its path."""

    def save(picture: Image.Image, name: str = "a.png") -> str:
        place = page.workspace.uploads / "abc" / name
        place.parent.mkdir(exist_ok=True)
        picture.save(place)
        return str(place)

    return save


@pytest.fixture
def photo(does, uploaded) -> str:
    """The name of a photo that was dropped."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)
    assert does.added("dog", [uploaded(Image.fromarray(noise))])[1] == ""
    return "a.png"


def half(background, subject, mode: str) -> Image.Image:
    """A picture whose left half has the subject's colour."""
    picture = Image.new(mode, SIZE, background)
    picture.paste(subject, (0, 0, SIZE[0] // 2, SIZE[1]))
    return picture


def test_uploads_are_gone_once_they_were_taken_or_refused(page, does, uploaded):
    files = [uploaded(Image.new("RGB", SIZE, "red")), uploaded(Image.new("RGBA", SIZE, (0, 0, 0, 0)), "b.png")]
    _, failures, cards = does.added("dog", files)
    assert "b.png: transparent everywhere" in failures
    assert "a.png" in cards
    assert not [path for path in page.workspace.uploads.rglob("*") if path.is_file()]


def test_a_file_that_was_not_uploaded_is_neither_taken_nor_deleted(page, does, photo):
    """Gradio refuses it as well, before this is called."""
    private = page.workspace.root.parent / "private.png"
    Image.new("L", SIZE).save(private)
    link = page.workspace.uploads / "link.png"
    link.symlink_to(private)
    before = private.read_bytes()
    for path in (private, link):
        assert f"{path.name}: was not uploaded" in does.added("dog", [str(path)])[1]
        assert f"{path.name}: was not uploaded" in does.masked("dog", photo, None, str(path))[0]
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "picture",
    [
        half("black", "white", "L"),
        half("black", "red", "RGB"),  # of black and another colour the other is the subject
        half((200, 30, 30, 0), (200, 30, 30, 255), "RGBA"),  # a cut-out
        half("black", "white", "L").resize((180, 160)),
    ],
    ids=["white", "red", "cut-out", "larger"],
)
def test_a_mask_made_elsewhere_is_read_as_training_reads_it(does, dog, photo, uploaded, picture):
    said, cards, _ = does.masked("dog", photo, None, uploaded(picture, "mask.png"))
    assert "Kept" in said
    assert "with a mask" in cards
    mask = np.asarray(Image.open(dog.photos / "a-masklabel.png"))
    assert (mask[:, :40] > 250).all()
    assert (mask[:, 50:] < 5).all()


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (half("blue", "red", "RGB"), "mask.png: has several colours"),
        (half("black", "white", "L").resize(SIZE[::-1]), "the mask of a.png: has 80×90 pixels, and the photo 90×80"),
        (half(0, 76, "L"), "the mask of a.png: goes only from grey 0 to grey 76"),
    ],
    ids=["colours", "shape", "grey"],
)
def test_a_mask_that_could_mean_several_things_is_refused_and_not_kept(page, does, dog, photo, uploaded, picture, says):
    said, cards, _ = does.masked("dog", photo, None, uploaded(picture, "mask.png"))
    assert says in said
    assert str(page.workspace.root) not in said
    assert cards == gr.skip()
    assert [path.name for path in dog.photos.iterdir()] == ["a.png"]
    assert not [path for path in page.workspace.uploads.rglob("*") if path.is_file()]


def test_a_mask_of_very_many_pixels_is_refused_before_it_is_read(does, dog, photo, uploaded, monkeypatch):
    monkeypatch.setattr("gsoft_diffusion.app.subjects.MOST_PIXELS", 100)
    said, _, _ = does.masked("dog", photo, None, uploaded(half(0, 255, "L"), "mask.png"))
    assert f"mask.png: has {SIZE[0]}×{SIZE[1]} pixels, too many" in said


def test_a_photo_that_is_gone_is_said_on_the_page(does, photo):
    with pytest.raises(gr.Error, match=r"dog has no photo b\.png"):
        does.picked("dog", gr.EventData(None, {"pick": "b.png"}))


def test_what_is_painted_is_the_mask(does, dog, photo):
    painted = {"layers": [half((0, 0, 0, 0), (255, 48, 48, 200), "RGBA")]}
    assert "Kept" in does.masked("dog", photo, painted, None)[0]
    assert Image.open(dog.photos / "a-masklabel.png").getextrema() == (0, 255)


@pytest.mark.parametrize("painted", [None, {"layers": []}, {"layers": [Image.new("RGBA", SIZE)]}])
def test_nothing_that_is_painted_is_no_mask(does, dog, photo, painted):
    assert "nothing is painted" in does.masked("dog", photo, painted, None)[0]
    assert [path.name for path in dog.photos.iterdir()] == ["a.png"]


def test_the_page_follows_a_new_name(page, does, dog, photo):
    does.captioned("dog", photo, "a sks dog on a sofa")
    dog.keep({"token": "ohwx", "base": "a/b", "resolution": 512})
    called, cards, named, caption, prompts = does.renamed("dog", photo, "sks", "a sks dog asleep", "a {0} {1}")
    assert "an ohwx dog" in called
    assert "a ohwx dog on a sofa" in cards
    assert "enlarged to 512×512" in cards
    assert (named, caption, prompts) == ("ohwx", "a ohwx dog asleep", gr.skip())
    assert does.renamed("none", "", "sks", "x") == (gr.skip(),) * 4


def test_the_subject_that_was_chosen_last_is_shown(page, does, dog):
    new_subject(page.workspace, "cat", "cat", "sks")
    assert does.opened("dog")[0]["value"] == "dog"
    assert does.opened("")[0]["value"] == "cat"  # the latest
    assert does.opened("gone")[-1] == "sks"


def test_a_press_shows_the_photo_with_its_caption(does, photo):
    assert "Kept" in does.captioned("dog", photo, "a sks dog on a sofa")[0]
    name, _, _, caption, editor, mask_file, cards, _ = does.picked("dog", gr.EventData(None, {"pick": photo}))
    assert (name, caption, editor["background"].size) == ("a.png", "a sks dog on a sofa", SIZE)
    assert mask_file is None  # one that was dropped for another photo is not this one's
    assert 'aria-pressed="true"' in cards
    assert does.removed("dog", photo)[1] == ""


def test_a_photo_that_is_removed_can_be_put_back(does, photo):
    assert not does.changed("dog")[2]["visible"]
    *_, edit, put_back = does.removed("dog", photo)
    assert not edit["visible"]
    assert (put_back["value"], put_back["visible"]) == ("Put a.png back", True)
    assert does.opened("dog")[3]["visible"]  # also when the page is loaded anew
    said, cards, put_back = does.restored("dog")
    assert said == ""
    assert "a.png" in cards
    assert not put_back["visible"]
    assert "no photo that was removed" in does.restored("dog")[0]


def test_a_photo_that_goes_away_while_it_is_shown_is_said(does, photo, monkeypatch):
    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("gsoft_diffusion.app.fragments.photo_cards", gone)
    assert "its photos have changed" in does.changed("dog")[1]


def test_a_subject_is_deleted_and_another_one_shown(page, does, dog, photo):
    cat = new_subject(page.workspace, "Minka", "cat", "sks")
    does.removed("dog", photo)
    assert does.before_deleting("dog").startswith("Delete “dog” with its photos (0)")
    choice, question, new = does.deleted("dog")
    assert (choice["value"], question["visible"], new["open"]) == (cat.name, False, False)
    assert not dog.folder.exists()
    cat.photos.rmdir()
    assert "(0)" in does.before_deleting(cat.name)
    choice, _, new = does.deleted(cat.name)
    assert (choice["choices"], choice["value"], new["open"]) == ([], None, True)
    with pytest.raises(gr.Error, match="there is no subject dog"):  # in another window it is still chosen
        does.deleted("dog")
