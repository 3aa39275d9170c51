"""Which checkpoint of a run to keep: draw with each, score, plot, and name the one of the best balance.

    python -m eval.pick_checkpoint outputs/dog

Of a run with several subjects each is scored against its own photos, and the scores are averaged.

Early checkpoints listen to the prompt and do not know the subject; late ones copy the photos and do not listen. Writes
`scores.json`, `scores.svg` and a contact sheet into `<run>/checkpoint_scores`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from eval.prompts import DREAMBOOTH, Prompt, prompts_for
from eval.score import add_encoder_options, chosen_encoders
from eval.sheets import save_sheets
from eval.subjects import Subject, is_live
from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.adapters.loading import load_adapter
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.settings import read_yaml
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.foundation.run_folder import ADAPTER, SETTINGS, step_of
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import DTYPES, load_model
from gsoft_diffusion.photos.image_files import open_image
from gsoft_diffusion.sampling.contact_sheets import Row
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders
from gsoft_diffusion.scoring.judge import Judge, Verdict
from gsoft_diffusion.training.checkpoints import checkpoints

FOLDER = "checkpoint_scores"


SCORES = ("dino", "clip_t", "dino_nearest", "balance")
CLOSE = 1e-9  # balances nearer than this do not differ


@dataclass(frozen=True)
class Judged:
    """What one adapter scores for one subject, and the pictures that were scored."""

    scores: dict[str, float]
    images: list[Image.Image]


@dataclass(frozen=True)
class Scored:
    """What one adapter of the run scores. subjects: for each subject of the run; mean: over all of them."""

    step: int
    adapter: Path
    subjects: dict[str, Judged]

    @property
    def mean(self) -> dict[str, float]:
        """Each score of `SCORES`, averaged over the subjects."""
        return {name: metrics.mean([judged.scores[name] for judged in self.subjects.values()]) for name in SCORES}


def pick(folder: Path, encoders: Encoders, prompts: str, max_prompts: int, images_per_prompt: int) -> Path:
    """Score every checkpoint of the run and write the results. Returns the adapter to keep.

    folder: the run's. encoders: what scores, on the device that draws. prompts: `dreambooth` or a file of templates.
    max_prompts: how many of them. images_per_prompt: pictures for each.

    Raises UserError if the run was scored before, has fewer than two adapters, or something in it cannot be read.
    """
    out, config = folder / FOLDER, settings_of(folder)
    subjects = subjects_of(config, folder / SETTINGS)
    adapters = adapters_of(folder)
    with new_places("run", out) as (place,):
        model = load_model(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            base_config=config.base_config,
            dtype=DTYPES[config.mixed_precision],
            device=encoders.clip.device,
        )
        judges = {}
        for subject, unique_token in subjects:
            asked = [p for p in prompts_for(subject, unique_token, prompts, max_prompts) if p.kind == "context"]
            judges[subject.name] = SubjectJudge(config, model, encoders, subject, asked, images_per_prompt)
        scored = [score(step, path, model, judges) for step, path in sorted(adapters.items())]
        best = max(scored, key=lambda each: each.mean["balance"])
        if max(best.mean["balance"] - each.mean["balance"] for each in scored) < CLOSE:
            print("note: all checkpoints have the same balance; the earliest is named")
        _write(place, scored, judges, encoders, best)
    return best.adapter


def settings_of(folder: Path) -> TrainingConfig:
    """The settings of a run that has not been scored yet. Raises UserError for another folder."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds no {SETTINGS}; name the output folder of train_dreambooth_gsoft.py")
    if (folder / FOLDER).exists():
        raise UserError(f"{folder / FOLDER}: exists; remove or rename it to score again")
    return TrainingConfig.from_dict(read_yaml(folder / SETTINGS))


def subjects_of(config: TrainingConfig, source: Path) -> list[tuple[Subject, str]]:
    """The run's subjects with their unique tokens.

    config: the run's settings. source: the file they are from, for the message. Raises UserError for a subject without
    class word or token.
    """
    folders = [Path(concept.instance_data_dir) for concept in config.concepts]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [f"{name} {number}" for number, name in enumerate(names, start=1)]
    subjects = []
    for concept, folder, name in zip(config.concepts, folders, names, strict=True):
        named = concept.resolved()
        word, token = named.class_word, named.unique_token
        if not (word and token):
            missing = "unique_token" if word else "class_word"
            raise UserError(f"{source}: has no {missing} for {folder}, which the prompts need")
        subjects.append((Subject(name, word, is_live(word), folder), token))
    return subjects


def adapters_of(folder: Path) -> dict[int, Path]:
    """The run's adapters by their steps, all of them readable. Raises UserError if there are fewer than two."""
    adapters = {step_of(checkpoint): checkpoint / ADAPTER for checkpoint in checkpoints(folder)}
    for path in adapters.values():
        read_adapter(path)
    if (folder / ADAPTER).is_file():
        step = read_adapter(folder / ADAPTER).step
        if step is None:
            raise UserError(f"{folder / ADAPTER}: does not say after how many steps it was written")
        adapters[step] = folder / ADAPTER
    if len(adapters) < 2:
        raise UserError(f"{folder}: holds {len(adapters)} adapters to choose from; train with --checkpointing_steps")
    return adapters


class SubjectJudge:
    """Scores what the models draw of one subject, against the same photos, prompts and base model.

    Made while the models are those of the base.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: BaseModel,
        encoders: Encoders,
        subject: Subject,
        prompts: list[Prompt],
        images_per_prompt: int,
    ) -> None:
        self.config, self.model = config, model
        photos = subject.photos()
        if len(photos) < 2:
            raise UserError(f"{subject.folder}: the balance needs at least two photos, to compare them with each other")
        self.jobs = [(prompt, seed) for prompt in prompts for seed in range(images_per_prompt)]
        self._judge = Judge(encoders, map(open_image, photos), [prompt.plain for prompt, _ in self.jobs])
        self._base = self._judge(self._draw(plain=True))
        self.base, self.real = asdict(self._base), asdict(self._judge.photos)

    def __call__(self) -> Judged:
        images = self._draw(plain=False)
        means = self._judge.means(images)
        verdict = Verdict(means["dino"], means["clip_t"])
        return Judged(means | {"balance": self._judge.balance(verdict, self._base)}, images)

    def _draw(self, plain: bool) -> list[Image.Image]:
        samples = generate(
            self.model,
            [(prompt.plain if plain else prompt.text, seed) for prompt, seed in self.jobs],
            self.config.sampler,
            resolution=self.config.resolution,
            batch_size=self.config.sample_batch_size,
        )
        return [sample.image for sample in samples]


def score(step: int, path: Path, model: BaseModel, judges: dict[str, SubjectJudge]) -> Scored:
    """Put the adapter into the models, have every subject judged, and take it out again.

    step: after how many steps it was written. path: its file. model: the base, unchanged afterwards. judges: by
    subject. Raises UserError if the adapter does not fit.
    """
    adapter, _ = load_adapter(path, model.denoiser, model.text_encoders)
    adapter.merge()
    scored = Scored(step, path, {name: judge() for name, judge in judges.items()})
    adapter.remove()
    print(f"step {step:6}: {_words(scored.mean)}")
    if len(judges) > 1:
        for name, judged in scored.subjects.items():
            print(f"    {name}: {_words(judged.scores)}")
    return scored


def _words(scores: dict[str, float]) -> str:
    return f"DINO {scores['dino']:.3f}, CLIP-T {scores['clip_t']:.3f}, balance {scores['balance']:.3f}"


def _write(out: Path, scored: list[Scored], judges: dict[str, SubjectJudge], encoders: Encoders, best: Scored) -> None:
    out.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "step": each.step,
            **each.mean,
            "subjects": {
                name: {score: judged.scores[score] for score in SCORES} for name, judged in each.subjects.items()
            },
        }
        for each in scored
    ]
    result = {
        "keep": best.step,
        "base_model": _average([judge.base for judge in judges.values()]),
        "photos": _average([judge.real for judge in judges.values()]),
        "subjects": {name: {"base_model": judge.base, "photos": judge.real} for name, judge in judges.items()},
        "encoders": encoders.to_dict(),
        "checkpoints": rows,
    }
    (out / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _plot(result, encoders.miniature).savefig(out / "scores.svg")
    sheet = [
        Row(
            f"step {each.step}{f', {name}' if len(judges) > 1 else ''}{' — keep' if each is best else ''}: "
            f"balance {judged.scores['balance']:.3f}",
            judged.images[:8],
            [f"{prompt.plain}, seed {seed}" for prompt, seed in judges[name].jobs[:8]],
        )
        for each in scored
        for name, judged in each.subjects.items()
    ]
    save_sheets(sheet, "the same prompts and seeds at every checkpoint", out)


def _average(ends: list[dict[str, float]]) -> dict[str, float]:
    return {name: metrics.mean([end[name] for end in ends]) for name in ("dino", "clip_t")}


def _plot(result: dict[str, Any], miniature: bool) -> Figure:
    """Scores over steps, of several subjects pale and their mean, and where the base model and the photos are."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    rows = result["checkpoints"]
    steps = [row["step"] for row in rows]
    names = {"dino": "subject: DINO", "clip_t": "prompt: CLIP-T", "balance": "balance"}
    for axes, (name, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        if len(result["subjects"]) > 1:
            for subject in result["subjects"]:
                values = [row["subjects"][subject][name] for row in rows]
                axes.plot(steps, values, "o-", linewidth=0.8, markersize=2, alpha=0.6, label=subject)
        axes.plot(steps, [row[name] for row in rows], "o-", color="#1d6fb8")
        axes.axvline(result["keep"], color="#c1121f", linewidth=0.8, label="keep")
        if name != "balance":
            axes.axhline(result["base_model"][name], color="#888888", linestyle=":", label="base model")
            axes.axhline(result["photos"][name], color="#2a9d4a", linestyle="--", label="photos")
        axes.set_title(title + (" (miniature)" if miniature and name != "balance" else ""), fontsize=9)
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figure


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expanded_path, help="output folder of train_dreambooth_gsoft.py")
    parser.add_argument("--prompts", default=DREAMBOOTH, help="file of templates (default: %(default)s's list)")
    parser.add_argument("--max_prompts", type=int, default=8, help="how many of them (default: %(default)s)")
    parser.add_argument("--images_per_prompt", type=int, default=2, help="pictures for each (default: %(default)s)")
    add_encoder_options(parser)
    args = parser.parse_args()
    if args.max_prompts < 1 or args.images_per_prompt < 1:
        raise UserError("--max_prompts, --images_per_prompt: must be 1 or more")
    settings_of(args.run)  # before encoders are fetched, which takes long
    adapter = pick(args.run, chosen_encoders(args), args.prompts, args.max_prompts, args.images_per_prompt)
    print(f"keep {adapter}\nplot and pictures in {args.run / FOLDER}")
    return 0


if __name__ == "__main__":
    run(main)
