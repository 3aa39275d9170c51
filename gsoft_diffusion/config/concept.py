"""One subject to learn, and the prompts that follow from its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from gsoft_diffusion.config.prompts import has_words, plain_noun, token_in, with_article, with_names
from gsoft_diffusion.config.settings import Mark, Rule, Settings, check_rules, settle_paths
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import composed

UNIQUE_TOKEN = "sks"  # the subject's name where nothing else says it
VALIDATION_SCENES = ("on the beach", "in the snow", "with a city in the background")


WORDS = Rule(lambda text: text.strip() != "", "more than blanks")


@dataclass(frozen=True)
class Concept(Settings):
    """One subject: an item of `concepts_list`, named as in diffusers' concepts lists, or a run's only subject.

    instance_data_dir: folder with the photos of the subject.
    class_word: what the subject is, in a word or two.
    unique_token: rare word that becomes the subject's name; by default sks, or the words before the class word in
      instance_prompt.
    instance_prompt: prompt of the photos that have no caption.
    class_prompt: prompt of the class images.
    class_data_dir: folder of class images.
    """

    instance_data_dir: Annotated[str, Mark.PATH]
    class_word: Annotated[str | None, WORDS] = None
    unique_token: Annotated[str | None, WORDS] = None
    instance_prompt: Annotated[str | None, WORDS] = None
    class_prompt: Annotated[str | None, WORDS] = None
    class_data_dir: Annotated[str | None, Mark.PATH] = None

    def __post_init__(self) -> None:
        if not self.instance_data_dir:
            raise UserError("--instance_data_dir: name the folder with the subject's photos")
        if not (self.class_word or self.instance_prompt):
            folder = self.instance_data_dir
            raise UserError(f"--class_word: name what the photos in {folder} show, for example --class_word dog")
        check_rules(self)
        settle_paths(self)

    @property
    def name(self) -> str:
        """The subject as prompts call it: a sks dog; its whole prompt if its name is not known."""
        subject = self.resolved()
        if subject.unique_token and subject.class_word:
            return with_article(f"{subject.unique_token} {subject.class_word}")
        return subject.instance_prompt or ""

    @property
    def usual_class_prompt(self) -> str | None:
        """The class prompt if none is given, such as "a photo of a dog"; None without a class word."""
        return f"a photo of {with_article(plain_noun(self.class_word))}" if self.class_word else None

    def resolved(self) -> Concept:
        """The same subject with missing values derived: prompts from the names, or the token from the prompt.

        The token stays None if the prompt does not make it clear. All texts get one Unicode normal form, and `{0} {1}`
        in the prompts are filled in as in `with_names`. Raises UserError for a token that the prompt does not have, or
        that is the class word: the subject would be learned by another name.
        """
        word = self.class_word and plain_noun(self.class_word)
        token = self.unique_token and " ".join(composed(self.unique_token).split())
        prompt, class_prompt = (text and composed(text) for text in (self.instance_prompt, self.class_prompt))
        if token and word and token.casefold() == word.casefold():
            raise UserError(f"--unique_token {token}: is the class word; give a rare word that is the subject's alone")
        if prompt:
            token = token or (UNIQUE_TOKEN if "{0}" in prompt else None)
            prompt = with_names(prompt, [{"unique_token": token, "class_word": word}])
        if class_prompt:
            class_prompt = self.of_class(class_prompt)
        if prompt is None:
            token = token or UNIQUE_TOKEN
            prompt = f"a photo of {with_article(f'{token} {word}')}"
        elif not token:
            token = token_in(prompt, word)
        elif not has_words(prompt, token):
            raise UserError(
                f'--unique_token {token}: is not in the --instance_prompt "{prompt}", so the subject would be learned '
                "by another name; write it there, or leave one of the two out"
            )
        class_prompt = class_prompt or self.usual_class_prompt
        return replace(self, class_word=word, unique_token=token, instance_prompt=prompt, class_prompt=class_prompt)

    def named(self, caption: str) -> str:
        """A caption in which `{0} {1}` is filled in with the subject's name. Raises UserError as `with_names`.

        caption: of one of the subject's photos.
        """
        return with_names(caption, [self.resolved().to_dict()])

    def of_class(self, caption: str) -> str:
        """A prompt or caption of class images in which `{1}` is filled in with the class word. Raises UserError as
        `with_names`, also for `{0}`, as no class image shows the subject.
        """
        return with_names(caption, [{"class_word": self.class_word and plain_noun(self.class_word)}])

    @property
    def asks_for_class_images(self) -> bool:
        """Whether something was given that is about class images only."""
        return bool(self.class_data_dir) or self.class_prompt not in (None, self.usual_class_prompt)

    def scenes(self) -> tuple[str, ...]:
        """Prompts that show what has been learned; only the photos' prompt if the subject's name is not known."""
        subject = self.resolved()
        known = subject.unique_token and subject.class_word
        scenes = tuple(f"{self.name} {scene}" for scene in VALIDATION_SCENES) if known else ()
        return subject.instance_prompt or "", *scenes
