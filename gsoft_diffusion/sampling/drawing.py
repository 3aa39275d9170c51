"""What gsoft-draw does: pictures of prompts by adapters from files, each into a PNG, and contact sheets of them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gsoft.fingerprint import BaseModelIdentity
from gsoft_diffusion.adapters.file import AdapterFile, read_adapters
from gsoft_diffusion.adapters.identity import public_identity_of
from gsoft_diffusion.adapters.loading import load_base
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config import GenerationConfig, SamplerConfig
from gsoft_diffusion.config.prompts import with_names
from gsoft_diffusion.config.sampler import guides
from gsoft_diffusion.foundation.bundled import found
from gsoft_diffusion.foundation.errors import UserError, printable
from gsoft_diffusion.foundation.files import check_writable
from gsoft_diffusion.foundation.memory import running_out_explained
from gsoft_diffusion.foundation.run_folder import checkpoint_name, run_folder
from gsoft_diffusion.foundation.text_files import composed, read_prompts
from gsoft_diffusion.models.compilation import compile_networks
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.models.loading import DTYPES, best_device, known_device
from gsoft_diffusion.sampling.contact_sheets import contact_sheets, sheet_rows
from gsoft_diffusion.sampling.generation import Sample, generate
from gsoft_diffusion.sampling.pictures import PictureFile, next_number, save_png, slug
from gsoft_diffusion.sampling.schedulers import with_model_sampler

BASE = "base"  # in names of files and in what pictures say of themselves
BASE_CAPTION = "base model"
LARGEST = 4096  # side of pictures that an adapter's file may ask for


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
    subjects = [subject for each in files for subject in each.subjects]
    prompts = _prompts(config, subjects)
    sampler, resolution = _sampler(config, files[0])
    folder = Path(config.output_dir or run_folder(files[0].path) / "images" / checkpoint_name(files[0].path))
    check_writable(folder, "--output_dir")
    model = load_base(
        files[0],
        config.pretrained_model_name_or_path,
        variant=config.variant,
        base_config=config.base_config,
        dtype=DTYPES[_precision(config, files[0])],
        device=known_device(config.device or best_device()),
        cpu_offload=config.cpu_offload,
        offload_layers=config.offload_layers,
    )
    resolution = resolution or model.resolution
    width, height = config.width or resolution, config.height or resolution
    model.check_sides(resolution=resolution, width=width, height=height)
    stack, base_model = _stack(config, model, files[0])
    if config.compile:
        compile_networks([model.denoiser], model.device)
    sampler = with_model_sampler(model, sampler)

    jobs = list(product(prompts, range(config.seed, config.seed + config.num_images)))
    settings = {
        "subjects": subjects,
        "base_model": asdict(base_model),
        "sampler": sampler.to_dict(),
        "width": width,
        "height": height,
    }
    first = next_number(folder)
    drawn = []
    for column in _columns(config, files):
        with model.on_device(*model.text_encoders, written=True):  # elsewhere their weights would be rounded otherwise
            stack.use(column.strengths)
        samples = generate(model, jobs, sampler, width=width, height=height, batch_size=config.batch_size)
        shown = tqdm(samples, total=len(jobs), desc=printable(column.caption or column.model), unit="picture")
        drawn.append((column.caption, list(_saved(shown, column, folder, first, settings))))
    facts = {"adapters": _adapter_facts(config, files)} | settings
    rows = sheet_rows(drawn, config.num_images)
    sheets = [
        save_png(sheet, folder, "contact_sheet_{}.png", number, facts)
        for number, sheet in enumerate(contact_sheets(rows, _title(config, files, sampler)), start=first)
    ]
    total = sum(len(samples) for _, samples in drawn)
    print(printable(f"{total} pictures in {folder}; look at {', '.join(map(str, sheets))}"))
    return sheets


def _stack(config: GenerationConfig, model: BaseModel, file: AdapterFile) -> tuple[AdapterStack, BaseModelIdentity]:
    """The adapters, none of them in use, and the identity of the base model that pictures are told."""
    stack = AdapterStack(model.denoiser, model.text_encoders)
    with model.on_device(*model.text_encoders):
        for path in config.adapter:
            stack.load(path, path, accept_other_base=config.accept_other_base)
        return stack, public_identity_of(model) if config.accept_other_base else file.base_model


def _saved(
    samples: Iterable[Sample], column: Column, folder: Path, first: int, settings: Mapping[str, Any]
) -> Iterator[SavedSample]:
    """The samples, each of which has been written into the folder, numbered from `first`, with its settings inside."""
    for number, sample in enumerate(samples, start=first):
        facts = {"prompt": sample.prompt, "seed": sample.seed, "model": column.model, "adapters": column.adapters}
        name = f"{{}}_seed{sample.seed}{column.mark}_{slug(sample.prompt)}.png"
        path = save_png(sample.image, folder, name, number, {**facts, **settings})
        yield SavedSample(sample.prompt, sample.seed, PictureFile(path, sample.image.size))


@dataclass(frozen=True)
class SavedSample:
    """A sample whose picture has been written, and is no longer in memory."""

    prompt: str
    seed: int
    image: PictureFile


@dataclass(frozen=True)
class Column:
    """What one picture in each group of a contact sheet is drawn with.

    strengths: of the adapters in use, by the names in the stack. adapters: what pictures say of them. caption: on the
    sheet, besides the seed. mark: in the names of files. model: `base` for the untouched base model.
    """

    strengths: Mapping[str, float]
    adapters: Sequence[Mapping[str, Any]]
    caption: str = ""
    mark: str = ""
    model: str = "adapter"


def _columns(config: GenerationConfig, files: Sequence[AdapterFile]) -> list[Column]:
    """What is drawn, one after the other: the adapters together or each by itself, and the base model if asked for."""
    strengths, facts = config.strengths, _adapter_facts(config, files)
    if config.side_by_side:
        runs = [_run_name(file.path) for file in files]
        given = zip(_distinct(runs), strengths.items(), facts, strict=True)
        columns = [Column({path: strength}, [fact], run, f"_{slug(run)}") for run, (path, strength), fact in given]
    else:
        columns = [Column(strengths, facts)]
    return columns + ([Column({}, facts, BASE_CAPTION, f"_{BASE}", BASE)] if config.compare else [])


def _adapter_facts(config: GenerationConfig, files: Sequence[AdapterFile]) -> list[dict[str, Any]]:
    """What pictures say of the adapters."""
    given = zip(files, config.strengths.values(), strict=True)
    return [{"name": f"{_run_name(file.path)}/{file.path.name}", "strength": strength} for file, strength in given]


def _title(config: GenerationConfig, files: Sequence[AdapterFile], sampler: SamplerConfig) -> str:
    """What stands above contact sheets."""
    given = zip(files, config.strengths.values(), strict=True)
    names = (_run_name(file.path) + (f" × {strength:g}" if strength != 1 else "") for file, strength in given)
    steps = f"{sampler.num_inference_steps} steps, guidance {sampler.guidance_scale:g}"
    return f"{', '.join(names)}: {sampler.scheduler}, {steps}"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number where another column has it: that of a run of the same name, or the base model's."""
    unique = {name for name in names if name not in (BASE, BASE_CAPTION) and names.count(name) == 1}
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({number})" for number in count(1))
        found.append(name if name in unique else next(each for each in numbered if each not in {*unique, *found}))
    return found


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
    try:
        trained = SamplerConfig.from_dict(_with_effect(file.training.get("sampler", {})), "sampler").to_dict()
    except UserError as error:
        raise UserError(f"{file.path}: bad sampler settings ({error})") from error
    given = {name: getattr(config, name) for name in trained if getattr(config, name) is not None}
    settings = trained | given  # the training's negative prompt goes with the training's guidance
    sampler = SamplerConfig(**(settings if config.negative_prompt else _with_effect(settings)))
    resolution = file.training.get("resolution")
    trained_at = resolution if isinstance(resolution, int) and 0 < resolution <= LARGEST else None
    return sampler, config.resolution or trained_at


def _with_effect(sampler: Any) -> Any:
    """Settings of a sampler without a negative prompt if guidance is off; what is no settings as it is."""
    scale = sampler.get("guidance_scale") if isinstance(sampler, Mapping) else None
    off = isinstance(scale, int | float) and not guides(scale)
    return {**sampler, "negative_prompt": ""} if off else sampler
