"""The photos that a run trains on: those of the subjects, and those of their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from accelerate import Accelerator

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.config import Concept, TrainingConfig
from gsoft_diffusion.config.prompts import has_words
from gsoft_diffusion.foundation.errors import UserError, printable
from gsoft_diffusion.foundation.text_files import composed
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.folder import KOHYA, Folder, Photo, copies, nearly_copies, read_folder
from gsoft_diffusion.training.class_images import ensure_class_images
from gsoft_diffusion.training.trainable import TrainableAdapter


def instance_photos(config: TrainingConfig, say: Callable[[str], None]) -> dict[Concept, list[Photo]]:
    """The photos of each subject.

    config: the resolved settings, which name the subjects' folders and prompts.
    say: is told, line by line, what was found and what is odd about it.

    Raises UserError for a photo, caption or mask that is damaged or ambiguous, for a photo in two subjects' folders,
    for a caption with another subject's name, and for a weight of masks where no photo has one.
    """
    found: dict[Concept, list[Photo]] = {}
    owners: dict[Path, Concept] = {}
    for concept in config.concepts:
        prompt = concept.instance_prompt or ""
        folder = read_folder(concept.instance_data_dir, "--instance_data_dir", prompt, concept.named)
        say(f"subject{'' if len(config.concepts) == 1 else ' ' + concept.name}: {folder}")
        if len(folder.photos) == 1:
            say(f"note: {concept.instance_data_dir} holds a single photo, which the model may copy; 3 to 5 are better")
        note_other_names(concept, folder, say)
        for photo in folder.photos:
            if (owner := owners.setdefault(photo.path.resolve(), concept)) is not concept:
                given = f"{owner.instance_data_dir} and {concept.instance_data_dir}"
                raise UserError(
                    f"{photo.path}: is in the folders of two subjects, {given}; give each subject its own photos"
                )
        check_names(concept, folder.photos, config.concepts)
        say_unnamed(concept, folder.photos, say)
        found[concept] = list(folder.photos)
    photos = list(chain(*found.values()))
    note_copies(photos, say)
    masks = sum(photo.mask is not None for photo in photos)
    if masks and config.unmasked_weight == 1:
        say("note: masks are not used; --unmasked_weight 0.1 gives the subject more weight than its surroundings")
    if config.unmasked_weight != 1 and not masks:
        raise UserError(
            f"--unmasked_weight {config.unmasked_weight:g}: no photo has a mask; give them transparent backgrounds, "
            "or mask files like dog1-masklabel.png for dog1.jpg, white where the subject is"
        )
    return found


def note_other_names(concept: Concept, folder: Folder, say: Callable[[str], None]) -> None:
    """Say so if a subfolder's name is not in the prompt, by which the subject is trained.

    concept: the subject. folder: its photos, and the subfolders they came from. say: takes the line.
    """
    prompt = composed(concept.instance_prompt or "").casefold()
    words = dict.fromkeys(composed(found[2]).strip() for name in folder.subfolders if (found := KOHYA.fullmatch(name)))
    if others := [word for word in words if word.casefold() not in prompt]:
        say(
            f'note: the subfolders of {concept.instance_data_dir} say "{printable(", ".join(others))}"; '
            f'photos there without a caption are trained as "{printable(concept.instance_prompt or "")}" nevertheless'
        )


def note_copies(photos: Sequence[Photo], say: Callable[[str], None]) -> None:
    """Say which photos are the same picture, or nearly so.

    photos: those of all subjects. say: takes a line for each.
    """
    for first, copy in copies(photos):
        say(printable(f"note: {copy.path} is the same picture as {first.path}, so it counts twice"))
    for first, later in nearly_copies(photos):
        say(printable(f"note: {later.path} looks nearly the same as {first.path}; different views teach more"))


def check_class_images(prior: Sequence[Photo], instance: Sequence[Photo]) -> None:
    """Raise UserError if a class image is a photo of a subject: it would teach that any member of the class is it.

    prior: the class images. instance: the photos of all subjects.
    """
    subjects = set(map(id, instance))
    for first, copy in copies((*instance, *prior)):
        if id(first) in subjects and id(copy) not in subjects:
            raise UserError(
                f"{copy.path}: is the same picture as the photo {first.path}; take it out of the class images"
            )


def check_names(concept: Concept, photos: Sequence[Photo], concepts: Sequence[Concept]) -> None:
    """Raise UserError if a caption names another subject than the one whose folder the photo is in.

    concept: the subject. photos: those in its folder. concepts: all subjects of the run, this one included.
    """
    for other in concepts:
        if not (concept.unique_token and other.unique_token and other is not concept):
            continue
        for photo in photos:
            if has_words(photo.prompt, other.unique_token) and not has_words(photo.prompt, concept.unique_token):
                raise UserError(
                    f'{photo.path}: its caption names "{other.unique_token}", the subject in '
                    f'{other.instance_data_dir}, and not "{concept.unique_token}"; correct it, or move the photo'
                )


def say_unnamed(concept: Concept, photos: Sequence[Photo], say: Callable[[str], None]) -> None:
    """Say which prompts do not name the subject; it is not learned from their photos.

    concept: the subject. photos: its own. say: takes a line for each word that is left out.
    """
    word, prompt = concept.class_word, concept.instance_prompt or ""
    if word and not has_words(prompt, word) and any(photo.prompt == prompt for photo in photos):
        say(f'note: the class word "{word}" is not in the instance prompt; {{1}} in prompts stands for it nevertheless')
    for what, words in (("unique token", concept.unique_token), ("class word", concept.class_word)):
        captions = [photo for photo in photos if photo.prompt != concept.instance_prompt]
        if words and (without := [photo.path.name for photo in captions if not has_words(photo.prompt, words)]):
            named = printable(", ".join(without[:3])) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            say(f'note: the {what} "{words}" is not in the captions of {named}; these captions do not name the subject')


def held_out_photos(
    config: TrainingConfig, instance: Mapping[Concept, Sequence[Photo]], say: Callable[[str], None]
) -> list[Photo]:
    """The photos that the validation loss is measured on: those of `validation_data_dir`, or else all that train.

    config: the run's settings. instance: each subject's photos. say: is told what was found.

    Raises UserError as `read_folder`, and if one of them trains as well.
    """
    trained = list(chain(*instance.values()))
    if not config.validation_data_dir:
        return trained
    prompt = config.instance_prompt or ""
    folder = read_folder(config.validation_data_dir, "--validation_data_dir", prompt, config.concepts[0].named)
    say(f"held out: {folder}")
    known = set(map(id, trained))
    for first, copy in copies((*trained, *folder.photos)):
        if id(first) in known and id(copy) not in known:
            raise UserError(f"{copy.path}: is the same picture as {first.path}, which is trained on; name other photos")
    return list(folder.photos)


def class_photos(
    config: TrainingConfig,
    accelerator: Accelerator,
    model: BaseModel,
    adapter: TrainableAdapter,
    identity: BaseModelIdentity,
    instance: Mapping[Concept, Sequence[Photo]],
) -> list[Photo]:
    """What the classes are kept by: the class images of all subjects; subjects of one class share them.

    If the base model's predictions keep them, it is the subjects' own photos with the class prompts, without masks.

    config: the run's settings; without prior preservation there are none.
    accelerator: the main process draws first, the others wait; prints what was found.
    model: the base model, which draws those that are missing.
    adapter: in the model already; disabled meanwhile.
    identity: the base model's, as `identity_of` gave it.
    instance: each subject's photos.

    Raises UserError as `ensure_class_images` and `read_folder`, and if a class image is a photo of a subject.
    """
    if not config.with_prior_preservation:
        return []
    if config.predicts_prior:
        return [
            replace(photo, prompt=concept.class_prompt or "", mask=None)
            for concept, photos in instance.items()
            for photo in photos
        ]
    wanted = (config.max_train_steps or 0) * config.gradient_accumulation_steps * config.train_batch_size
    wanted *= accelerator.num_processes
    folders: dict[Path, Concept] = {}
    with accelerator.main_process_first(), adapter.disabled():
        for concept in config.concepts:
            folders[ensure_class_images(concept, config, model, identity)] = concept
    photos: list[Photo] = []
    for path, concept in folders.items():
        prompt, limit = concept.class_prompt or "", config.num_class_images
        folder = read_folder(path, "--class_data_dir", prompt, concept.of_class, limit=limit, masks=False)
        accelerator.print(f"class{'' if len(folders) == 1 else ', ' + prompt}: {folder}")
        photos += folder.photos
    if wanted < len(photos):
        accelerator.print(f"note: this run is too short for {len(photos) - wanted} of its class images")
    check_class_images(photos, list(chain(*instance.values())))
    return photos
