"""Step 1: the subject and its photos, as training will see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from gsoft_diffusion.app import fragments
from gsoft_diffusion.app.steps.common import LOUD, PICK, QUIET, Page, ask_first, choose, remember, says_why
from gsoft_diffusion.app.subjects import Subject, check_size, new_subject, subjects, with_token
from gsoft_diffusion.app.typed import Typed
from gsoft_diffusion.config.concept import UNIQUE_TOKEN
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.photos.masks import read_mask

EDITED = 1024  # pixels of the longer side of a photo on which a mask is painted


@dataclass(frozen=True)
class PhotosStep:
    """What other steps look at.

    subject: the choice of a subject, whose photos these are. follow: has the page show the subject anew after events
    that may give it another base model and another name. It takes the events, and what else may have the name in it;
    it returns the events after which that has the new name.
    """

    subject: Any
    follow: Callable[[Sequence[Any], Sequence[Any]], list[Any]]


def build(page: Page, demo: gr.Blocks, before: Any) -> PhotosStep:
    """Lay out the step.

    page: what it works on. demo: the page, which fills it when it is opened. before: the subject that was chosen last.
    """
    does, there = Handlers(page), subjects(page.workspace)
    gr.Markdown("Three to five photos are enough: the same subject, from different sides, in different places.")
    subject = gr.Dropdown(there, value=None, label="Subject", elem_id="subject")
    remember(subject, before)
    named = gr.State("")  # the subject's token, with which the page's texts are written
    with gr.Accordion("A new subject", open=not there, elem_id="new-subject") as new:
        with gr.Row():
            name = gr.Textbox(label="What you call it", placeholder="Rex", elem_id="subject-name")
            word = gr.Textbox(label="What it is, in a word or two", placeholder="dog", elem_id="class-word")
        create = gr.Button("Make it", variant="primary", elem_id="create-subject")
    said = gr.HTML(elem_id="subject-said")
    called = gr.HTML(elem_id="called")
    with gr.Column(visible=bool(there)) as with_subject:
        upload = gr.File(file_count="multiple", label="Drop its photos here", height=150, elem_id="upload")
        upload_said = gr.HTML(elem_id="upload-said")
        cards = gr.HTML(js_on_load=PICK, elem_id="cards")
        put_back = gr.Button("Put it back", visible=False, elem_id="put-back")
        delete = gr.Button("Delete this subject…", size="sm", elem_id="delete-subject")
        question = ask_first(delete, subject, does.before_deleting)
    chosen = gr.Textbox("", visible=False)  # the name of the photo that is edited
    with gr.Column(visible=False, elem_id="edit-photo") as edit:
        title = gr.Markdown()
        caption = gr.Textbox(
            label="Caption",
            info="names what is not the subject (a sofa, the snow), so that it is not learned as a part of it",
            elem_id="caption",
        )
        with gr.Row():
            save_caption = gr.Button("Keep the caption", elem_id="save-caption")
            remove = gr.Button("Remove the photo", variant="stop", elem_id="remove-photo")
        with gr.Accordion("Mask: where the subject is", open=False, elem_id="mask"):
            gr.Markdown(
                "Paint over the subject. What is not painted counts less, if `unmasked_weight` in step 3 is below 1. "
                "A mask made elsewhere, white on black, can be dropped below instead."
            )
            editor = gr.ImageEditor(
                type="pil",
                image_mode="RGBA",
                sources=[],
                transforms=[],
                layers=False,
                buttons=[],
                brush=gr.Brush(default_size=40, colors=["#ff3030"], color_mode="fixed"),
                label="Paint",
                elem_id="mask-editor",
            )
            mask_file = gr.File(label="Or a mask as a picture", height=90, elem_id="mask-file")
            with gr.Row():
                save_mask = gr.Button("Keep the mask", elem_id="save-mask")
                drop_mask = gr.Button("Take the mask away", elem_id="drop-mask")
        edit_said = gr.HTML(elem_id="edit-said")

    of_subject = [called, cards, put_back, with_subject, named]
    demo.load(does.opened, before, [subject, *of_subject], **QUIET)
    subject.change(does.changed, subject, [*of_subject, edit, chosen, upload_said], **QUIET)
    gr.on([create.click, word.submit], does.made, [name, word], [subject, said, name, word, new], **LOUD)
    upload.upload(does.added, [subject, upload], [upload, upload_said, cards], **LOUD)
    typed_caption = Typed("caption", {"caption": caption}, [subject, chosen])
    typed_caption.wait(cards.click)
    picked = cards.click(
        does.picked, subject, [chosen, edit, title, caption, editor, mask_file, cards, edit_said], **QUIET
    )
    captioned = gr.on(
        [save_caption.click, caption.submit], does.captioned, [subject, chosen, caption], [edit_said, cards], **LOUD
    )
    save_mask.click(does.masked, [subject, chosen, editor, mask_file], [edit_said, cards, mask_file], **LOUD)
    drop_mask.click(does.unmasked, [subject, chosen], [edit_said, cards], **LOUD)
    removed = remove.click(does.removed, [subject, chosen], [edit_said, cards, edit, put_back], **LOUD)
    put_back.click(does.restored, subject, [upload_said, cards, put_back], **LOUD)
    question.yes.click(does.deleted, question.about, [subject, question.shown, new], **LOUD)

    typed_name = Typed("new-subject", {"name": name, "word": word})
    unfold = typed_name.show(demo.load).then
    unfold(lambda *typed: gr.update(open=True) if any(typed) else gr.skip(), [name, word], new, **QUIET)
    typed_caption.show(picked.then)
    for event in (captioned, removed):
        typed_caption.forget(event.then)

    def follow(events: Sequence[Any], texts: Sequence[Any]) -> list[Any]:
        texts = [caption, *texts]
        given, shown = [subject, chosen, named, *texts], [called, cards, named, *texts]
        return [event.then(does.renamed, given, shown, **QUIET) for event in events]

    return PhotosStep(subject, follow)


@dataclass(frozen=True)
class Handlers:
    """What the step's events do. Each takes what components hold, and returns updates of components."""

    page: Page

    def shown(self, name: str, pick: str = "") -> tuple[Any, ...]:
        """How the subject is called, its photos, and the button that puts one back.

        name: of the subject. pick: the photo that is edited.
        """
        if not name:
            return fragments.hint("Give your subject a name to begin."), "", gr.update(visible=False)
        try:
            known = self.page.subject(name)
        except UserError as error:
            return fragments.failure(str(error)), "", gr.update(visible=False)
        text = f"In prompts it is called “{known.concept.name}”: its base model does not know the word {known.token}."
        last = known.removed
        back = gr.update(value=f"Put {last} back", visible=True) if last else gr.update(visible=False)
        return fragments.hint(text), _cards(known, pick), back

    def opened(self, name: str) -> tuple[Any, ...]:
        """The page is opened. name: the subject that was chosen last."""
        chosen = choose(subjects(self.page.workspace), name)
        known = self.page.known(chosen["value"])
        name, token = (known.name, known.token) if known else ("", "")
        return chosen, *self.shown(name), gr.update(visible=bool(name)), token

    def changed(self, name: str) -> tuple[Any, ...]:
        """Another subject is chosen. name: of the subject."""
        known = self.page.known(name)
        token = known.token if known else ""
        return *self.shown(name), gr.update(visible=bool(name)), token, gr.update(visible=False), "", ""

    def renamed(self, name: str, pick: str, token: str, *texts: str) -> tuple[Any, ...]:
        """The subject may have another base model, and another token.

        name: of the subject. pick: the photo that is edited. token: the one that texts are written with. texts: of the
        page; those with the former token get the new one.
        """
        known = self.page.known(name)
        if known is None:
            return tuple(gr.skip() for _ in (name, pick, token, *texts))
        new = [with_token(text, token, known.token) for text in texts]
        # The others may be typed into at this moment.
        changed = [gr.skip() if text == old else text for text, old in zip(new, texts, strict=True)]
        return *self.shown(name, pick)[:2], known.token, *changed

    def made(self, name: str, word: str) -> tuple[Any, ...]:
        """*Make it* is pressed. name: what its owner calls it. word: what it is."""
        try:
            known = new_subject(self.page.workspace, name, word, UNIQUE_TOKEN)
        except UserError as error:
            return gr.skip(), fragments.failure(_plain(error)), gr.skip(), gr.skip(), gr.skip()
        return choose(subjects(self.page.workspace), known.name), "", "", "", gr.update(open=False)

    def added(self, name: str, files: list[str] | None) -> tuple[Any, ...]:
        """Photos are dropped. name: of the subject. files: paths of the uploads."""
        failures = []
        for file in files or []:
            try:
                with _uploaded(self.page, file) as upload:
                    self.page.subject(name).add_photo(upload, upload.name)
            except UserError as error:
                failures.append(fragments.failure(str(error)))
        return None, "".join(failures), self.shown(name)[1]

    @says_why
    def picked(self, name: str, event: gr.EventData) -> tuple[Any, ...]:
        """A photo is pressed. name: of the subject. event: its `pick` is the photo's name."""
        known = self.page.subject(name)
        photo = known.photo(str(event.pick))
        image = open_image(photo.path)
        image.thumbnail((EDITED, EDITED))
        return (
            photo.path.name,
            gr.update(visible=True),
            f"#### {photo.path.name}",
            photo.prompt,
            {"background": image, "layers": [], "composite": None},
            None,  # a mask that was dropped for another photo
            _cards(known, photo.path.name),
            "",
        )

    def captioned(self, name: str, pick: str, text: str) -> tuple[str, str]:
        """*Keep the caption* is pressed. name: of the subject. pick: the photo's name. text: the caption."""
        try:
            self.page.subject(name).set_caption(pick, text)
        except UserError as error:
            return fragments.failure(str(error)), gr.skip()
        return fragments.hint("Kept."), self.shown(name, pick)[1]

    def masked(self, name: str, pick: str, painted: dict[str, Any] | None, file: str | None) -> tuple[Any, ...]:
        """*Keep the mask* is pressed.

        name: of the subject. pick: the photo's name. painted: what the editor holds. file: path of an upload, which
        goes before what is painted.
        """
        try:
            mask = _mask_in(self.page, file) if file else _painted(painted)
            self.page.subject(name).set_mask(pick, mask)
        except UserError as error:
            return fragments.failure(str(error)), gr.skip(), None
        return fragments.hint("Kept: what is red in the thumbnail counts less."), self.shown(name, pick)[1], None

    def unmasked(self, name: str, pick: str) -> tuple[str, str]:
        """*Take the mask away* is pressed. name: of the subject. pick: the photo's name."""
        try:
            self.page.subject(name).set_mask(pick, None)
        except UserError as error:
            return fragments.failure(str(error)), gr.skip()
        return "", self.shown(name, pick)[1]

    def removed(self, name: str, pick: str) -> tuple[Any, ...]:
        """*Remove the photo* is pressed. name: of the subject. pick: the photo's name."""
        try:
            self.page.subject(name).remove_photo(pick)
        except UserError as error:
            return fragments.failure(str(error)), gr.skip(), gr.skip(), gr.skip()
        _, cards, put_back = self.shown(name)
        return "", cards, gr.update(visible=False), put_back

    def restored(self, name: str) -> tuple[Any, ...]:
        """*Put it back* is pressed. name: of the subject."""
        try:
            self.page.subject(name).put_back()
        except UserError as error:
            return fragments.failure(str(error)), gr.skip(), gr.skip()
        return "", *self.shown(name)[1:]

    def before_deleting(self, name: str) -> str:
        """What is asked before a subject is deleted. name: of the subject. Raises UserError if it is gone."""
        known = self.page.subject(name)
        return (
            f"Delete “{known.called}” with its photos ({known.count}), captions and masks, also what was removed? "
            "What was learned from them stays, but a run that was stopped cannot go on. This cannot be undone."
        )

    @says_why
    def deleted(self, name: str) -> tuple[Any, ...]:
        """The question is answered by yes. name: of the subject that it was about."""
        known = self.page.subject(name)
        self.page.jobs.delete(known.folder)
        gr.Info(escape(f"{known.called} is deleted."))
        there = subjects(self.page.workspace)
        return choose(there, None), gr.update(visible=False), gr.update(open=not there)


def _cards(subject: Subject, pick: str = "") -> str:
    try:
        return fragments.photo_cards(subject, subject.seen(), pick)
    except UserError as error:
        return fragments.failure(str(error))
    except OSError as error:  # it was removed in another window at this moment
        return fragments.failure(f"{subject.name}: its photos have changed ({error.strerror}); load the page anew")


@contextmanager
def _uploaded(page: Page, file: str) -> Iterator[Path]:
    """An uploaded file's path; the file is gone at the end. Raises UserError for one that is not among the uploads."""
    path = Path(file)
    if not path.resolve().is_relative_to(page.workspace.uploads):
        raise UserError(f"{path.name}: was not uploaded")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _mask_in(page: Page, file: str) -> Image.Image:
    """The mask in an uploaded file: in shades of grey, white where the subject is."""
    with _uploaded(page, file) as upload:
        try:
            check_size(upload)
            return read_mask(upload)
        except UserError as error:
            raise UserError(str(error).replace(str(upload), upload.name)) from error


def _painted(painted: dict[str, Any] | None) -> Image.Image:
    """What was painted, as a mask: white where there is paint. painted: what the editor holds."""
    layers = (painted or {}).get("layers") or []
    mask = layers[0].getchannel("A").point(lambda opacity: 255 if opacity else 0) if layers else None
    if mask is None or not mask.getbbox():
        raise UserError("nothing is painted; paint over the subject, then keep the mask")
    return mask


def _plain(error: UserError) -> str:
    """An error's words without the flags, which are the fields' names here."""
    return str(error).removeprefix("--class_word: ").removeprefix("--name: ")
