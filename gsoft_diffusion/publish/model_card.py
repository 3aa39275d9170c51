"""The model card: a README.md beside a result that says what it is, how it was made and how to load it.

Written for others to read: it names no folder of the user's machine.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCardData

from gsoft.fingerprint import BaseModelIdentity, difference, how_far
from gsoft_diffusion.adapters.file import LAST_STEP, AdapterFile
from gsoft_diffusion.config import AdapterConfig, SamplerConfig
from gsoft_diffusion.foundation.model_names import BUNDLED_BASE
from gsoft_diffusion.models.families import (
    BaseModel,
    Flux,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
)

Kind = Literal["adapter", "diffusers", "checkpoint", "diffusers_lora", "kohya_lora", "diff"]
OTHER_BASE = "other_base"  # in what a file says of its training: that a run went on with another base model
MARK = "<!-- Written by gsoft-diffusion. Remove this line to keep what you write here when the run is resumed. -->"

WHAT = {
    "adapter": "An adapter of rotations (GSOFT) for {base}.",
    "diffusers": "{base} with an adapter of rotations (GSOFT) merged in: a whole model for diffusers.",
    "checkpoint": "{base} with an adapter of rotations (GSOFT) merged in: a whole model in one file.",
    "diffusers_lora": "The nearest LoRA to an adapter of rotations (GSOFT) for {base}. It loses part of it.",
    "kohya_lora": "The nearest LoRA to an adapter of rotations (GSOFT) for {base}. It loses part of it.",
    "diff": "The change of the weights that an adapter of rotations (GSOFT) makes to {base}.",
}
LONGEST = 200  # characters of a text of others between ours
BASE_PLACE = "<path of the base model>"  # of one that is not on the hub
LOADING = {
    "adapter": """With gsoft-diffusion:

```bash
python inference.py --adapter {file} --prompt {shell_prompt}
```

```python
from diffusers import DiffusionPipeline
from gsoft_diffusion import load_adapter

pipeline = DiffusionPipeline.from_pretrained("{base}")
adapter, file = load_adapter("{file}", {denoiser}, [{text_encoders}])
adapter.merge()  # from here on the pipeline is an ordinary one
```

In {programs} among the LoRAs, as it is, with the node pack in its folder `comfyui`. Its `export.py` makes whole
models and LoRAs for other tools. `--accept_other_base` with
`--pretrained_model_name_or_path <model>` uses the adapter on another base model of the same architecture, such as a
fine-tune, and says how far its weights are from those trained on.""",
    "diffusers": """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")  # or this repository's name on the hub
image = pipeline("{prompt}").images[0]
```""",
    "checkpoint": """In {programs} among the checkpoints, or with diffusers:

```python
from diffusers import {pipeline}

{from_single_file}
image = pipeline("{prompt}").images[0]
```""",
    "diffusers_lora": """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights(".", weight_name="{file}")  # or this repository's name on the hub
image = pipeline("{prompt}").images[0]
```""",
}
LOADING["diff"] = """In {programs} among the LoRAs: `{file}`, at strength 1{with_prompt}.

It is added to the weights. At other strengths the weights are no longer rotated ones."""
LOADING["kohya_lora"] = "In {programs} among the LoRAs, or with diffusers:\n\n" + LOADING["diffusers_lora"]
FROM_SINGLE_FILE = 'pipeline = {pipeline}.from_single_file("{file}", config="{base}")'
# diffusers reads no more than the transformer of this one, and leaves T5 of the other in training mode.
FROM_SINGLE_FILE_OF = {
    ZImage: """whole = {pipeline}.from_pretrained("{base}")
pipeline = {pipeline}.from_single_file(
    "{file}", config="{base}", text_encoder=whole.text_encoder, vae=whole.vae
)""",
    StableDiffusion3: FROM_SINGLE_FILE + "\npipeline.text_encoder_3.eval()",
}


def model_card(
    kind: Kind,
    result: str,
    files: Sequence[AdapterFile],
    strengths: Sequence[float] = (1.0,),
    *,
    model: BaseModel,
    base: BaseModelIdentity | None = None,
    picture: str | None = None,
) -> str:
    """The card, in Markdown with Hugging Face's YAML front matter. It states no licence: that is the user's to choose.

    kind: what the result is: an adapter, or the format of an export.
    result: name of the file or folder, as the card's neighbour.
    files: the adapters in it, of one base model.
    strengths: of the adapters, one for each.
    model: the base model that they act on.
    base: its identity, if it is not the one that they were trained on.
    picture: a contact sheet's path from the card; None for no picture.
    """
    subjects = [subject for file in files for subject in file.subjects]
    prompts = [_one_line(subject["instance_prompt"]) for subject in subjects if "instance_prompt" in subject]
    identity = base or files[0].base_model
    hub_base, base_name = public_base(identity.name)
    front = ModelCardData(
        base_model=hub_base,
        base_model_relation=hub_base and ("finetune" if kind in ("diffusers", "checkpoint") else "adapter"),
        library_name={"adapter": "gsoft-diffusion", "diff": None}.get(kind, "diffusers"),
        pipeline_tag="text-to-image",
        tags=["text-to-image", "dreambooth", "gsoft", "orthogonal-fine-tuning"] + ["lora"] * kind.endswith("_lora"),
        instance_prompt=prompts[0] if prompts else None,
    )
    parts = [
        f"---\n{_yaml(front.to_dict())}---",
        f"# {', '.join(_in_text(_title(subject)) for subject in subjects)}",
        WHAT[kind].format(base=_in_text(base_name)),
        *_other_bases(files, identity),
    ]
    if prompts:
        parts.append(f"Trained on the prompts: {', '.join(f'`{_in_code(prompt)}`' for prompt in prompts)}")
    if picture:
        parts.append(
            f"![A contact sheet]({quote(picture)})\n\n*Prompts, and what the adapter drew for them as it was trained.*"
        )
    places = {id(getattr(model, part)): f"pipeline.{part}" for part in model.parts()}
    code = {
        "base": _in_code(hub_base or BASE_PLACE),
        "file": result,
        "pipeline": model.pipeline,
        "prompt": _in_code(*prompts[:1] or [""]),
        "shell_prompt": shlex.quote(*prompts[:1] or [""]),
        "with_prompt": f", with the prompt `{_in_code(prompts[0])}`" if prompts else "",
        "denoiser": places[id(model.denoiser)],
        "text_encoders": ", ".join(places[id(encoder)] for encoder in model.text_encoders),
        "programs": _programs(kind, model),
    }
    code["from_single_file"] = FROM_SINGLE_FILE_OF.get(type(model), FROM_SINGLE_FILE).format(**code)
    parts += ["## How to load", LOADING[kind].format(**code), "## How it was made"]
    for file, strength in zip(files, strengths, strict=True):
        parts.append(_table(_settings(file) | ({"strength": f"{strength:g}"} if strength != 1 else {})))
    parts += [
        "The weights were rotated, not added to: *Group and Shuffle: Efficient Structured Orthogonal Parametrization* "
        "([arXiv 2406.10019](https://arxiv.org/abs/2406.10019)).",
        "## Licence",
        "Not chosen yet: add `license:` above. The terms of the base model apply to what is made from it.",
        MARK,
    ]
    return "\n\n".join(parts) + "\n"


def _yaml(front: Mapping[str, Any]) -> str:
    """Front matter with each text on one line: of a text that is folded, a line could be the `---` that ends it."""
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=math.inf)


def _programs(kind: Kind, model: BaseModel) -> str:
    """Which programs with a page read a result; see docs/export.md and comfyui/README.md."""
    if isinstance(model, ZImage) and kind == "kohya_lora":
        return "musubi-tuner, whose conversion makes it ComfyUI's,"
    return "ComfyUI and Forge" if isinstance(model, StableDiffusion | StableDiffusionXL | Flux) else "ComfyUI"


def _other_bases(files: Sequence[AdapterFile], base: BaseModelIdentity) -> list[str]:
    """A sentence for each adapter that was trained on another base model than this."""
    return [
        f"The adapter was trained on {_in_text(public_base(file.base_model.name)[1])}. Compared with that one's, the "
        f"attention weights of this base model are {how_far(file.base_model.fingerprint, base.fingerprint)}."
        for file in files
        if difference(file.base_model.fingerprint, base.fingerprint)
    ]


def public_base(name: str) -> tuple[str | None, str]:
    """A base model's name on the hub, None if it has none; and what to call it before others."""
    if name == BUNDLED_BASE:
        return None, "the miniature base model bundled with gsoft-diffusion"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not Path(name).exists():
        return name, name
    return None, Path(name).name or "a model without a name"


def may_write(path: Path) -> bool:
    """Whether there is no card at this path, or one that the user has not claimed."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


def _title(subject: Mapping[str, str]) -> str:
    names = [subject[name] for name in ("unique_token", "class_word") if name in subject]
    return " ".join(names) if len(names) == 2 else subject.get("instance_prompt", "a subject")


def _settings(file: AdapterFile) -> dict[str, Any]:
    training = file.training
    settings: dict[str, Any] = {"base model": public_base(file.base_model.name)[1], "method": _method(file.config)}
    settings["trained"] = "attention of the denoiser" + (" and the text encoders" if file.config.text_encoder else "")
    names = {
        "step": "steps",
        LAST_STEP: "steps of the run, of which the best was kept",
        "balance": "balance of likeness and prompt, from 0 to 1",
        "train_batch_size": "batch size",
        "gradient_accumulation_steps": "batches in a step",
        "optimizer": "optimizer",
        "learning_rate": "learning rate",
        "text_encoder_lr": "learning rate of the text encoder",
        "lr_scheduler": "learning rate schedule",
        "resolution": "resolution",
        "with_prior_preservation": "prior preservation",
        "snr_gamma": "min-SNR gamma",
        "unmasked_weight": "weight outside of masks",
        "aspect_buckets": "aspect buckets",
        "mixed_precision": "mixed precision",
        "seed": "seed",
        OTHER_BASE: "base model, compared with the first steps'",
    }
    for name, label in names.items():
        value = training.get(name)
        if name == "with_prior_preservation" and value and training.get("prior_target") == "base_prediction":
            value = "by the base model's predictions"
        if name == "balance" and isinstance(value, float):
            value = f"{value:.3f}"
        if value is not None and value is not False:
            settings[label] = "yes" if value is True else value
    sampler = training.get("sampler")
    if isinstance(sampler, Mapping):
        known = {field: sampler[field] for field in SamplerConfig().to_dict() if sampler.get(field)}
        settings["sampler of the pictures"] = ", ".join(f"{field} {value}" for field, value in known.items())
    return settings


def _method(config: AdapterConfig) -> str:
    size = f"{config.nblocks} blocks" if config.nblocks else f"blocks of side {config.block_size}"
    kind = config.parametrization.replace("_", " ")
    parts = ["Double GSOFT" if config.double else "GSOFT", size, f"{config.nfactors} factors", kind]
    return ", ".join(parts + ["a scale for each output"] * config.output_scale)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {label} | {_in_text(str(value))} |" for label, value in rows.items()]
    return "\n".join(["| setting | |", "|---|---|", *lines])


def _in_text(text: str) -> str:
    """Text of others as Markdown shows it literally, on one line, and cut if it is long."""
    line = _one_line(text)
    shown = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", shown)


def _in_code(text: str) -> str:
    """Text of others inside quotes in Python, or between backticks, on one line: whole, for it is to be used."""
    return _one_line(text).replace("`", "'").replace('"', "'").replace("\\", "/")


def _one_line(text: str) -> str:
    # Control characters would steer the terminal that a command is pasted into.
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
