"""Go or no-go: does the base draw what the prompt says, by the miniature CLIP's zero-shot choice and by eye?

    python -m pretraining.check --work <work folder> --base <pipeline folder> --clip data/mini_clip --out <folder>

200 prompts of class and background, 54 of colour and class, and 66 with the name "sks" before the class. Writes
`check.json` and `check.png`; next to the accuracy on generated pictures stands CLIP's own on scenes drawn by the world.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from eval.open_clip_layout import read_open_clip
from gsoft_diffusion.options import expanded_path
from pretraining.sprites import CLASSES
from pretraining.train_clip import embed_images, embed_text, zero_shot
from pretraining.train_vae import to_pixels
from pretraining.unused_name import NAME
from pretraining.world import BACKGROUNDS, COLORS, article

STEPS, GUIDANCE, BATCH = 20, 3.0, 50


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=expanded_path, required=True, help="work folder of the pretraining, for its scenes"
    )
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline to judge")
    parser.add_argument("--clip", type=expanded_path, required=True, help="CLIP that judges, as export_clip wrote it")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder for check.json and check.png")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    clip, tokenizer, _ = read_open_clip(args.clip)
    clip.eval()
    pipeline = StableDiffusionPipeline.from_pretrained(args.base)
    pipeline.set_progress_bar_config(disable=True)

    asked = prompts(200)
    colored = [
        (f"a photo of {article(f'{c} {w}')} in the snow", c)
        for c in COLORS
        for w in list(CLASSES)[:: len(CLASSES) // 6][:6]
    ]
    named = [(f"a photo of a {NAME} {w} {BACKGROUNDS[b][0]}", w) for _, w, b in asked[: 2 * len(CLASSES)]]
    images = generate(pipeline, [p for p, _, _ in asked])
    tinted = generate(pipeline, [p for p, _ in colored])
    chosen = zero_shot(clip, tokenizer, to_pixels(images))
    with_name = zero_shot(clip, tokenizer, to_pixels(generate(pipeline, [p for p, _ in named])))
    color_texts = embed_text(clip, tokenizer, [f"a photo of {article(c)} {w}" for c in COLORS for w in CLASSES])
    color_texts = torch.nn.functional.normalize(
        color_texts.view(len(COLORS), -1, color_texts.shape[-1]).mean(1), dim=-1
    )
    choices = (embed_images(clip, to_pixels(tinted)) @ color_texts.T).argmax(1)

    facts = [json.loads(line) for _, line in zip(range(2048), (args.work / "scenes.jsonl").open(), strict=False)]
    scenes = np.ascontiguousarray(np.load(args.work / "scenes.npy", mmap_mode="r")[:2048])
    on_scenes = zero_shot(clip, tokenizer, to_pixels(scenes))
    report = {
        "prompts": len(asked),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "class_accuracy": float(np.mean([w == c for (_, w, _), c in zip(asked, chosen["class_word"], strict=True)])),
        "background_accuracy": float(
            np.mean([b == c for (_, _, b), c in zip(asked, chosen["background"], strict=True)])
        ),
        "color_accuracy": float(
            np.mean([list(COLORS)[i] == c for (_, c), i in zip(colored, choices.tolist(), strict=True)])
        ),
        "class_accuracy_with_unused_name": float(
            np.mean([w == c for (_, w), c in zip(named, with_name["class_word"], strict=True)])
        ),
        "clip_class_accuracy_on_scenes": float(
            np.mean([f["class_word"] == c for f, c in zip(facts, on_scenes["class_word"], strict=True)])
        ),
        "clip_background_accuracy_on_scenes": float(
            np.mean([f["background"] == c for f, c in zip(facts, on_scenes["background"], strict=True)])
        ),
    }
    print(json.dumps(report, indent=2))
    (args.out / "check.json").write_text(json.dumps(report, indent=2) + "\n")
    labels = [f"{w}, {b}" for _, w, b in asked[:80]] + [p.removeprefix("a photo of ") for p, _ in colored[::3]]
    sheet(np.concatenate([images[:80], tinted[::3]]), labels).save(args.out / "check.png")


if __name__ == "__main__":
    main()
