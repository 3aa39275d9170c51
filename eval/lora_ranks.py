"""What an adapter loses as a LoRA, by rank: of the weights, layer by layer, and in pictures.

    python -m eval.lora_ranks --adapter outputs/dog/adapter.safetensors --out results/lora_ranks/dog

Draws the same prompts and seeds with the base model, with the adapter and with its LoRAs, as `export.py` would write
them. Writes `ranks.json`, `ranks.svg` and a contact sheet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from eval.score import add_encoder_options, chosen_encoders
from eval.sheets import save_sheets
from gsoft_diffusion.adapters.file import AdapterFile, read_adapter
from gsoft_diffusion.adapters.identity import public_identity_of
from gsoft_diffusion.adapters.loading import load_base
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.config.command_line import expanded_path, run
from gsoft_diffusion.config.sampler import SamplerConfig
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.files import new_places
from gsoft_diffusion.publish.approximation import total_error
from gsoft_diffusion.publish.low_rank import LoraLayer, lora_layers
from gsoft_diffusion.publish.model_card import public_base
from gsoft_diffusion.sampling.contact_sheets import Row
from gsoft_diffusion.sampling.generation import generate
from gsoft_diffusion.scoring import metrics
from gsoft_diffusion.scoring.encoders import Encoders
from gsoft_diffusion.scoring.pictures import embed

RANKS = (4, 8, 16, 32, 64)
PRECISION = torch.float16  # export.py's


@dataclass(frozen=True)
class Distances:
    """How far each picture is from the adapter's: root mean square of pixels in [0, 1]; 1 − cosine of CLIP and DINO."""

    pixels: list[float]
    clip: list[float]
    dino: list[float]

    def means(self) -> dict[str, float]:
        """The mean of each distance over the pictures, by name."""
        return {name: metrics.mean(values) for name, values in vars(self).items()}


@torch.no_grad()
def study(
    path: Path,
    ranks: Sequence[int],
    prompts: Sequence[str],
    seeds: int,
    encoders: Encoders,
    moved_to: str | None = None,
    accept_other_base: bool = False,
) -> tuple[dict[str, Any], list[Row]]:
    """All that is measured, as JSON values, and the rows of a contact sheet.

    path: the adapter file. ranks: of the LoRAs, in any order. prompts: what is drawn; if empty, what the run validated
    with. seeds: pictures for each prompt. encoders: for the distances, on the device that draws. moved_to: where the
    base model is now, if not where the adapter says. accept_other_base: as in `load_adapter`. Raises UserError if
    adapter or base model cannot be read, or the adapter changes nothing.
    """
    file = read_adapter(path)
    if file.changes_nothing:
        raise UserError(f"{path}: does not change the base model, so a LoRA has nothing to approximate")
    prompts = prompts or validation_prompts(file)
    model = load_base(file, moved_to, device=encoders.clip.device)
    stack = AdapterStack(model.denoiser, model.text_encoders)
    stack.load("adapter", path, accept_other_base=accept_other_base)
    base_model = public_identity_of(model)
    jobs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    sampler = SamplerConfig.from_dict(file.training.get("sampler", {}))
    resolution = file.training.get("resolution") or model.resolution

    def draw() -> list[Image.Image]:
        return [sample.image for sample in generate(model, jobs, sampler, resolution=resolution)]

    shown = {"base model": draw()}
    stack.use({"adapter": 1.0})
    shown["adapter"] = draw()
    stack.use({})
    compare = Comparison(shown["adapter"], encoders)
    base = compare(shown["base model"])
    weights = {name: weight for name, weight, _ in stack.composed({"adapter": 1.0})}
    largest = lora_layers(stack, {"adapter": 1.0}, max(ranks), PRECISION)
    rows = []
    for rank in tqdm(sorted(ranks), desc="ranks", unit="rank"):
        layers = [layer.truncated(rank) for layer in largest]
        with added(layers, weights):
            shown[f"rank {rank}"] = draw()
        distances = compare(shown[f"rank {rank}"])
        rows.append(
            {
                "rank": rank,
                "parameters": sum(layer.up.numel() + layer.down.numel() for layer in layers),
                "error": total_error(layers),
                "layers": {layer.name: layer.error for layer in layers},
                "distance": distances.means(),
                "pictures": vars(distances),
            }
        )
    result = {
        "adapter": file.path.resolve().parent.name,
        "config": file.config.to_dict(),
        "base_model": {"name": public_base(base_model.name)[1], "fingerprint": base_model.fingerprint},
        "precision": str(PRECISION).removeprefix("torch."),
        "change": {layer.name: layer.change for layer in largest},
        "prompts": list(prompts),
        "seeds": list(range(seeds)),
        "sampler": sampler.to_dict(),
        "resolution": resolution,
        "encoders": encoders.to_dict(),
        "base_distance": base.means(),
        "base_pictures": vars(base),
        "ranks": rows,
    }
    captions = [f"{prompt}, seed {seed}" for prompt, seed in jobs[:8]]
    return result, [Row(name, images[:8], captions) for name, images in shown.items()]


def validation_prompts(file: AdapterFile) -> list[str]:
    """The prompts that training drew. Raises UserError if the adapter names none."""
    prompts = file.training.get("validation_prompts")
    if not (isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)):
        raise UserError(f"{file.path}: names no validation prompts; give --prompts")
    return prompts


class Comparison:
    """Compares pictures with the adapter's for the same prompts and seeds."""

    def __init__(self, adapted: Sequence[Image.Image], encoders: Encoders) -> None:
        self.adapted, self.encoders = adapted, encoders
        self.embedded = embed(encoders, adapted)

    def __call__(self, images: Sequence[Image.Image]) -> Distances:
        pixels = [rms(image, goal) for image, goal in zip(images, self.adapted, strict=True)]
        embedded = embed(self.encoders, images)
        clip = metrics.drift(embedded.clip, self.embedded.clip).tolist()
        return Distances(pixels, clip, metrics.drift(embedded.dino, self.embedded.dino).tolist())


def rms(first: Image.Image, second: Image.Image) -> float:
    """Root mean square difference of two pictures, their pixels in [0, 1].

    first, second: of one size and mode, 8 bits a channel.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return float(np.sqrt(np.mean((difference / 255) ** 2)))


@contextmanager
def added(layers: Sequence[LoraLayer], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the LoRA is in the model's weights.

    layers: the LoRA. weights: the model's, by the layers' names, which are changed in place and put back bit for bit.
    """
    before = {layer.name: weights[layer.name].clone() for layer in layers}
    for layer in layers:
        weights[layer.name] += (layer.up.float() @ layer.down.float()).to(weights[layer.name].dtype)
    try:
        yield
    finally:
        for name, weight in before.items():
            weights[name].copy_(weight)


def plot(result: Mapping[str, Any]) -> Figure:
    """Error of the weights and distance of the pictures over ranks; in pictures the base model's distance is 1."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = result["ranks"]
    ranks = [row["rank"] for row in rows]
    errors = [list(row["layers"].values()) for row in rows]
    left.fill_between(ranks, [min(each) for each in errors], [max(each) for each in errors], alpha=0.2, label="layers")
    left.plot(ranks, [row["error"] for row in rows], "o-", color="#1d6fb8", label="all weights")
    left.set_title("lost of the change of the weights", fontsize=9)
    names = {"pixels": "pixels, RMS", "clip": "CLIP, 1 − cosine", "dino": "DINO, 1 − cosine"}
    for name, label in names.items():
        whole = result["base_distance"][name]
        if whole:
            shares = [row["distance"][name] / whole for row in rows]
            miniature = name != "pixels" and result["encoders"][name]["miniature"]
            right.plot(ranks, shares, "o-", label=label + (" (miniature)" if miniature else ""))
    right.axhline(1, color="#888888", linestyle=":", label="base model")
    right.set_title("distance of the pictures from the adapter's", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank of the LoRA")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figure


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=expanded_path, required=True, help="adapter file that training wrote")
    parser.add_argument(
        "--out", type=expanded_path, required=True, help="folder for the results, which must not exist yet"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="ranks to try (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", default=[], help="what to draw (default: the run's validation prompts)")
    parser.add_argument("--seeds", type=int, default=4, help="pictures for each prompt (default: %(default)s)")
    parser.add_argument("--pretrained_model_name_or_path", help="where the base model is now, if it has moved")
    parser.add_argument(
        "--accept_other_base",
        action="store_true",
        help="take a base model with other weights than the adapter was trained on; says how far away they are",
    )
    add_encoder_options(parser)
    args = parser.parse_args()
    if min(args.ranks) < 1 or args.seeds < 1:
        raise UserError("--ranks, --seeds: must be 1 or more")
    ranks, base = sorted(set(args.ranks)), args.pretrained_model_name_or_path
    with new_places("--out", args.out) as (folder,):
        encoders = chosen_encoders(args)
        result, rows = study(args.adapter, ranks, args.prompts, args.seeds, encoders, base, args.accept_other_base)
        folder.mkdir()
        (folder / "ranks.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(result).savefig(folder / "ranks.svg")
        save_sheets(rows, "the same prompts and seeds at every rank", folder)
    print(f"the base model's pictures are {result['base_distance']['pixels']:.4f} from the adapter's (pixels, RMS)")
    for row in result["ranks"]:
        lost, distance = row["error"], row["distance"]["pixels"]
        print(
            f"rank {row['rank']:4}: loses {lost:.1%} of the change of the weights; its pictures are {distance:.4f} away"
        )
    print(f"all in {args.out}")
    return 0


if __name__ == "__main__":
    run(main)
