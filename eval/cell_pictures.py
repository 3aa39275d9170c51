"""The pictures of a cell: drawn, scored, and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eval.cells import Cell
from eval.experiment import Experiment, number_of
from eval.prompts import Kind, Prompt
from eval.results import cell_folder
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders
from gsoft_diffusion.scoring.pictures import Embedded, embed, picture_scores

SEEDS_A_CELL = 1000  # pictures of cell seed `s` are numbered 1000·s, 1000·s + 1, …: the same for every method


@dataclass(frozen=True)
class Picture:
    """A generated picture that is scored.

    index: of its prompt. seed: its number, from which, with subject and prompt, its noise is drawn.
    """

    prompt: Prompt
    index: int
    seed: int
    image: Image.Image

    @property
    def file(self) -> str:
        """The name of its file: kind, number of the prompt, seed."""
        return file_name(self.prompt.kind, self.index, self.seed)


def file_name(kind: Kind, index: int, number: int) -> str:
    """The name of a picture's file. kind, index: of its prompt. number: its own."""
    return f"{kind}-{index:02d}-seed{number}.png"


def untouched_pictures(
    experiment: Experiment, cell: Cell, out: Path, prompts: Sequence[Prompt], models: BaseModel
) -> list[Image.Image]:
    """The base model's pictures for the unrelated prompts: those of its own cell, or drawn now if that is not here.

    experiment, prompts: as in `draw`. cell: whose subject and seed. out: the comparison's folder. models: the base.
    """
    folder = cell_folder(Cell("base", None, None, cell.subject, cell.seed), out)
    indices = [index for index, prompt in enumerate(prompts) if prompt.kind == "unrelated"]
    paths = [folder / file_name("unrelated", i, n) for i in indices for n in numbers_of(experiment, cell, "unrelated")]
    if all(path.is_file() for path in paths):
        return [open_image(path) for path in paths]
    return [picture.image for picture in draw(experiment, models, [prompts[index] for index in indices], cell)]


def draw(experiment: Experiment, models: BaseModel, prompts: Sequence[Prompt], cell: Cell) -> list[Picture]:
    """Every prompt as often as its kind asks for, with the cell's numbers of pictures.

    experiment: says how many pictures, of which size and by which sampler. models: as they are now, adapter included.
    prompts: in the order that numbers the pictures. cell: whose subject and seed. The noise of a picture follows from
    these, its number and the prompt without the unique token: it is the same for every method and the base model.
    Returns the pictures, those of one prompt together.
    """
    jobs = [
        (index, prompt, number)
        for index, prompt in enumerate(prompts)
        for number in numbers_of(experiment, cell, prompt.kind)
    ]
    samples = generate(
        models,
        [(prompt.text, number_of(cell.subject, prompt.plain, seed=number)) for _, prompt, number in jobs],
        experiment.sampler,
        resolution=experiment.resolution,
        batch_size=experiment.sample_batch_size,
    )
    return [
        Picture(prompt, index, number, sample.image)
        for (index, prompt, number), sample in zip(jobs, samples, strict=True)
    ]


def numbers_of(experiment: Experiment, cell: Cell, kind: Kind) -> range:
    """The numbers of a cell's pictures for each prompt of a kind."""
    first = SEEDS_A_CELL * cell.seed
    return range(first, first + pictures_of(experiment, kind))


def pictures_of(experiment: Experiment, kind: Kind) -> int:
    """How many pictures each prompt of a kind gets, by the experiment's settings."""
    return {
        "context": experiment.images_per_prompt,
        "base": experiment.base_images,
        "class": experiment.class_images,
        "unrelated": experiment.unrelated_images,
    }[kind]


def score(
    experiment: Experiment,
    pictures: Sequence[Picture],
    photos: Embedded,
    encoders: Encoders,
    untouched: Embedded | None,
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """Score pictures of one subject. Returns `pictures`, the scores of each, and `scores`, their means by kind.

    experiment: says whether captions keep the unique token. pictures: of all kinds. photos: the subject's, embedded.
    encoders: those that embedded them. untouched: the base model's pictures for the unrelated prompts, in the same
    order; without them there is no drift. prompts: the subject's, by which captions are the same for tuned models and
    the base model.
    """
    captions = [caption_of(experiment, prompts[picture.index]) for picture in pictures]
    embedded = embed(encoders, (picture.image for picture in pictures))
    texts = dict(zip(dict.fromkeys(captions), encoders.clip.embed_texts(list(dict.fromkeys(captions))), strict=True))
    each = picture_scores(embedded, photos, torch.stack([texts[caption] for caption in captions]))

    def of(kind: Kind) -> list[int]:
        return [number for number, picture in enumerate(pictures) if picture.prompt.kind == kind]

    def mean(name: str, kind: Kind) -> float:
        return metrics.mean([each[number][name] for number in of(kind)])

    names = ("clip_i", "dino", "clip_t", "clip_nearest", "dino_nearest")
    scores = {name: mean(name, "context") for name in names}
    scores |= {f"{name}_base_prompt": mean(name, "base") for name in names}
    scores["pres"] = mean("dino", "class")
    groups = [[n for n in of("context") if pictures[n].index == index] for index in {p.index for p in pictures}]
    groups = [group for group in groups if len(group) > 1] or [of("base")]
    if min(map(len, groups)) > 1:
        scores["div"] = metrics.mean([metrics.diversity(embedded[group].dino) for group in groups])
    if untouched is not None:
        scores["drift"] = metrics.mean(metrics.drift(embedded[of("unrelated")].clip, untouched.clip).tolist())
    rows = [
        {
            "file": picture.file,
            "kind": picture.prompt.kind,
            "prompt": picture.prompt.text,
            "caption": caption,
            "seed": picture.seed,
            **row,
        }
        for picture, caption, row in zip(pictures, captions, each, strict=True)
    ]
    return {"scores": scores, "pictures": rows}


def caption_of(experiment: Experiment, prompt: Prompt) -> str:
    """The text with which pictures of a prompt, and the photos, are compared."""
    return prompt.text if experiment.token_in_caption else prompt.plain


def save(pictures: Sequence[Picture], folder: Path) -> None:
    """Write pictures into a folder, which is made if it is not there."""
    folder.mkdir(exist_ok=True)
    for picture in pictures:
        picture.image.save(folder / picture.file)
