"""From prompts and seeds to pictures: the one sampler that validation, class images and inference share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from gsoft_diffusion.adapters.file import AdapterFile, read_adapters
from gsoft_diffusion.adapters.identity import public_identity_of
from gsoft_diffusion.adapters.loading import load_base
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import GenerationConfig, SamplerConfig
from gsoft_diffusion.config.prompts import with_names
from gsoft_diffusion.config.sampler import guides
from gsoft_diffusion.foundation.bundled import found
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import check_writable
from gsoft_diffusion.foundation.memory import running_out_explained
from gsoft_diffusion.foundation.run_folder import checkpoint_name, run_folder
from gsoft_diffusion.foundation.text_files import composed, read_prompts
from gsoft_diffusion.models.compilation import compile_networks
from gsoft_diffusion.models.families import BaseModel, Conditioning, whole_view
from gsoft_diffusion.models.loading import DTYPES, best_device, known_device
from gsoft_diffusion.sampling.pictures import Row, contact_sheets, next_number, save_png, slug
from gsoft_diffusion.sampling.schedulers import denoise, make_scheduler, with_model_sampler

PICTURES_A_ROW = 8  # on contact sheets
LARGEST = 4096  # side of pictures that an adapter's file may ask for


@dataclass(frozen=True)
class Sample:
    """A generated picture and what it was made from."""

    prompt: str
    seed: int
    image: Image.Image


@torch.no_grad()
def generate(
    model: BaseModel,
    jobs: Sequence[tuple[str, int]],
    sampler: SamplerConfig,
    *,
    resolution: int | None = None,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 4,
) -> Iterator[Sample]:
    """Draw one picture for each job, in order.

    All noise of a picture comes from its own generator on the CPU, so a picture depends on the batch size and the
    device by rounding only. Pixels that are not finite make a black picture.

    model: the base model, with whatever adapter is in it.
    jobs: a prompt and a seed each.
    sampler: settings of drawing; what they leave open is the model's own (see `with_model_sampler`).
    resolution: side in pixels of square pictures; the model's own by default.
    width, height: sides of pictures that are not square; `resolution` where one is left out.
    batch_size: pictures that are drawn at once.

    Yields each picture once its batch is done. Raises UserError, with the first picture, if the model cannot draw such
    sides or does not go with the scheduler.
    """
    resolution = resolution or model.resolution
    width, height = width or resolution, height or resolution
    model.check_sides(resolution=resolution, width=width, height=height)
    sampler = with_model_sampler(model, sampler)
    embeddings = {prompt: model.encode_prompts([prompt]) for prompt in sorted({prompt for prompt, _ in jobs})}
    away = model.encode_negative(sampler.negative_prompt)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        positive = _joined([embeddings[prompt] for prompt, _ in batch])
        negative = _joined([away] * len(batch))
        latents = _denoise(model, positive, negative, generators, sampler, width, height)
        for (prompt, seed), image in zip(batch, _to_images(model.decode(latents)), strict=True):
            yield Sample(prompt, seed, image)


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _denoise(
    model: BaseModel,
    positive: Conditioning,
    negative: Conditioning,
    generators: list[torch.Generator],
    sampler: SamplerConfig,
    width: int,
    height: int,
) -> Tensor:
    """Latents (N, C, h, w) for the conditioning of N prompts, by the scheduler and classifier-free guidance."""
    latent_shape = model.latent_shape(width, height)
    noise = torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators])
    guidance = sampler.guidance_scale
    assert guidance is not None, "with_model_sampler sets it"
    guided = guides(guidance) and not model.guides_itself
    conditioning = _joined([negative, positive]) if guided else positive
    views = whole_view(width, height).to(model.device).repeat(len(noise) * (2 if guided else 1), 1)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        latents = torch.cat([latents, latents]) if guided else latents
        prediction = model.predict(latents, timestep, conditioning, views, guidance)
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        return prediction

    scheduler = make_scheduler(model, sampler, latent_shape)
    return denoise(scheduler, noise.to(model.device), predict, generators)  # float32 throughout


def _to_images(pixels: Tensor) -> list[Image.Image]:
    finite = pixels.isfinite().flatten(1).all(dim=1)
    pixels = pixels.where(finite[:, None, None, None], -1.0)
    array = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


# What inference.py does


@running_out_explained(
    "use a smaller --batch_size or smaller pictures, --cpu_offload or --offload_layers, or --mixed_precision bf16"
)
def draw(config: GenerationConfig) -> list[Path]:
    """Draw `num_images` pictures for each prompt with adapters, each into a PNG, and contact sheets of them all.

    Adapters work together, or side by side, each by itself.

    What the settings leave open comes from the first adapter's metadata. Returns the paths of the contact sheets.

    Raises UserError if adapters, prompts, base model or settings cannot be used, the folder cannot be written, or
    memory runs out.
    """
    files = read_adapters(config.adapter)
    file = files[0]
    subjects = [subject for each in files for subject in each.subjects]
    prompts = _prompts(config, subjects)
    sampler, resolution = _sampler(config, file)
    folder = Path(config.output_dir or run_folder(file.path) / "images" / checkpoint_name(file.path))
    check_writable(folder, "--output_dir")
    model = load_base(
        file,
        config.pretrained_model_name_or_path,
        dtype=DTYPES[_precision(config, file)],
        device=known_device(config.device or best_device()),
        cpu_offload=config.cpu_offload,
        offload_layers=config.offload_layers,
    )
    stack = AdapterStack(model.denoiser, model.text_encoders)
    with model.on_device(*model.text_encoders):
        for path in config.adapter:
            stack.load(path, path, accept_other_base=config.accept_other_base)
        base_model = public_identity_of(model) if config.accept_other_base else file.base_model
    if config.compile:
        compile_networks([model.denoiser], model.device)
    resolution = resolution or model.resolution
    width, height = config.width or resolution, config.height or resolution
    sampler = with_model_sampler(model, sampler)

    jobs = list(product(prompts, range(config.seed, config.seed + config.num_images)))
    first = next_number(folder)
    runs = [_run_name(each.path) for each in files]
    strengths = config.strengths
    kept = [
        {"name": f"{run}/{each.path.name}", "strength": strength}
        for run, each, strength in zip(runs, files, strengths.values(), strict=True)
    ]
    settings = {
        "subjects": subjects,
        "base_model": asdict(base_model),
        "sampler": sampler.to_dict(),
        "width": width,
        "height": height,
    }

    def draw_jobs(column: Column) -> list[Sample]:
        with model.on_device(*model.text_encoders):  # elsewhere their weights would be rounded otherwise
            stack.use(column.strengths)
        samples = generate(model, jobs, sampler, width=width, height=height, batch_size=config.batch_size)
        drawn = []
        for number, sample in enumerate(tqdm(samples, total=len(jobs), desc=column.name, unit="picture"), start=first):
            facts = {"prompt": sample.prompt, "seed": sample.seed, "model": column.model, "adapters": column.adapters}
            name = f"{{}}_seed{sample.seed}{column.mark}_{slug(sample.prompt)}.png"
            save_png(sample.image, folder, name, number, facts | settings)
            drawn.append(sample)
        return drawn

    if config.side_by_side:
        given = zip(_distinct(runs), strengths.items(), kept, strict=True)
        columns = [Column(run, {path: strength}, [fact], f"_{slug(run)}") for run, (path, strength), fact in given]
    else:
        columns = [Column("adapter", strengths, kept)]
    if config.compare:
        columns.append(Column("base", {}, kept, "_base", "base"))
    drawn = {column.name: draw_jobs(column) for column in columns}
    names = (run + (f" × {one:g}" if one != 1 else "") for run, one in zip(runs, strengths.values(), strict=True))
    title = (
        f"{', '.join(names)}: {sampler.scheduler}, "
        f"{sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}"
    )
    sheets = []
    for number, sheet in enumerate(contact_sheets(sheet_rows(drawn, config.num_images), title), start=first):
        sheets.append(save_png(sheet, folder, "contact_sheet_{}.png", number, {"adapters": kept} | settings))
    print(f"{sum(map(len, drawn.values()))} pictures in {folder}; look at {', '.join(map(str, sheets))}")
    return sheets


@dataclass(frozen=True)
class Column:
    """What one picture in each group of a contact sheet is drawn with.

    name: on the sheet. strengths: of the adapters in use, by the names in the stack. adapters: what pictures say of
    them. mark: in the names of files. model: `base` for the untouched base model.
    """

    name: str
    strengths: Mapping[str, float]
    adapters: Sequence[Mapping[str, Any]]
    mark: str = ""
    model: str = "adapter"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where one comes twice, as runs of one name in two places do."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})" for at, name in enumerate(names)
    ]


def sheet_rows(columns: Mapping[str, Sequence[Sample]], images_each: int) -> list[Row]:
    """Rows of a contact sheet from the pictures of one or more models, the same prompts and seeds side by side.

    columns: each model's pictures by its name, in the same order of prompts and seeds.
    images_each: pictures that follow each other with the same prompt; what is too many for a row goes on in the next.
    """
    groups = list(zip(*columns.values(), strict=True))
    together = max(1, PICTURES_A_ROW // len(columns))
    rows = []
    for start in range(0, len(groups), images_each):
        same_prompt = groups[start : start + images_each]
        for at in range(0, len(same_prompt), together):
            group = same_prompt[at : at + together]
            images = [sample.image for samples in group for sample in samples]
            captions = [
                f"seed {sample.seed}" + {"adapter": "", "base": " · base model"}.get(model, f" · {model}")
                for samples in group
                for model, sample in zip(columns, samples, strict=True)
            ]
            rows.append(Row(group[0][0].prompt, images, captions))
    return rows


def _prompts(config: GenerationConfig, subjects: Sequence[Mapping[str, str]]) -> list[str]:
    prompts = list(config.prompts)
    if config.prompts_file:
        prompts = read_prompts(found(config.prompts_file), f"--prompts_file {config.prompts_file}")
    prompts = [with_names(composed(prompt).strip(), subjects) for prompt in prompts if prompt.strip()]
    if not prompts:
        trained = subjects[0].get("instance_prompt")
        hint = f'; the adapter was trained on "{trained}"' if trained else ""
        raise UserError(f"give --prompt or --prompts_file with a prompt in it{hint}")
    return prompts


def _run_name(adapter: Path) -> str:
    """The name of an adapter's run in pictures, with its checkpoint if it has one, without other folders."""
    return "/".join(filter(None, [run_folder(adapter).resolve().name, checkpoint_name(adapter)]))


def _precision(config: GenerationConfig, file: AdapterFile) -> str:
    """The type of weights and activations: what was given, else the training's."""
    trained = file.training.get("mixed_precision")
    return config.mixed_precision or (trained if trained in ("fp16", "bf16") else "no")


def _sampler(config: GenerationConfig, file: AdapterFile) -> tuple[SamplerConfig, int | None]:
    """Sampler and resolution: the adapter's, with what was given on top."""
    trained = file.training.get("sampler", {})
    given = {name: getattr(config, name) for name in SamplerConfig().to_dict() if getattr(config, name) is not None}
    if isinstance(trained, Mapping):
        trained = {**trained, **given}
        scale = trained.get("guidance_scale")
        if isinstance(scale, int | float) and not guides(scale) and not config.negative_prompt:
            trained["negative_prompt"] = ""  # the training's goes with the training's guidance
    sampler = SamplerConfig.from_dict(trained)
    resolution = file.training.get("resolution")
    trained_at = resolution if isinstance(resolution, int) and 0 < resolution <= LARGEST else None
    return sampler, config.resolution or trained_at
