"""The settings of a comparison."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eval.methods import BUDGETS, METHODS, TITLES
from eval.prompts import DREAMBOOTH
from eval.subjects import Subject, read_subjects
from gsoft.config import Parametrization
from gsoft_diffusion.config.sampler import SamplerConfig
from gsoft_diffusion.config.settings import OnlyWith, Settings, not_negative, positive, refuse_without_effect, require
from gsoft_diffusion.config.training import TrainingConfig
from gsoft_diffusion.foundation.bundled import lasting_path
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.foundation.text_files import on_disk
from gsoft_diffusion.models.loading import DTYPES


def _refuse_twice(name: str, values: Iterable[str]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise UserError(f"{name}: {twice[0]} comes twice; give it once")


def rate_name(rate: float) -> str:
    """How cells' names have a rate: to six digits."""
    return f"{rate:g}"


SCALED_RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # of rotations whose learned numbers are scaled
USUAL_RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class LearningRates(Settings):
    """The learning rates that each method is tried with; the best of them is used for its rows.

    double_gsoft: of Double GSOFT.
    double_gsoft_dense: of Double GSOFT with a dense Q.
    double_gsoft_unscaled: of Double GSOFT without its output scale.
    double_gsoft_denoiser: of Double GSOFT on the denoiser alone.
    gsoft: of GSOFT.
    lora: of LoRA.
    dora: of DoRA.
    boft: of BOFT.
    oft: of OFT.
    hra: of HRA.
    lokr: of LoKr.
    full: of full fine-tuning.
    """

    double_gsoft: tuple[float, ...] = SCALED_RATES
    double_gsoft_dense: tuple[float, ...] = SCALED_RATES
    double_gsoft_unscaled: tuple[float, ...] = SCALED_RATES
    double_gsoft_denoiser: tuple[float, ...] = SCALED_RATES
    gsoft: tuple[float, ...] = SCALED_RATES
    lora: tuple[float, ...] = USUAL_RATES
    dora: tuple[float, ...] = USUAL_RATES
    boft: tuple[float, ...] = USUAL_RATES
    oft: tuple[float, ...] = USUAL_RATES
    hra: tuple[float, ...] = USUAL_RATES
    lokr: tuple[float, ...] = USUAL_RATES
    full: tuple[float, ...] = (3e-6, 1e-5, 3e-5, 1e-4)

    def __post_init__(self) -> None:
        for method in TITLES:
            rates = getattr(self, method)
            if not rates or min(rates) <= 0:
                raise UserError(f"learning_rates.{method}: give one or more, each above 0")
            _refuse_twice(f"learning_rates.{method}", map(rate_name, rates))


@dataclass(frozen=True)
class RatesOfSize(Settings):
    """The learning rates of the main methods at one size; by default those of `learning_rates`.

    double_gsoft: of Double GSOFT.
    gsoft: of GSOFT.
    lora: of LoRA.
    boft: of BOFT.
    oft: of OFT.
    """

    double_gsoft: tuple[float, ...] = ()
    gsoft: tuple[float, ...] = ()
    lora: tuple[float, ...] = ()
    boft: tuple[float, ...] = ()
    oft: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for method, rates in vars(self).items():
            if rates and min(rates) <= 0:
                raise UserError(f"{method}: learning rates must be above 0")
            _refuse_twice(method, map(rate_name, rates))


@dataclass(frozen=True)
class Experiment(Settings):
    """One comparison. All methods share everything here but their learning rates.

    subjects_dir: folder of subjects (see eval/subjects.py), or of the photos of one.
    class_word: what the photos show, if the folder is of one subject.
    subjects: names of the subjects to take; by default all.
    methods: which methods: double_gsoft, gsoft, lora, dora, boft, oft, hra, lokr, full; and Double GSOFT with one thing
      changed: double_gsoft_dense (dense Q), double_gsoft_unscaled (no output scale), double_gsoft_denoiser (no text
      encoder). By default the former.
    budgets: which sizes: small, medium, large.
    medium_only: those of the methods that are compared at the medium size only.
    seeds: how often everything is repeated, with seeds 0, 1, 2, …
    learning_rates: what is tried for each method.
    learning_rates_small: what is tried at the small size instead, in a grid.
    learning_rates_large: what is tried at the large size instead, in a grid.
    grid: train every method at every size and rate on all subjects and seeds, and score each step of `curve_every`: for
      fronts, and for choices that leave the reported subject out. Without it, rates are chosen in a sweep.
    sweep_subjects: how many subjects (the first ones, at seed 0) the learning rates are tried on.
    sweep_budget: the size they are tried at.
    pretrained_model_name_or_path: base model.
    unique_token: the subject's name in prompts.
    text_encoder: adapt the text encoder's attention as well as the denoiser's.
    text_encoder_lr_ratio: learning rate of the text encoder, over the denoiser's.
    output_scale: whether GSOFT and Double GSOFT learn a scale for each output, as BOFT always does.
    parametrization: of GSOFT and Double GSOFT; the paper's is cayley.
    resolution: side of the square pictures; by default what the base model was made for.
    max_train_steps: optimizer steps.
    train_batch_size: photos in a batch.
    gradient_checkpointing: recompute activations in the backward pass.
    with_prior_preservation: train on pictures of the class as well.
    num_class_images: how many.
    adam_weight_decay: decoupled weight decay.
    snr_gamma: gamma of min-SNR loss weights; by default none.
    mixed_precision: type of the frozen base.
    prompts: dreambooth, or a file of templates.
    max_prompts: use only so many of the templates; by default all.
    token_in_caption: keep the unique token in the texts that CLIP-T compares with.
    images_per_prompt: pictures for each context prompt.
    base_images: pictures for the base prompt, "a photo of a sks dog".
    class_images: pictures for the class prompt, which PRES looks at.
    unrelated_images: pictures for each unrelated prompt, which drift looks at.
    curve_every: score the cells of seed 0, in a grid all cells, every so many steps as well; 0 for never.
    sheets: put pictures onto sheets and into the report. Without it, no picture leaves the folder `work`.
    sampler: how pictures are drawn.
    sample_batch_size: pictures drawn at a time.
    clip: CLIP encoder: auto, folder or open_clip's name.
    dino: DINO encoder: auto, folder or name.
    seconds_per_step: guess for the time estimate, until cells have been measured.
    seconds_per_picture: the same for drawing.
    difference_sd: guess of the standard deviation over subjects of a paired difference in balance, in a grid of the
      lead of one front over another. From it follows which difference can be detected.
    """

    subjects_dir: str = "data/subjects"
    class_word: str | None = None
    subjects: tuple[str, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    budgets: tuple[str, ...] = tuple(BUDGETS)
    medium_only: tuple[str, ...] = ()
    seeds: int = 2
    learning_rates: LearningRates = LearningRates()
    learning_rates_small: RatesOfSize = RatesOfSize()
    learning_rates_large: RatesOfSize = RatesOfSize()
    grid: bool = False
    sweep_subjects: int = 2
    sweep_budget: str = "medium"

    pretrained_model_name_or_path: str = BUNDLED_BASE
    unique_token: str = "sks"
    text_encoder: bool = True
    text_encoder_lr_ratio: float = 1.0
    output_scale: bool = True
    parametrization: Parametrization = "scaled_cayley"
    resolution: int | None = None
    max_train_steps: int = 400
    train_batch_size: int = 4
    gradient_checkpointing: bool = False
    with_prior_preservation: bool = False
    num_class_images: int = 100
    adam_weight_decay: float = 1e-2
    snr_gamma: float | None = None
    mixed_precision: str = "no"

    prompts: str = DREAMBOOTH
    max_prompts: int | None = None
    token_in_caption: bool = False
    images_per_prompt: int = 2
    base_images: int = 8
    class_images: int = 8
    unrelated_images: int = 2
    curve_every: int = 0
    sheets: bool = True
    sampler: SamplerConfig = SamplerConfig()
    sample_batch_size: int = 8
    clip: str = "auto"
    dino: str = "auto"

    seconds_per_step: float = 0.5
    seconds_per_picture: float = 0.5
    difference_sd: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (("methods", TITLES), ("budgets", BUDGETS)):
            given = getattr(self, name)
            if not given or set(given) - set(known):
                raise UserError(f"{name}: {', '.join(given) or 'nothing'}; choose from {', '.join(known)}")
        if unknown := [name for name in self.medium_only if name not in self.methods]:
            raise UserError(f"medium_only: {', '.join(unknown)} is none of methods; give some of these")
        if self.medium_only and "medium" not in self.budgets:
            raise UserError("medium_only would have no effect: budgets have no medium; add it, or leave it out")
        for name, alike in (("double_gsoft_denoiser", self.text_encoder), ("double_gsoft_unscaled", self.output_scale)):
            if name in self.methods and not alike:
                raise UserError(f"methods: {name} is what double_gsoft is with these settings; leave it out")
        for name in ("subjects", "methods", "budgets", "medium_only"):
            _refuse_twice(name, getattr(self, name))
        if self.sweep_budget not in BUDGETS:
            raise UserError(f"sweep_budget: {self.sweep_budget}; choose from {', '.join(BUDGETS)}")
        if self.mixed_precision not in DTYPES:
            raise UserError(f"mixed_precision: {self.mixed_precision}; choose from {', '.join(DTYPES)}")
        require(self, positive, "more than 0", "seeds", "images_per_prompt", "base_images", "max_prompts")
        require(self, positive, "more than 0", "max_train_steps", "unrelated_images", "class_images", "sweep_subjects")
        require(self, positive, "more than 0", "difference_sd", "text_encoder_lr_ratio")
        require(self, not_negative, "0 or more", "curve_every")
        if self.grid and not self.curve_every:
            raise UserError("grid: scores several steps of each training; give curve_every, a part of max_train_steps")
        refuse_without_effect(self, _ONLY_WITH)

    def anchored(self) -> Experiment:
        """The same with paths that hold in any working directory: absolute ones, and names of bundled files."""
        places: Any = {name: _anchored(getattr(self, name)) for name in _PLACES}
        return replace(self, **places)

    def chosen_subjects(self) -> list[Subject]:
        """The subjects to compare on. Raises UserError if one that is asked for is not there."""
        found = {subject.name: subject for subject in read_subjects(self.subjects_dir, self.class_word)}
        if missing := [name for name in self.subjects if name not in found]:
            raise UserError(
                f"subjects: {', '.join(missing)} is not in {self.subjects_dir}; there are {', '.join(found)}"
            )
        return [found[name] for name in self.subjects or found]

    def subject_names(self) -> list[str]:
        """The names of the subjects to compare on. Their photos need not be there if the settings name them."""
        return list(self.subjects) or [subject.name for subject in self.chosen_subjects()]

    def rates_of(self, method: str, budget: str | None) -> tuple[float, ...]:
        """The learning rates that a grid tries for a method at a size.

        method: a key of `TITLES`. budget: a key of `BUDGETS`, or None for a method that has one size.
        """
        own = {"small": self.learning_rates_small, "large": self.learning_rates_large}.get(budget or "")
        return getattr(own, method, ()) or getattr(self.learning_rates, method)

    def recorded_every(self, seed: int) -> int:
        """After every so many steps the cells of a seed are scored; 0 if at the end only."""
        return self.curve_every if self.grid or seed == 0 else 0

    def recorded_steps(self) -> list[int]:
        """After how many steps a cell is scored where `recorded_every` says that it is, the last step included."""
        return [*range(self.curve_every, self.max_train_steps, self.curve_every), self.max_train_steps]

    def training(
        self,
        subject: Subject,
        seed: int,
        learning_rate: float,
        text_encoder: bool,
        output_dir: Path,
        class_images: Path,
    ) -> TrainingConfig:
        """The trainer's settings for one cell, the method's own left out.

        subject: what is learned. seed: the cell's; with the subject it makes the run's, and it decides whether there
        are checkpoints. learning_rate: of the denoiser. text_encoder: whether the cell's method adapts that.
        output_dir: the run's folder. class_images: folder for pictures of the class, used only with prior preservation.
        """
        shared: dict[str, Any] = {name: getattr(self, name) for name in _TRAINING}
        return TrainingConfig.from_dict(
            {
                **shared,
                "instance_data_dir": str(subject.folder),
                "class_word": subject.class_word,
                "output_dir": str(output_dir),
                "class_data_dir": str(class_images) if self.with_prior_preservation else None,
                "seed": number_of(subject.name, seed=seed),
                "learning_rate": learning_rate,
                "adapter": replace(TrainingConfig.adapter, text_encoder=text_encoder).to_dict(),
                "text_encoder_lr": self.text_encoder_lr_ratio * learning_rate if text_encoder else None,
                "sampler": self.sampler.to_dict(),
                "checkpointing_steps": self.recorded_every(seed),
                "num_validation_images": 0,
                "report_to": "none",
            }
        )


def number_of(*names: str, seed: int) -> int:
    """A seed below 2³¹ that depends only on names and a seed, so that subjects and prompts do not share their noise.

    Else a noise that suits a method would count as often as there are subjects. names: of a subject, and of a prompt.
    """
    key = "\n".join([*names, str(seed)]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


_PLACES = ("subjects_dir", "pretrained_model_name_or_path", "prompts", "clip", "dino")  # or names of something


def _anchored(name: str) -> str:
    place = on_disk(Path(name).expanduser())
    if name in (DREAMBOOTH, "auto") or not place.exists():
        return name  # not a path, or a bundled file, or a name on the hub
    return lasting_path(place.resolve())


def _has_size(size: str, settings: Any) -> bool:
    return size in settings.budgets


_ONLY_WITH = (
    OnlyWith(
        ("text_encoder_lr_ratio",),
        lambda settings: settings.text_encoder,
        "no text encoder is trained; give text_encoder: true, or leave it out",
    ),
    OnlyWith(
        ("num_class_images",),
        lambda settings: settings.with_prior_preservation,
        "it is about class images; give with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("curve_every",),
        lambda settings: settings.curve_every < settings.max_train_steps,
        "the trainings are not longer; give less than max_train_steps, or leave it out",
    ),
    OnlyWith(
        ("learning_rates_small", "learning_rates_large"),
        lambda settings: settings.grid,
        "a sweep chooses one rate for all sizes; give grid as well, or leave it out",
    ),
    *(
        OnlyWith(
            (f"learning_rates_{size}",),
            partial(_has_size, size),
            "budgets have no such size; add it, or leave this out",
        )
        for size in ("small", "large")
    ),
    OnlyWith(
        ("sweep_subjects", "sweep_budget"),
        lambda settings: not settings.grid,
        "a grid has no sweep: it tries all rates at all sizes on all subjects; leave it out",
    ),
)
_TRAINING = (
    "pretrained_model_name_or_path",
    "unique_token",
    "resolution",
    "max_train_steps",
    "train_batch_size",
    "gradient_checkpointing",
    "with_prior_preservation",
    "num_class_images",
    "adam_weight_decay",
    "snr_gamma",
    "mixed_precision",
    "sample_batch_size",
)
