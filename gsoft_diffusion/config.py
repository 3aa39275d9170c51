"""Every setting of the project: frozen dataclasses that validate themselves and round-trip through JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from gsoft.config import RotationConfig
from gsoft.errors import ConfigError
from gsoft_diffusion.errors import UserError
from gsoft_diffusion.settings import (
    OnlyWith,
    Settings,
    not_negative,
    positive,
    refuse_without_effect,
    require,
    settle_paths,
    without_effect,
)
from gsoft_diffusion.text_files import composed

BUNDLED_BASE = "data/mini_base"  # found in the repository whatever the working directory
# What a run needs follows from the base: angles of a small model's few, narrow layers have further to go.
# The paper trains no text encoder; there a tenth of the denoiser's rate is a guess.
FULL_SIZE = {"max_train_steps": 3000, "learning_rate": 2e-5, "text_encoder_lr": 2e-6}
MINIATURE = {"max_train_steps": 500, "learning_rate": 1e-3, "text_encoder_lr": 2e-5}
GUIDANCE, MINIATURE_GUIDANCE = 5.0, 3.0  # above it the miniature's shapes come apart
POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial schedule ends at, whatever it starts from
MINIATURE_BELOW = 128  # pixels, the side of the pictures that a base was made for
UNIQUE_TOKEN = "sks"  # the subject's name where nothing else says it
# What may stand before the subject's name in a prompt, and is none of it.
NOT_NAMES = re.compile(
    r"a|an|the|this|that|these|those|my|your|his|her|its|our|their|one|some|of|in|on|at|to|by|with|from|for|and|or|"
    r"photo|photograph|picture|image|portrait|drawing|painting"
)
VALIDATION_SCENES = ("on the beach", "in the snow", "with a city in the background")


@dataclass(frozen=True)
class AdapterConfig(RotationConfig, Settings):
    """What is adapted and how: the part of the settings that decides the adapter's shapes.

    nblocks: number of diagonal blocks `r` of every GS factor; give this or `block_size`, not both.
    block_size: side `b` of every block, `r·b = width`.
    nfactors: block-diagonal factors in each `Q`; "dense" takes the fewest that fill `Q` (paper, Theorem 2).
    double: True for `W' = s·Q_out W Q_in` (§6.2), False for `W' = s·W Q_in` (§6.1).
    parametrization: map from skew-symmetric to orthogonal blocks.
    output_scale: learn one factor per output feature, 1 at the start.
    text_encoder: adapt the text encoder's attention as well as the UNet's.
    """

    text_encoder: bool = True

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:
            raise UserError(f"{', '.join(f'--{name}' for name in error.names)}{error.problem}") from error


def guides(guidance_scale: float) -> bool:
    """Whether a guidance scale switches classifier-free guidance on; by the rule of diffusers' pipelines."""
    return guidance_scale > 1


_NEGATIVE_PROMPT = OnlyWith(
    ("negative_prompt",),
    lambda settings: not settings.negative_prompt or settings.guidance_scale is None or guides(settings.guidance_scale),
    "it is what guidance leads away from; give a --guidance_scale above 1, or leave it out",
)


@dataclass(frozen=True)
class SamplerConfig(Settings):
    """How a picture is drawn, apart from its prompt, its seed and the model.

    num_inference_steps: denoising steps.
    guidance_scale: weight of classifier-free guidance; 1 or less switches it off; by default 5, with miniature bases 3.
    negative_prompt: what guidance leads away from.
    scheduler: a diffusers scheduler class such as DDIMScheduler; by default the one the base model names.
    """

    num_inference_steps: int = 30
    guidance_scale: float | None = None
    negative_prompt: str = ""
    scheduler: str | None = None

    def __post_init__(self) -> None:
        require(self, positive, "more than 0", "num_inference_steps")
        require(self, not_negative, "0 or more", "guidance_scale")
        refuse_without_effect(self, [_NEGATIVE_PROMPT])


@dataclass(frozen=True)
class Concept(Settings):
    """One subject: an item of `concepts_list`, with the names of diffusers' concepts lists, or the only one.

    instance_data_dir: folder with the photos of the subject.
    class_word: what the subject is, in a word or two.
    unique_token: rare word that becomes the subject's name; by default sks, or what stands before the class word in
      instance_prompt.
    instance_prompt: prompt of the photos that have no caption.
    class_prompt: prompt of the class images.
    class_data_dir: folder of class images.
    """

    instance_data_dir: str
    class_word: str | None = None
    unique_token: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.instance_data_dir:
            raise UserError("--instance_data_dir: name the folder with the subject's photos")
        if not (self.class_word or self.instance_prompt):
            folder = self.instance_data_dir
            raise UserError(f"--class_word: say what is on the photos in {folder}, for example --class_word dog")
        texts = ("class_word", "unique_token", "instance_prompt", "class_prompt")
        require(self, lambda text: text.strip() != "", "more than blanks", *texts)
        settle_paths(self, "instance_data_dir", "class_data_dir")

    @property
    def name(self) -> str:
        """The subject as prompts call it: a sks dog; its whole prompt if its name is not known."""
        subject = self.resolved()
        if subject.unique_token and subject.class_word:
            return with_article(f"{subject.unique_token} {subject.class_word}")
        return subject.instance_prompt or ""

    @property
    def usual_class_prompt(self) -> str | None:
        return f"a photo of {with_article(_plain_noun(self.class_word))}" if self.class_word else None

    def resolved(self) -> Concept:
        """With what follows filled in: prompts from names, or the token from the prompt; None if it is not plain there.

        All in one Unicode normal form; `{0} {1}` in the prompts as in `with_names`. Raises UserError for a token that
        the prompt does not have, or that is the class word: the subject would be learned by another name.
        """
        word = self.class_word and _plain_noun(self.class_word)
        token = self.unique_token and " ".join(composed(self.unique_token).split())
        prompt, class_prompt = (text and composed(text) for text in (self.instance_prompt, self.class_prompt))
        if token and word and token.casefold() == word.casefold():
            raise UserError(f"--unique_token {token}: is the class word; give a rare word that is the subject's alone")
        if prompt:
            token = token or (UNIQUE_TOKEN if "{0}" in prompt else None)
            prompt = with_names(prompt, [{"unique_token": token, "class_word": word}])
        if class_prompt:
            class_prompt = with_names(class_prompt, [{"class_word": word}])
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

    @property
    def asks_for_class_images(self) -> bool:
        """Whether something was given that is about class images only."""
        return bool(self.class_data_dir) or self.class_prompt not in (None, self.usual_class_prompt)

    def scenes(self) -> tuple[str, ...]:
        """Prompts that show what has been learned; only the photos' own if the subject's name is not known."""
        subject = self.resolved()
        known = subject.unique_token and subject.class_word
        scenes = tuple(f"{self.name} {scene}" for scene in VALIDATION_SCENES) if known else ()
        return subject.instance_prompt or "", *scenes


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Everything `train_dreambooth_gsoft.py` can be told; names follow diffusers' train_dreambooth.py.

    instance_data_dir: folder with the photos of the subject (three to five are enough); a photo may have its caption in
      a .txt or .caption file beside it or in metadata.jsonl or .csv, and its mask beside it or in its transparency.
    class_word: what the subject is, in a word or two: dog, toy car. Makes the prompts that are not given.
    unique_token: rare word that becomes the subject's name; by default sks, or what stands before the class word in
      instance_prompt.
    instance_prompt: prompt of photos that have no caption; by default "a photo of a <unique_token> <class_word>".
    class_prompt: prompt of the class images; by default "a photo of a <class_word>".
    class_data_dir: folder of class images; by default beside output_dir, one for each model, prompt and sampler.
    concepts_list: JSON or YAML file with several subjects to learn in one run, instead of the settings above: a list
      of instance_data_dir, class_word, unique_token and, if wanted, instance_prompt, class_prompt, class_data_dir.
    output_dir: folder for everything the run writes; by default outputs/<name of instance_data_dir>.
    pretrained_model_name_or_path: base model: a diffusers folder, a name on the hub, or a .safetensors file.
    base_config: for a file, the diffusers folder or name on the hub whose configuration it has; by default by its kind.
    revision: revision of the base model on the hub.
    variant: variant of the base model's weight files, such as fp16.
    adapter: shape of the adapter.
    resolution: side of the square pictures in pixels; by default what the base model was made for.
    aspect_buckets: keep the photos' shapes: sizes of about resolution² pixels instead of squares, one in each batch.
    center_crop: crop photos in the middle; otherwise at one of five places along the side that is cropped, at random.
    random_flip: mirror half of the photos.
    unmasked_weight: weight of the loss outside of the subject's mask (0.1 is usual); 1 makes no use of masks.
    cache_latents: encode every photo (and each of its crops and flips) once, before training.
    with_prior_preservation: train on pictures of the class as well, so that the class is not forgotten.
    prior_loss_weight: weight of the class images' loss.
    num_class_images: class images to train on; those that are missing are generated by the base model, more not used.
    max_train_steps: optimizer steps; by default 3000 as in the paper, 500 on a miniature base.
    train_batch_size: photos in a batch, on each device (and as many class images with prior preservation).
    gradient_accumulation_steps: batches in one optimizer step; by default what accelerate's launcher says.
    gradient_checkpointing: recompute activations in the backward pass: less memory, slower.
    cpu_offload: keep the VAE, and text encoders that do not train, in main memory while they have nothing to do.
    quantize_base: keep what no adapter can be on, T5 and Qwen included, in 4 bits: nf4 (pip install bitsandbytes).
    learning_rate: step size of the optimizer; by default 2e-5 as in the paper, 1e-3 on a miniature base.
    text_encoder_lr: step size for the text encoders; by default 2e-6, 2e-5 on a miniature base; prodigy has only one.
    lr_scheduler: how the learning rate changes over the run.
    lr_warmup_steps: steps of linear rise at the start, for schedules other than constant, and for schedulefree.
    lr_num_cycles: restarts of cosine_with_restarts.
    lr_power: power of polynomial.
    optimizer: adamw; adamw8bit (pip install bitsandbytes), prodigy (prodigyopt) or schedulefree (schedulefree).
    adam_beta1: decay of the first moment, in all four optimizers.
    adam_beta2: decay of the second moment.
    adam_weight_decay: decoupled weight decay; it pulls rotations towards the identity and leaves output scales alone.
    adam_epsilon: added to the denominator.
    max_grad_norm: largest norm of the gradient; 0 switches clipping off.
    snr_gamma: gamma of min-SNR loss weights (5 is usual); by default none.
    offset_noise: strength of the noise that is constant over each latent channel; 0 switches it off.
    mixed_precision: type of the frozen base and of the activations; what trains is always float32. By default what
      accelerate's launcher says.
    attention_backend: diffusers' attention backend for the UNet: native, xformers, flash and others.
    dataloader_num_workers: processes that prepare photos when latents are not cached.
    seed: the run's random numbers: same seed, settings and machine, same result.
    checkpointing_steps: write a checkpoint every so many steps, 0 for never; a run that is stopped writes one anyway.
    checkpoints_total_limit: checkpoints to keep; by default all.
    resume_from_checkpoint: checkpoint to go on from: a folder, its name in output_dir, or latest; of a run's folder the
      latest.
    accept_changes: resume although settings, photos or the number of processes are not those of the checkpoint.
    report_to: tracker that accelerate knows (tensorboard, wandb), several with commas between them, all, or none.
    push_to_hub: publish adapter, model card and last validation sheet on the Hugging Face hub at the end.
    hub_model_id: name there, with or without an owner; by default that of output_dir.
    hub_token: access token, kept nowhere; by default the one of `hf auth login` or of HF_TOKEN.
    validation_prompts: prompts drawn during training and at its end, with `{0} {1}` for the subject's name as in
      inference.py; by default the subject in a few scenes.
    num_validation_images: pictures for each validation prompt; 0 for no validation at all.
    validation_steps: draw the validation prompts every so many steps; 0 for only at the end.
    sample_batch_size: pictures drawn at a time.
    sampler: how validation and class images are drawn; kept in the adapter for inference.
    """

    instance_data_dir: str = ""
    class_word: str | None = None
    unique_token: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: str | None = None
    concepts_list: tuple[Concept, ...] = ()
    output_dir: str | None = None

    pretrained_model_name_or_path: str = BUNDLED_BASE
    base_config: str | None = None
    revision: str | None = None
    variant: str | None = None
    adapter: AdapterConfig = AdapterConfig(nblocks=32)

    resolution: int | None = None
    aspect_buckets: bool = False
    center_crop: bool = False
    random_flip: bool = False
    unmasked_weight: float = 1.0
    cache_latents: bool = True

    with_prior_preservation: bool = False
    prior_loss_weight: float = 1.0
    num_class_images: int = 100

    max_train_steps: int | None = None
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    quantize_base: Literal["nf4"] | None = None
    learning_rate: float | None = None
    text_encoder_lr: float | None = None
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    snr_gamma: float | None = None
    offset_noise: float = 0.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    attention_backend: str | None = None
    dataloader_num_workers: int = 0
    seed: int = 0

    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    accept_changes: bool = False
    report_to: str = "tensorboard"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    validation_prompts: tuple[str, ...] | None = None
    num_validation_images: int = 2
    validation_steps: int = 250
    sample_batch_size: int = 4
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        settle_paths(self, *PATHS, "resume_from_checkpoint")
        concepts = self.concepts
        if self.concepts_list:
            _check_concepts(concepts)
            defaults = {field.name: field.default for field in fields(self)}
            if given := [field.name for field in fields(Concept) if getattr(self, field.name) != defaults[field.name]]:
                raise UserError(f"--{given[0]}: belongs into the --concepts_list, which says all of every subject")
        if self.with_prior_preservation and not all(one.class_word or one.class_prompt for one in concepts):
            raise UserError("--with_prior_preservation needs --class_word or --class_prompt")
        require(self, lambda weight: 0 <= weight <= 1, "between 0 and 1", "unmasked_weight")
        require(self, positive, "more than 0", *_POSITIVE)
        require(self, not_negative, "0 or more", *_NOT_NEGATIVE)
        require(self, lambda seed: seed < 2**63, "less than 2⁶³", "seed")
        require(self, lambda beta: 0 <= beta < 1, "at least 0 and less than 1", "adam_beta1", "adam_beta2")
        if self.optimizer == "prodigy" and (self.learning_rate or 0) < 0.1:
            raise UserError("--optimizer prodigy finds the step size itself: give --learning_rate 1")
        if self.optimizer == "prodigy" and self.text_encoder_lr not in (None, self.learning_rate):
            raise UserError("--text_encoder_lr: --optimizer prodigy finds one step size for all; leave it out")
        if self.optimizer == "schedulefree" and self.adam_beta1 == 0:
            raise UserError("--adam_beta1 0: --optimizer schedulefree averages by it; give more than 0")
        if self.lr_scheduler == "polynomial" and self.learning_rate and self.learning_rate <= POLYNOMIAL_END:
            raise UserError(
                f"--learning_rate {self.learning_rate:g}: --lr_scheduler polynomial falls to {POLYNOMIAL_END:g}; "
                "give a larger rate, or --lr_scheduler linear"
            )
        if self.max_train_steps is not None and self.lr_warmup_steps >= self.max_train_steps:
            raise UserError(
                f"--lr_warmup_steps {self.lr_warmup_steps}: the run ends at step {self.max_train_steps}, before the "
                "learning rate has risen; give fewer"
            )
        refuse_without_effect(self, _REFUSED)

    def notes(self) -> list[str]:
        """What has no effect among the settings but is no reason to refuse them. To be asked once they are complete."""
        notes = list(without_effect(self, _NOTED))
        if not self.with_prior_preservation and any(one.asks_for_class_images for one in self.concepts_list):
            notes.append("--concepts_list names class images, which are only used with --with_prior_preservation")
        return notes

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The subjects to learn, one or several."""
        return self.concepts_list or (Concept(**{field.name: getattr(self, field.name) for field in fields(Concept)}),)

    def resolved(self) -> TrainingConfig:
        """The same settings with the prompts and folders that follow from others filled in."""
        concepts = tuple(concept.resolved() for concept in self.concepts)
        prompts: dict[str, Any] = {"concepts_list": concepts} if self.concepts_list else concepts[0].to_dict()
        name = "_and_".join(Path(concept.instance_data_dir).resolve().name for concept in concepts)
        names = [asdict(concept) for concept in concepts]
        return replace(
            self,
            **prompts,
            output_dir=self.output_dir or str(Path("outputs") / name[:100]),
            validation_prompts=tuple(with_names(composed(prompt), names) for prompt in self.validation_prompts or ())
            or self.usual_scenes,
        )

    @property
    def usual_scenes(self) -> tuple[str, ...]:
        """The validation prompts that are taken where none are given."""
        shown = [concept.scenes()[: 2 if self.concepts_list else None] for concept in self.concepts]
        return tuple(chain.from_iterable(shown))


def _check_concepts(concepts: Sequence[Concept]) -> None:
    """Raise UserError if two of the subjects cannot be told apart, or if what they share means different things."""
    resolved = [concept.resolved() for concept in concepts]
    prompts = [concept.instance_prompt or "" for concept in resolved]
    own: dict[str, list[tuple[str, object]]] = {
        "instance_data_dir": [(one.instance_data_dir, Path(one.instance_data_dir).resolve()) for one in resolved],
        "instance_prompt": [(prompt, " ".join(prompt.casefold().split())) for prompt in prompts],
        "unique_token": [(token, token.casefold()) for one in resolved if (token := one.unique_token)],
    }
    for name, values in own.items():
        keys = [key for _, key in values]
        if twice := [value for value, key in values if keys.count(key) > 1]:
            raise UserError(f"--concepts_list: {name} {twice[-1]} comes twice; give each subject its own")
    words = {one.class_word.casefold() for one in resolved if one.class_word}
    for one in resolved:
        if one.unique_token and one.unique_token.casefold() in words:
            raise UserError(
                f"--concepts_list: unique_token {one.unique_token} is another subject's class_word; give a rare word "
                "that is one subject's alone"
            )
    meanings: dict[Path, str | None] = {}
    for one in resolved:
        if one.class_data_dir:
            meaning = meanings.setdefault(Path(one.class_data_dir).resolve(), one.class_prompt)
            if meaning != one.class_prompt:
                both = f'"{meaning}" and "{one.class_prompt}"'
                raise UserError(
                    f"--concepts_list: class_data_dir {one.class_data_dir} comes with two class prompts, {both}; "
                    "give each class its own"
                )


# Folders and files, or in some cases names on the hub.
PATHS = ("instance_data_dir", "class_data_dir", "output_dir", "pretrained_model_name_or_path", "base_config")


def _is_file(settings: Any) -> bool:
    return settings.pretrained_model_name_or_path.endswith(".safetensors")


_REFUSED = (
    OnlyWith(
        ("prior_loss_weight", "num_class_images", "class_data_dir"),
        lambda settings: settings.with_prior_preservation,
        "it is about class images; give --with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("class_prompt",),
        lambda settings: settings.with_prior_preservation or not settings.concepts[0].asks_for_class_images,
        "it is about class images; give --with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("lr_scheduler",),
        lambda settings: settings.optimizer != "schedulefree",
        "--optimizer schedulefree needs no schedule; give --lr_scheduler constant, or leave it out",
    ),
    OnlyWith(
        ("lr_warmup_steps",),
        lambda settings: settings.lr_scheduler != "constant" or settings.optimizer == "schedulefree",
        "a constant rate does not rise; give --lr_scheduler constant_with_warmup, or another, or leave it out",
    ),
    OnlyWith(
        ("lr_num_cycles",),
        lambda settings: settings.lr_scheduler == "cosine_with_restarts",
        "it is for --lr_scheduler cosine_with_restarts; give that, or leave it out",
    ),
    OnlyWith(
        ("lr_power",),
        lambda settings: settings.lr_scheduler == "polynomial",
        "it is for --lr_scheduler polynomial; give that, or leave it out",
    ),
    OnlyWith(
        ("text_encoder_lr",),
        lambda settings: settings.adapter.text_encoder,
        "the text encoder is not trained; leave it out",
    ),
    OnlyWith(
        ("accept_changes",),
        lambda settings: settings.resume_from_checkpoint,
        "it is for --resume_from_checkpoint; give that, or leave it out",
    ),
    OnlyWith(
        ("hub_model_id", "hub_token"),
        lambda settings: settings.push_to_hub,
        "it is for --push_to_hub; give that as well, or leave it out",
    ),
    OnlyWith(
        ("base_config",),
        _is_file,
        "only a .safetensors file needs to be told its configuration; leave it out",
    ),
    OnlyWith(
        ("revision", "variant"),
        lambda settings: not _is_file(settings),
        "the base model is a single file; leave it out",
    ),
)
_NOTED = (
    OnlyWith(
        ("with_prior_preservation",),
        lambda settings: settings.prior_loss_weight > 0,
        "--prior_loss_weight is 0, so class images teach nothing",
    ),
    OnlyWith(
        ("validation_steps",),
        lambda settings: settings.num_validation_images,
        "--num_validation_images is 0, so nothing is drawn",
    ),
    OnlyWith(
        ("validation_prompts",),
        lambda settings: settings.num_validation_images or settings.validation_prompts == settings.usual_scenes,
        "--num_validation_images is 0, so nothing is drawn",
    ),
    OnlyWith(
        ("validation_steps",),
        lambda settings: not settings.num_validation_images or settings.validation_steps < settings.max_train_steps,
        "the run is not longer; what is drawn is drawn at its end",
    ),
    OnlyWith(
        ("checkpointing_steps",),
        lambda settings: settings.checkpointing_steps <= settings.max_train_steps,
        "the run is shorter; it leaves its result, and a checkpoint only if it is stopped",
    ),
    OnlyWith(
        ("checkpoints_total_limit",),
        lambda settings: settings.checkpointing_steps,
        "--checkpointing_steps is 0, so no checkpoints are written but by a run that is stopped",
    ),
    OnlyWith(
        ("dataloader_num_workers",),
        lambda settings: not settings.cache_latents,
        "photos are encoded once, before training; with --no_cache_latents workers prepare them on the way",
    ),
)
_POSITIVE = (
    "resolution",
    "num_class_images",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "text_encoder_lr",
    "lr_num_cycles",
    "adam_epsilon",
    "snr_gamma",
    "checkpoints_total_limit",
    "sample_batch_size",
)
_NOT_NEGATIVE = (
    "prior_loss_weight",
    "lr_warmup_steps",
    "lr_power",
    "adam_weight_decay",
    "max_grad_norm",
    "offset_noise",
    "dataloader_num_workers",
    "seed",
    "checkpointing_steps",
    "num_validation_images",
    "validation_steps",
)


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """Everything `inference.py` can be told.

    adapter: the adapter file that training wrote, or its folder, or that of a checkpoint; or several for the same base
      model, which then act in this order.
    strength: of each adapter, from 0 for the base model to 1 for what was trained; by default 1.
    prompts: prompts to draw; the subject goes by the name it was trained with, such as "a sks dog" or "a {0} {1}".
    prompts_file: text file with one prompt a line, instead of prompts; a line that starts with # is a comment;
      `{0} {1}` stands for the subject's name, and `{2} {3}` for that of a second one.
    num_images: pictures for each prompt.
    seed: seed of each prompt's first picture; the following ones count upwards from it.
    num_inference_steps: denoising steps; by default as in the adapter's training.
    guidance_scale: weight of classifier-free guidance; 1 or less switches it off; by default as in the adapter's
      training.
    negative_prompt: what guidance leads away from; by default as in the adapter's training.
    scheduler: a diffusers scheduler class such as DDIMScheduler; by default as in the adapter's training.
    resolution: side in pixels of square pictures; by default as in the adapter's training.
    width: of pictures that are not square, in pixels; by default the resolution.
    height: of pictures that are not square, in pixels; by default the resolution.
    batch_size: pictures drawn at a time; changes speed and memory, not the pictures.
    output_dir: folder for the pictures; by default `images` in the run's folder, and there `images/checkpoint-<step>`
      for those of a checkpoint.
    compare: draw the untouched base model's picture with the same seed beside each.
    pretrained_model_name_or_path: where the base model is now, if it has moved since training.
    mixed_precision: type of weights and activations; by default as in the adapter's training.
    cpu_offload: keep VAE and text encoders in main memory while they have nothing to do; the pictures stay the same.
    device: cpu, cuda, cuda:1, mps; by default the fastest there is.
    """

    adapter: tuple[str, ...]
    strength: tuple[float, ...] = ()
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    num_images: int = 4
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None
    resolution: int | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 4
    output_dir: str | None = None
    compare: bool = False
    pretrained_model_name_or_path: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    cpu_offload: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        settle_paths(self, "adapter", "prompts_file", "output_dir", "pretrained_model_name_or_path")
        weighed(self.adapter, self.strength)
        if self.prompts and self.prompts_file:
            raise UserError("--prompt and --prompts_file: give one of them")
        sizes = ("num_images", "batch_size", "resolution", "width", "height", "num_inference_steps")
        require(self, positive, "more than 0", *sizes)
        require(self, not_negative, "0 or more", "seed", "guidance_scale")
        require(self, lambda seed: seed < 2**63, "less than 2⁶³", "seed")
        refuse_without_effect(self, [_NEGATIVE_PROMPT, *_REFUSED_IN_GENERATION])

    @property
    def strengths(self) -> dict[str, float]:
        """The adapters with their strengths, in their order."""
        return weighed(self.adapter, self.strength)


_REFUSED_IN_GENERATION = (
    OnlyWith(
        ("resolution",),
        lambda settings: not (settings.width and settings.height),
        "--width and --height are given; leave it out",
    ),
    OnlyWith(
        ("compare",),
        lambda settings: any(settings.strengths.values()),
        "at --strength 0 both pictures are the base model's; leave one of the two out",
    ),
)


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Everything `export.py` can be told.

    adapter: the adapter file that training wrote, or its folder, or that of a checkpoint; or several for the same base
      model, which then act in this order.
    format: diffusers (a folder) and checkpoint (one file with Stable Diffusion's original keys) are the whole model
      with the adapter merged in; diffusers_lora and kohya_lora are small files that only come near it.
    strength: of each adapter, from 0 for the base model to 1 for what was trained; by default 1.
    output: folder or file to write, which must not exist yet; by default in the run's folder, named after the format,
      and after the checkpoint if it is one's.
    rank: rank of a LoRA, 64 by default; the higher, the nearer to the adapter.
    precision: type of the numbers written.
    pretrained_model_name_or_path: where the base model is now, if it has moved since training.
    """

    adapter: tuple[str, ...]
    format: Literal["diffusers", "checkpoint", "diffusers_lora", "kohya_lora"]
    strength: tuple[float, ...] = ()
    output: str | None = None
    rank: int | None = None
    precision: Literal["float16", "float32"] = "float16"
    pretrained_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        settle_paths(self, "adapter", "output", "pretrained_model_name_or_path")
        if not any(weighed(self.adapter, self.strength).values()):
            raise UserError("--strength 0: is the base model as it was; there is nothing to export")
        require(self, positive, "more than 0", "rank")
        refuse_without_effect(self, [_RANK])
        if self.output and (self.format == "diffusers") == self.output.endswith(".safetensors"):
            wanted = "is a folder" if self.format == "diffusers" else "must end in .safetensors"
            raise UserError(f"--output {self.output}: {wanted} with --format {self.format}")

    @property
    def strengths(self) -> dict[str, float]:
        """The adapters with their strengths, in their order."""
        return weighed(self.adapter, self.strength)

    @property
    def is_lora(self) -> bool:
        return self.format.endswith("_lora")


_RANK = OnlyWith(
    ("rank",),
    lambda settings: settings.is_lora,
    "it is for LoRAs, and --format diffusers and checkpoint hold all of the adapter; leave it out",
)


def weighed(adapters: Sequence[str], strengths: Sequence[float]) -> dict[str, float]:
    """Each adapter's strength, 1 if none is given. UserError unless adapters differ and strengths fit them."""
    if not all(adapters or [""]):
        raise UserError("--adapter: name the adapter file that training wrote")
    if twice := [adapter for adapter in adapters if list(adapters).count(adapter) > 1]:
        raise UserError(f"--adapter {twice[0]}: comes twice; give it once, with a --strength")
    if strengths and len(strengths) != len(adapters):
        raise UserError(f"--strength: give one for each --adapter, {len(adapters)} and not {len(strengths)}")
    if not all(map(math.isfinite, strengths)):
        raise UserError(f"--strength {' '.join(map(str, strengths))}: must be finite numbers")
    return dict(zip(adapters, strengths or (1.0,) * len(adapters), strict=True))


def token_in(prompt: str, class_word: str | None) -> str | None:
    """What stands before the class word in a prompt, back to an article or the like; None if nothing does.

    "zwx" in "a photo of a zwx teddy bear on a bed".
    """
    words, wanted = prompt.split(), (class_word or "").split()
    at = _place(words, wanted)
    name: list[str] = []
    while wanted and at - len(name) > 0:
        word = words[at - len(name) - 1]
        if NOT_NAMES.fullmatch(word.lower()) or word[-1] in ",.;:!?":
            break
        name.insert(0, word)
    return " ".join(name) or None


def has_words(text: str, words: str) -> bool:
    """Whether these words are in the text, one after the other."""
    return _place(text.split(), words.split()) >= 0


def _place(words: Sequence[str], wanted: Sequence[str]) -> int:
    """Where the wanted words begin among others, without regard to capitals and to what punctuation follows; or -1."""

    def plain(some: Sequence[str]) -> list[str]:
        return [(re.sub(r"('s|[^\w>])*$", "", word) or word).casefold() for word in some]

    starts = range(len(words) - len(wanted) + 1)
    return next((at for at in starts if plain(words[at : at + len(wanted)]) == plain(wanted)), -1)


def with_names(prompt: str, subjects: Sequence[Mapping[str, str | None]]) -> str:
    """The prompt with the first subject's unique token for `{0}` and its class word for `{1}`, as in DreamBooth's
    prompt lists; `{2}` and `{3}` are the second subject's, and so on. UserError for a name that is not known.
    """

    def word(found: re.Match[str]) -> str:
        subject, part = divmod(int(found[1]), 2)
        name = ("unique_token", "class_word")[part]
        if subject >= len(subjects):
            raise UserError(f"{prompt!r}: {found[0]} is of subject {subject + 1}, and there are {len(subjects)}")
        if not (known := subjects[subject].get(name)):
            trained = subjects[subject].get("instance_prompt")
            how = f', only of its prompt "{trained}"' if trained else ""
            raise UserError(
                f"{prompt!r}: {found[0]} cannot be filled in: nothing is known of the subject's {name}{how}; "
                "write out what it is called"
            )
        return known

    return re.sub(r"\{(\d{1,2})\}", word, prompt)


def _plain_noun(text: str) -> str:
    """A class word without an article before it, which prompts add themselves, and without surplus blanks."""
    return re.sub(r"^(a|an|the) (?=.)", "", " ".join(composed(text).split()), flags=re.IGNORECASE)


def with_article(noun: str) -> str:
    """`noun` with its indefinite article by the sound it starts with: a dog, an orange, a unicorn."""
    vowel = re.match(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest", noun.lower())
    return f"{'an' if vowel else 'a'} {noun}"
