"""Go or no-go: does the base draw what the prompt says, and sharply?

    python -m pretraining.check --work <work folder> --base <pipeline folder> --out <folder>

Class and place of 200 prompts, class and colour of 72, and class of 200 with the name "sks" before it, by the miniature
CLIP's zero-shot choice and by the second judge (`train_judge`); both judges' own accuracy on drawn scenes stands
beside. Sharpness and Fréchet distance as `sharpness` and `frechet_distance` say. Writes `check.json` and `check.webp`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.scoring.encoders import load_dino
from gsoft_diffusion.scoring.open_clip_layout import read_open_clip
from pretraining.render import scene_facts
from pretraining.sprites import CLASSES
from pretraining.train_clip import embed_images, embed_text, zero_shot
from pretraining.train_judge import load_judge
from pretraining.train_vae import reconstructed, to_pixels
from pretraining.unused_name import NAME
from pretraining.world import BACKGROUNDS, COLORS, World, article

STEPS, GUIDANCE, BATCH = 20, 3.0, 50
Choose = Callable[[Tensor], dict[str, list[Any]]]  # pictures to class words, backgrounds, (colour, class word) pairs
COLORED_CLASSES = 8  # each in every colour
COMPARED = 512  # pictures, and scenes, of which features are compared


def prompts(n: int) -> list[tuple[str, str, str]]:
    """`n` of (prompt, class word, background), classes and backgrounds evenly used."""
    rng = np.random.default_rng(7)
    words, places = list(CLASSES), list(BACKGROUNDS)
    pairs = [(words[i % len(words)], places[(i + i // len(words)) % len(places)]) for i in range(n)]
    return [(f"a photo of {article(w)} {BACKGROUNDS[b][rng.integers(len(BACKGROUNDS[b]))]}", w, b) for w, b in pairs]


def generate(pipeline: StableDiffusionPipeline, texts: list[str]) -> np.ndarray:
    """(len(texts), 64, 64, 3) uint8; every picture has its own seed, its number."""
    images = []
    for i in range(0, len(texts), BATCH):
        part = texts[i : i + BATCH]
        seeds = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        out = pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds, output_type="np")
        images.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def sheet(images: np.ndarray, labels: list[str], columns: int = 10) -> Image.Image:
    """Pictures with their labels below them."""
    cell_w, cell_h = 132, 150
    page = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = i % columns * cell_w, i // columns * cell_h
        page.paste(Image.fromarray(image).resize((128, 128), Image.Resampling.LANCZOS), (x + 2, y + 2))
        draw.text((x + 3, y + 133), label[:21], fill="black")
    return page


def colored_prompts() -> list[tuple[str, str, str]]:
    """(prompt, class word, colour): every colour with `COLORED_CLASSES` classes, other ones for each colour."""
    words = list(CLASSES)
    places = [phrases[0] for phrases in BACKGROUNDS.values()]
    asked = []
    for i, color in enumerate(COLORS):
        for j in range(COLORED_CLASSES):
            word, place = words[(4 * j + i) % len(words)], places[(i + j) % len(places)]
            asked.append((f"a photo of {article(f'{color} {word}')} {place}", word, color))
    return asked


def chosen_pairs(clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor) -> list[tuple[str, str]]:
    """The colour and class word that CLIP chooses together for every picture, from all pairs of them."""
    pairs = [(color, word) for color in COLORS for word in CLASSES]
    places = [phrases[0] for phrases in BACKGROUNDS.values()]
    texts = [[f"a photo of {article(' '.join(pair))} {place}" for place in places] for pair in pairs]
    options = torch.stack([normalize(embed_text(clip, tokenizer, text).mean(0), dim=0) for text in texts])
    return [pairs[i] for i in (embed_images(clip, pixels) @ options.T).argmax(1).tolist()]


def sharpness(pictures: Tensor, reference: Tensor) -> float:
    """Mean absolute difference between neighbouring pixels, over the reference's; both (N, 3, H, W)."""

    def gradient(x: Tensor) -> Tensor:
        return (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2

    return float(gradient(pictures) / gradient(reference))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between normal distributions with the means and covariances of two sets of features, each (N, D) (Heusel et al.,
    arXiv 1706.08500): `‖μₐ − μ_b‖² + tr(A + B − 2 (A B)^½)`.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # the eigenvalues of A B are real and not negative, as those of A^½ B A^½
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def share(wanted: Sequence[object], given: Sequence[object]) -> float:
    return float(np.mean([w == g for w, g in zip(wanted, given, strict=True)]))


def right_on_scenes(facts: Sequence[dict[str, Any]], given: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """How often a judge's answers on drawn scenes are true; colour with class on the recoloured ones only."""
    wanted = [(fact["color"], fact["class_word"]) for fact in facts]
    pairs = [(want, pair) for want, pair in zip(wanted, given["pair"], strict=True) if want[0]]
    return {
        "class": share([fact["class_word"] for fact in facts], given["class_word"]),
        "background": share([fact["background"] for fact in facts], given["background"]),
        "color_and_class": share(*zip(*pairs, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=expanded_path, required=True, help="work folder: sprites, scenes and the second judge"
    )
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline to judge")
    parser.add_argument(
        "--clip", type=expanded_path, default="data/mini_clip", help="CLIP that judges, as export_clip wrote it"
    )
    parser.add_argument("--dino", type=expanded_path, default="data/mini_dino", help="DINO whose features are compared")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder for check.json and check.webp")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    clip, tokenizer, _ = read_open_clip(args.clip)
    clip.eval()
    judge = load_judge(args.work / "judge.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(args.base)
    pipeline.set_progress_bar_config(disable=True)

    asked, colored = prompts(200), colored_prompts()
    named = [(f"a photo of a {NAME} {w} {BACKGROUNDS[b][0]}", w) for _, w, b in asked]
    images, tinted, with_name = (generate(pipeline, [one[0] for one in some]) for some in (asked, colored, named))
    pixels, tinted_pixels, named_pixels = map(to_pixels, (images, tinted, with_name))

    def judged(choose: Choose) -> dict[str, float]:
        plain, in_color, by_name = (choose(some) for some in (pixels, tinted_pixels, named_pixels))
        words, places, pairs = [w for _, w, _ in asked], [b for _, _, b in asked], [(c, w) for _, w, c in colored]
        return {
            "class": share(words, plain["class_word"]),
            "background": share(places, plain["background"]),
            "color": share([c for c, _ in pairs], [c for c, _ in in_color["pair"]]),
            "color_and_class": share(pairs, in_color["pair"]),
            "class_with_unused_name": share([w for _, w in named], by_name["class_word"]),
        }

    def by_clip(some: Tensor) -> dict[str, list[Any]]:
        return zero_shot(clip, tokenizer, some) | {"pair": chosen_pairs(clip, tokenizer, some)}

    def by_judge(some: Tensor) -> dict[str, list[Any]]:
        answers = judge.answers(some)
        return answers | {"pair": list(zip(answers["color"], answers["class_word"], strict=True))}

    facts = scene_facts(args.work)[:2048]
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")[:2048]
    on_scenes = {"clip": by_clip(to_pixels(scenes)), "judge": by_judge(to_pixels(scenes))}

    world, rng = World(args.work), np.random.default_rng(8)
    same = [world.draw(rng, world.classes[w][rng.integers(len(world.classes[w]))], b) for _, w, b in asked]
    vae = AutoencoderKL.from_pretrained(args.base / "vae", torch_dtype=torch.float32)

    dino = load_dino(str(args.dino))
    features = dino.embed_images(map(Image.fromarray, scenes[: 2 * COMPARED]))
    drawn = dino.embed_images(map(Image.fromarray, generate(pipeline, [f["caption"] for f in facts[:COMPARED]])))

    report = {
        "prompts": {"plain": len(asked), "colored": len(colored), "with_unused_name": len(named)},
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "by_clip": judged(by_clip),
        "by_judge": judged(by_judge),
        "on_scenes": {name: right_on_scenes(facts, given) for name, given in on_scenes.items()},
        "sharpness": sharpness(pixels, reconstructed(vae, to_pixels(np.stack(same)))),
        "frechet_distance": {
            "pictures": COMPARED,
            "drawn_to_scenes": frechet_distance(drawn, features[COMPARED:]),
            "scenes_to_scenes": frechet_distance(features[:COMPARED], features[COMPARED:]),
        },
    }
    print(json.dumps(report, indent=2))
    (args.out / "check.json").write_text(json.dumps(report, indent=2) + "\n")
    labels = [f"{w}, {b}" for _, w, b in asked[:80]] + [f"{c} {w}" for _, w, c in colored[::2]]
    sheet(np.concatenate([images[:80], tinted[::2]]), labels).save(args.out / "check.webp", quality=90)


if __name__ == "__main__":
    main()
