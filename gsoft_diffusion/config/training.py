"""All settings of the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.config.concept import Concept
from gsoft_diffusion.config.prompts import with_names
from gsoft_diffusion.config.sampler import SamplerConfig
from gsoft_diffusion.config.settings import (
    BELOW_2_TO_63,
    NOT_NEGATIVE,
    POSITIVE,
    Mark,
    OnlyWith,
    Rule,
    Settings,
    check_rules,
    refuse_without_effect,
    settle_paths,
    without_effect,
)
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.foundation.text_files import composed

POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial schedule ends at, whatever it starts from


BETWEEN_0_AND_1 = Rule(lambda weight: 0 <= weight <= 1, "between 0 and 1")
DECAY = Rule(lambda beta: 0 <= beta < 1, "at least 0 and less than 1")


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """All settings of the training; their names follow diffusers' train_dreambooth.py.

    instance_data_dir: folder with the photos of the subject; three to five are enough. Captions may be in .txt or
      .caption files or in metadata.jsonl or .csv, masks in files or in the photos' transparency.
    class_word: what the subject is, in a word or two: dog, toy car. Prompts that are not given are made with it.
    unique_token: rare word that becomes the subject's name; by default sks, or the words before the class word in
      instance_prompt.
    instance_prompt: prompt of photos that have no caption; by default "a photo of a <unique_token> <class_word>".
    class_prompt: prompt of the class images; by default "a photo of a <class_word>".
    class_data_dir: folder of class images; by default beside output_dir, one for each model, prompt and sampler.
    concepts_list: JSON or YAML file with several subjects to learn in one run, instead of the settings above. Each item
      has instance_data_dir, class_word and unique_token; it may have instance_prompt, class_prompt and class_data_dir.
    output_dir: folder for everything the run writes; by default outputs/<name of instance_data_dir>.
    pretrained_model_name_or_path: base model: a diffusers folder, a name on the hub, or a .safetensors file.
    base_config: for a .safetensors file, the diffusers folder or model on the hub that has its configuration; by
      default the usual one of its kind.
    revision: revision of the base model on the hub.
    variant: variant of the base model's weight files, such as fp16.
    adapter: shape of the adapter.
    resolution: side of the square pictures in pixels; by default what the base model was made for.
    aspect_buckets: keep the photos' shapes: crop to sizes of about resolution² pixels; each batch has one size.
    center_crop: crop photos in the middle; otherwise at one of five places along the cropped side, at random.
    random_flip: mirror half of the photos.
    unmasked_weight: weight of the loss outside of the subject's mask (0.1 is usual); 1 ignores masks.
    cache_latents: encode every photo (and each of its crops and flips) once, before training.
    with_prior_preservation: train on the class as well, so that it is not forgotten.
    prior_target: what the class is held to: class_images, pictures of it; or base_prediction, what the base model
      itself predicts for the photos and the class prompt, which needs no pictures.
    prior_loss_weight: weight of the class's loss.
    num_class_images: class images to train on; the base model draws missing ones, and surplus ones are not used.
    max_train_steps: optimizer steps; by default 3000 as in the paper, 600 on a miniature base.
    train_batch_size: photos in a batch, on each device (and as many samples of the class with prior preservation).
    gradient_accumulation_steps: batches in one optimizer step; by default what accelerate's launcher says.
    gradient_checkpointing: recompute activations in the backward pass: less memory, slower.
    compile: fuse the denoiser's operations with torch.compile; the first step takes minutes.
    cpu_offload: keep the VAE, and text encoders that do not train, in main memory while they are not in use.
    offload_layers: keep the denoiser's layers that no adapter uses in main memory, and copy each to the GPU while it
      computes: the same results, slower.
    quantize_base: store layers that no adapter uses, T5 and Qwen included, in 8 bits, float8, or in 4, nf4 (pip install
      bitsandbytes).
    learning_rate: step size of the optimizer; by default 2e-5, 2e-4 on a miniature base.
    text_encoder_lr: step size for the text encoders; by default 2e-6, 4e-6 on a miniature base; none with prodigy.
    lr_scheduler: how the learning rate changes over the run.
    lr_warmup_steps: steps of linear warm-up at the start, for schedules other than constant, and for schedulefree.
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
    attention_backend: diffusers' attention backend for the denoiser: native, xformers, flash and others.
    dataloader_num_workers: processes that prepare photos when latents are not cached.
    seed: seed of all random numbers; the same seed, settings and machine give the same result.
    checkpointing_steps: write a checkpoint every so many steps, 0 for never; a run that is stopped writes one anyway.
    checkpoints_total_limit: checkpoints to keep; by default all.
    resume_from_checkpoint: checkpoint to continue from: its folder, its name in output_dir, or latest; a run's folder
      stands for its latest. With latest, a run that was killed before its first checkpoint starts again.
    accept_changes: resume although settings, photos or the number of processes are not those of the checkpoint.
    report_to: tracker that accelerate knows (tensorboard, wandb), several with commas between them, all, or none.
    push_to_hub: publish adapter, model card and last validation sheet on the Hugging Face hub at the end.
    hub_model_id: name on the hub, with or without an owner; by default that of output_dir.
    hub_token: access token, never written to a file; by default that of `hf auth login` or of HF_TOKEN.
    validation_prompts: prompts drawn during training and at its end, with `{0} {1}` for the subject's name as in
      inference.py; by default the subject in a few scenes.
    num_validation_images: pictures for each validation prompt; 0 draws none.
    validation_steps: draw the validation prompts every so many steps; 0 for only at the end. The validation loss is
      measured then, too.
    score_validation: also draw the validation prompts with the base model, keep every picture, and score how like the
      photos and how true to the prompts they are; for subjects with two photos or more.
    validation_loss: also measure the loss at every validation, on the photos under crops, noise and timesteps that are
      always the same.
    validation_data_dir: folder with other photos of the subject, to measure the validation loss on instead.
    keep: which adapter is the result: last, or best, the step whose validation pictures have the best balance of
      likeness to the photos and truth to the prompts. With best they are scored as with score_validation.
    patience: with keep best, end the run when so many validations in a row bring nothing better; 0 for never.
    sample_batch_size: pictures drawn at a time.
    sampler: how validation and class images are drawn; saved in the adapter for inference.
    """

    instance_data_dir: Annotated[str, Mark.PATH, Mark.PRIVATE] = ""
    class_word: str | None = None
    unique_token: Annotated[str | None, Mark.FREE_TO_CHANGE] = None  # what is learned is in the prompts
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_data_dir: Annotated[str | None, Mark.PATH, Mark.PRIVATE] = None
    concepts_list: Annotated[tuple[Concept, ...], Mark.PRIVATE] = ()
    output_dir: Annotated[str | None, Mark.PATH, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = None

    pretrained_model_name_or_path: Annotated[str, Mark.PATH] = BUNDLED_BASE
    base_config: Annotated[str | None, Mark.PATH] = None
    revision: str | None = None
    variant: str | None = None
    adapter: AdapterConfig = AdapterConfig()

    resolution: Annotated[int | None, POSITIVE] = None
    aspect_buckets: bool = False
    center_crop: bool = False
    random_flip: bool = False
    unmasked_weight: Annotated[float, BETWEEN_0_AND_1] = 1.0
    cache_latents: bool = True

    with_prior_preservation: bool = False
    prior_target: Literal["class_images", "base_prediction"] = "class_images"
    prior_loss_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    num_class_images: Annotated[int, POSITIVE] = 100

    max_train_steps: Annotated[int | None, POSITIVE, Mark.FREE_TO_CHANGE] = None
    train_batch_size: Annotated[int, POSITIVE] = 4
    gradient_accumulation_steps: Annotated[int, POSITIVE] = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu_offload: bool = False
    offload_layers: bool = False
    quantize_base: Literal["float8", "nf4"] | None = None
    learning_rate: Annotated[float | None, POSITIVE] = None
    text_encoder_lr: Annotated[float | None, POSITIVE] = None
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    lr_num_cycles: Annotated[int, POSITIVE] = 1
    lr_power: Annotated[float, NOT_NEGATIVE] = 1.0
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = "adamw"
    adam_beta1: Annotated[float, DECAY] = 0.9
    adam_beta2: Annotated[float, DECAY] = 0.999
    adam_weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-2
    adam_epsilon: Annotated[float, POSITIVE] = 1e-8
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    snr_gamma: Annotated[float | None, POSITIVE] = None
    offset_noise: Annotated[float, NOT_NEGATIVE] = 0.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    attention_backend: str | None = None
    dataloader_num_workers: Annotated[int, NOT_NEGATIVE, Mark.FREE_TO_CHANGE] = 0
    seed: Annotated[int, NOT_NEGATIVE, BELOW_2_TO_63] = 0

    checkpointing_steps: Annotated[int, NOT_NEGATIVE, Mark.FREE_TO_CHANGE] = 500
    checkpoints_total_limit: Annotated[int | None, POSITIVE, Mark.FREE_TO_CHANGE] = None
    resume_from_checkpoint: Annotated[str | None, Mark.PATH, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = None
    accept_changes: Annotated[bool, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = False
    report_to: Annotated[str, Mark.FREE_TO_CHANGE] = "tensorboard"
    push_to_hub: Annotated[bool, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = False
    hub_model_id: Annotated[str | None, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = None
    hub_token: Annotated[str | None, Mark.PRIVATE] = None
    validation_prompts: Annotated[tuple[str, ...] | None, Mark.FREE_TO_CHANGE] = None
    num_validation_images: Annotated[int, NOT_NEGATIVE, Mark.FREE_TO_CHANGE] = 2
    validation_steps: Annotated[int, NOT_NEGATIVE, Mark.FREE_TO_CHANGE] = 250
    score_validation: Annotated[bool, Mark.FREE_TO_CHANGE] = False
    validation_loss: Annotated[bool, Mark.FREE_TO_CHANGE] = False
    validation_data_dir: Annotated[str | None, Mark.PATH, Mark.PRIVATE, Mark.FREE_TO_CHANGE] = None
    keep: Annotated[Literal["last", "best"], Mark.FREE_TO_CHANGE] = "last"
    patience: Annotated[int, NOT_NEGATIVE, Mark.FREE_TO_CHANGE] = 3
    sample_batch_size: Annotated[int, POSITIVE, Mark.FREE_TO_CHANGE] = 4
    sampler: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        settle_paths(self)
        concepts = self.concepts
        if self.concepts_list:
            _check_concepts(concepts)
            defaults = {field.name: field.default for field in fields(self)}
            if given := [field.name for field in fields(Concept) if getattr(self, field.name) != defaults[field.name]]:
                raise UserError(f"--{given[0]}: describes one subject; with --concepts_list, write it into that file")
            if self.validation_data_dir:
                raise UserError(
                    "--validation_data_dir: is for one subject, and --concepts_list names several; leave it out"
                )
        if self.with_prior_preservation and not all(one.class_word or one.class_prompt for one in concepts):
            raise UserError("--with_prior_preservation needs --class_word or --class_prompt")
        if self.with_prior_preservation:
            _check_class_prompts(concepts)
        check_rules(self)
        if self.optimizer == "prodigy" and (self.learning_rate or 0) < 0.1:
            raise UserError("--optimizer prodigy finds the step size itself: give --learning_rate 1")
        if self.optimizer == "prodigy" and self.text_encoder_lr not in (None, self.learning_rate):
            raise UserError("--text_encoder_lr: --optimizer prodigy finds one step size for all; leave it out")
        if self.optimizer == "schedulefree" and self.adam_beta1 == 0:
            raise UserError("--adam_beta1 0: --optimizer schedulefree averages weights with it; give more than 0")
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
        """A line for each setting that has no effect but is no reason to refuse the run. Ask only complete settings."""
        notes = list(without_effect(self, _NOTED))
        if not self.with_prior_preservation and any(one.asks_for_class_images for one in self.concepts_list):
            notes.append("--concepts_list names class images, which are only used with --with_prior_preservation")
        if self.predicts_prior and any(one.class_data_dir for one in self.concepts_list):
            notes.append("--concepts_list names folders of class images, and --prior_target base_prediction uses none")
        return notes

    @property
    def predicts_prior(self) -> bool:
        """Whether the class is held to the base model's own predictions."""
        return self.with_prior_preservation and self.prior_target == "base_prediction"

    @property
    def scores_validation(self) -> bool:
        """Whether validation pictures are scored."""
        return self.score_validation or self.keep == "best"

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The subjects to learn, one or several."""
        return self.concepts_list or (Concept(**{field.name: getattr(self, field.name) for field in fields(Concept)}),)

    def resolved(self) -> TrainingConfig:
        """The same settings with missing prompts and folders derived from the others."""
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
        """The validation prompts if none are given."""
        shown = [concept.scenes()[: 2 if self.concepts_list else None] for concept in self.concepts]
        return tuple(chain.from_iterable(shown))


def _check_concepts(concepts: Sequence[Concept]) -> None:
    """Raise UserError if two subjects share a name, photos or a prompt, or a class folder with different prompts."""
    resolved = [concept.resolved() for concept in concepts]
    prompts = [concept.instance_prompt or "" for concept in resolved]
    own: dict[str, list[tuple[str, object]]] = {
        "instance_data_dir": [(one.instance_data_dir, Path(one.instance_data_dir).resolve()) for one in resolved],
        "instance_prompt": [(prompt, _folded(prompt)) for prompt in prompts],
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


def _check_class_prompts(concepts: Sequence[Concept]) -> None:
    """Raise UserError if a subject has the prompt of a class: one prompt would be trained towards two things."""
    resolved = [concept.resolved() for concept in concepts]
    classes = {_folded(one.class_prompt) for one in resolved if one.class_prompt}
    for one in resolved:
        if one.instance_prompt and _folded(one.instance_prompt) in classes:
            raise UserError(
                f"--instance_prompt {one.instance_prompt}: is also the prompt of a class, which "
                "--with_prior_preservation keeps as it is; give the subject a rare word, as in: a photo of a sks dog"
            )


def _folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _is_file(settings: Any) -> bool:
    return settings.pretrained_model_name_or_path.endswith(".safetensors")


_REFUSED = (
    OnlyWith(
        ("prior_target", "prior_loss_weight"),
        lambda settings: settings.with_prior_preservation,
        "it is about keeping the class; give --with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("num_class_images", "class_data_dir"),
        lambda settings: settings.with_prior_preservation,
        "it is about class images; give --with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("num_class_images", "class_data_dir"),
        lambda settings: not settings.predicts_prior,
        "--prior_target base_prediction uses no class images; leave it out",
    ),
    OnlyWith(
        ("class_prompt",),
        lambda settings: settings.with_prior_preservation or not settings.concepts[0].asks_for_class_images,
        "it is about class images; give --with_prior_preservation as well, or leave it out",
    ),
    OnlyWith(
        ("keep",),
        lambda settings: settings.num_validation_images and settings.validation_steps,
        "it chooses by the pictures of several steps; give --num_validation_images and --validation_steps above 0",
    ),
    OnlyWith(
        ("validation_data_dir",),
        lambda settings: settings.validation_loss,
        "it is for --validation_loss; give that as well, or leave it out",
    ),
    OnlyWith(
        ("patience",),
        lambda settings: settings.keep == "best",
        "it is for --keep best; give that, or leave it out",
    ),
    OnlyWith(
        ("lr_scheduler",),
        lambda settings: settings.optimizer != "schedulefree",
        "--optimizer schedulefree needs no schedule; give --lr_scheduler constant, or leave it out",
    ),
    OnlyWith(
        ("lr_warmup_steps",),
        lambda settings: settings.lr_scheduler != "constant" or settings.optimizer == "schedulefree",
        "a constant rate has no warm-up; give --lr_scheduler constant_with_warmup or another, or leave it out",
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
        "it is for base models in a single .safetensors file; leave it out",
    ),
    OnlyWith(
        ("revision", "variant"),
        lambda settings: not _is_file(settings),
        "the base model is a single file; leave it out",
    ),
)
_NOTED = (
    OnlyWith(
        ("score_validation",),
        lambda settings: settings.num_validation_images,
        "--num_validation_images is 0, so nothing is drawn",
    ),
    OnlyWith(
        ("with_prior_preservation",),
        lambda settings: settings.prior_loss_weight > 0,
        "--prior_loss_weight is 0, so the class is not kept",
    ),
    OnlyWith(
        ("validation_steps",),
        lambda settings: settings.num_validation_images or settings.validation_loss,
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
        "the run is not longer; pictures are drawn only at its end",
    ),
    OnlyWith(
        ("keep",),
        lambda settings: settings.validation_steps < settings.max_train_steps,
        "the run is not longer than --validation_steps, so only its last step can be chosen; give fewer",
    ),
    OnlyWith(
        ("checkpointing_steps",),
        lambda settings: settings.checkpointing_steps <= settings.max_train_steps,
        "the run is shorter; it writes a checkpoint only if it is stopped",
    ),
    OnlyWith(
        ("checkpoints_total_limit",),
        lambda settings: settings.checkpointing_steps,
        "--checkpointing_steps is 0, so only a run that is stopped writes a checkpoint",
    ),
    OnlyWith(
        ("dataloader_num_workers",),
        lambda settings: not settings.cache_latents,
        "photos are encoded once, before training; only with --no_cache_latents do workers prepare them",
    ),
)
