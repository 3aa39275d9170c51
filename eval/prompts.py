"""The prompts that are drawn and scored, and the text with which each picture is compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from eval.subjects import Subject
from gsoft_diffusion.config.prompts import with_article
from gsoft_diffusion.foundation.bundled import found
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.text_files import read_prompts

DREAMBOOTH = "dreambooth"  # both of its lists: which one, the subject decides
# Things that no subject is: what they look like should not change when a subject is learned.
UNRELATED = (
    "a photo of a house in the snow",
    "a photo of a tree on the beach",
    "a photo of a banana on a wooden floor",
    "a photo of a mushroom in the jungle",
)

BASE = "a photo of a {0} {1}"

Kind = Literal["context", "base", "class", "unrelated"]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    kind: context puts the subject somewhere; base is only "a photo of" it; class asks for any member of its class;
      unrelated for something else.
    text: what the tuned model is given.
    plain: the same without the unique token, which only the tuned model knows.
    """

    kind: Kind
    text: str
    plain: str


def prompts_for(
    subject: Subject, unique_token: str, source: str = DREAMBOOTH, max_prompts: int | None = None
) -> list[Prompt]:
    """All prompts of a subject, each once.

    subject: gives the class word and, for `dreambooth`, which list. unique_token: stands for the subject. source:
    `dreambooth`, or a file of templates with `{0}` for the unique token and `{1}` for the class word. max_prompts: how
    many templates to take, from the first; by default all. Raises UserError as `read_templates`.
    """

    def prompt(kind: Kind, template: str, token: str | None) -> Prompt:
        return Prompt(kind, fill(template, token, subject.class_word), fill(template, None, subject.class_word))

    return [
        *(prompt("context", template, unique_token) for template in read_templates(source, subject.live)[:max_prompts]),
        prompt("base", BASE, unique_token),
        prompt("class", BASE, None),
        *(Prompt("unrelated", text, text) for text in UNRELATED),
    ]


def fill(template: str, unique_token: str | None, class_word: str) -> str:
    """The template with both words in it.

    template: with `{0} {1}`. unique_token: for `{0}`; without one, the article follows what comes next. class_word: for
    `{1}`.
    """
    if unique_token is None:
        template = template.replace("{0} ", "")
        template = re.sub(r"\ba \{1\}", lambda _: with_article(class_word), template)
    return template.replace("{0}", unique_token or "").replace("{1}", class_word)


def read_templates(source: str, live: bool) -> list[str]:
    """The templates in a file, one a line.

    source: the file, or `dreambooth` for the bundled lists. live: which of these, that for live subjects or that for
    objects. Raises UserError naming the file and the line without `{0} {1}`, and for a file without prompts.
    """
    if source == DREAMBOOTH:
        path = found("data/prompts/live_subjects.txt" if live else "data/prompts/objects.txt")
    else:
        path = found(source)
    templates = read_prompts(path, source)
    for line in templates:
        if "{0} {1}" not in line:
            raise UserError(f'{source}: "{line}" has no place for the subject; write {{0}} {{1}} there')
    if not templates:
        raise UserError(f"{source}: holds no prompt")
    return templates
