"""Which checkpoint of a run to keep: draw with each, score, plot, and name the one of the best balance.

    python -m eval.pick_checkpoint outputs/dog

Early checkpoints listen to the prompt and do not know the subject; late ones copy the photos and do not listen. Writes
`scores.json`, `scores.svg` and a contact sheet into `<run>/checkpoint_scores`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from eval import metrics
from eval.encoders import Encoders, load_encoders
from eval.prompts import DREAMBOOTH, Prompt, prompts_for
from eval.score import Embedded, add_encoder_options, embed, picture_scores, reference_scores
from eval.subjects import LIVE_CLASSES, Subject
from gsoft_diffusion.adapter_file import load_adapter, read_adapter
from gsoft_diffusion.checkpoints import ADAPTER, SETTINGS, checkpoints, step_of
from gsoft_diffusion.config import TrainingConfig
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.files import check_writable
from gsoft_diffusion.generation import generate
from gsoft_diffusion.image_files import open_image
from gsoft_diffusion.models import DTYPES, Models, load_models
from gsoft_diffusion.options import expanded_path, run
from gsoft_diffusion.pictures import Row, contact_sheets, numbered
from gsoft_diffusion.settings import read_yaml

FOLDER = "checkpoint_scores"


@dataclass(frozen=True)
class Scored:
    """What one adapter of the run scores."""

    step: int
    adapter: Path
    dino: float
    clip_t: float
    dino_nearest: float
    balance: float
    images: list[Image.Image]


def pick(folder: Path, encoders: Encoders, prompts: str, max_prompts: int, images_per_prompt: int) -> Path:
    """Score every checkpoint of the run and write the results; returns the adapter to keep. Raises UserError."""
    out = folder / FOLDER
    if out.exists():
        raise UserError(f"{out}: exists; remove or rename it to score again")
    config = TrainingConfig.from_dict(read_yaml(folder / SETTINGS))
    named = config.concepts[0].resolved()
    word, token = named.class_word or "", named.unique_token
    if not (word and token):
        missing = "unique_token" if word else "class_word"
        raise UserError(f"{folder / SETTINGS}: has no {missing}, which the prompts are made with")
    check_writable(folder, "run")
    adapters = {step_of(checkpoint): checkpoint / ADAPTER for checkpoint in checkpoints(folder)}
    if (folder / ADAPTER).is_file():
        adapters[int(read_adapter(folder / ADAPTER).training["step"])] = folder / ADAPTER
    if len(adapters) < 2:
        raise UserError(f"{folder}: holds {len(adapters)} adapters to choose from; train with --checkpointing_steps")
    subject = Subject(folder.name, word, word in LIVE_CLASSES, Path(config.instance_data_dir))
    asked = [p for p in prompts_for(subject, token, prompts, max_prompts) if p.kind == "context"]
    models = load_models(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
        dtype=DTYPES[config.mixed_precision],
        device=encoders.clip.device,
    )
    photos = embed(encoders, (open_image(path) for path in subject.photos()))
    if len(photos.clip) < 2:
        raise UserError(f"{subject.folder}: the balance needs two photos or more, to see how alike they are")
    judge = Judge(config, models, encoders, asked, images_per_prompt, photos)
    scored = [judge(step, path) for step, path in sorted(adapters.items())]
    best = max(scored, key=lambda each: each.balance)
    _write(out, scored, judge, best)
    return best.adapter


class Judge:
    """Scores adapters of one run against the same photos, prompts and base model."""

    def __init__(
        self,
        config: TrainingConfig,
        models: Models,
        encoders: Encoders,
        prompts: list[Prompt],
        images_per_prompt: int,
        photos: Embedded,
    ) -> None:
        self.config, self.models, self.encoders, self.photos = config, models, encoders, photos
        self.jobs = [(prompt, seed) for prompt in prompts for seed in range(images_per_prompt)]
        captions = encoders.clip.embed_texts([prompt.plain for prompt, _ in self.jobs])
        self.captions = captions
        base, _ = self._means(self._draw(plain=True))
        real = reference_scores(photos, captions)
        self.base = (base["dino"], base["clip_t"])
        self.real = (real["dino"], real["clip_t"])

    def __call__(self, step: int, path: Path) -> Scored:
        adapter, _ = load_adapter(path, self.models.denoiser, self.models.text_encoders)
        adapter.merge()
        means, images = self._means(self._draw(plain=False))
        adapter.remove()
        balance = metrics.balance(means["dino"], means["clip_t"], self.base, self.real)
        print(f"step {step:6}: DINO {means['dino']:.3f}, CLIP-T {means['clip_t']:.3f}, balance {balance:.3f}")
        return Scored(step, path, means["dino"], means["clip_t"], means["dino_nearest"], balance, images)

    def _draw(self, plain: bool) -> list[Image.Image]:
        samples = generate(
            self.models,
            [(prompt.plain if plain else prompt.text, seed) for prompt, seed in self.jobs],
            self.config.sampler,
            resolution=self.config.resolution,
            batch_size=self.config.sample_batch_size,
        )
        return [sample.image for sample in samples]

    def _means(self, images: list[Image.Image]) -> tuple[dict[str, float], list[Image.Image]]:
        rows = picture_scores(embed(self.encoders, images), self.photos, self.captions)
        return {name: metrics.mean([row[name] for row in rows]) for name in rows[0]}, images


def _write(out: Path, scored: list[Scored], judge: Judge, best: Scored) -> None:
    out.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "step": each.step,
            "dino": each.dino,
            "clip_t": each.clip_t,
            "dino_nearest": each.dino_nearest,
            "balance": each.balance,
        }
        for each in scored
    ]
    result = {
        "keep": best.step,
        "base_model": dict(zip(("dino", "clip_t"), judge.base, strict=True)),
        "photos": dict(zip(("dino", "clip_t"), judge.real, strict=True)),
        "encoders": judge.encoders.to_dict(),
        "checkpoints": rows,
    }
    (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(rows, judge, best.step).savefig(out / "scores.svg")
    sheet = [
        Row(
            f"step {each.step}{' — keep' if each is best else ''}: balance {each.balance:.3f}",
            each.images[:8],
            [f"{prompt.plain}, seed {seed}" for prompt, seed in judge.jobs[:8]],
        )
        for each in scored
    ]
    for number, image in enumerate(contact_sheets(sheet, "the same prompts and seeds at every checkpoint"), start=1):
        image.save(out / numbered("contact_sheet.png", number))


def _plot(rows: list[dict[str, Any]], judge: Judge, keep: int) -> Figure:
    """Scores over steps, and where the base model and the photos are."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    names = {"dino": "subject: DINO", "clip_t": "prompt: CLIP-T", "balance": "balance"}
    for axes, (name, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], "o-", color="#1d6fb8")
        axes.axvline(keep, color="#c1121f", linewidth=0.8, label="keep")
        if name != "balance":
            place = list(names).index(name)
            axes.axhline(judge.base[place], color="#888888", linestyle=":", label="base model")
            axes.axhline(judge.real[place], color="#2a9d4a", linestyle="--", label="photos")
        axes.set_title(title + (" (miniature)" if judge.encoders.miniature and name != "balance" else ""), fontsize=9)
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expanded_path, help="output folder of train_dreambooth_gsoft.py")
    parser.add_argument("--prompts", default=DREAMBOOTH, help="file of templates (default: %(default)s's list)")
    parser.add_argument("--max_prompts", type=int, default=8, help="how many of them (default: %(default)s)")
    parser.add_argument("--images_per_prompt", type=int, default=2, help="pictures for each (default: %(default)s)")
    add_encoder_options(parser)
    args = parser.parse_args()
    encoders = load_encoders(args.clip, args.dino, args.device)
    adapter = pick(args.run, encoders, args.prompts, args.max_prompts, args.images_per_prompt)
    print(f"keep {adapter}\nplot and pictures in {args.run / FOLDER}")
    return 0


if __name__ == "__main__":
    run(main)
