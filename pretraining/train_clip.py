"""Stage 2: a miniature CLIP on the world; its text tower becomes the base's frozen text encoder.

    python -m pretraining.train_clip --work <work folder> --images 100000
    python -m pretraining.train_clip --work <other folder> --images 100000 --start-from data/mini_clip --rate 5e-4

Contrastive loss in which equal captions are equal positives. Half of a batch are groups of scenes that share place and
colour: only what they show tells them apart, or else place and colour would do. The second call goes on
from a finished CLIP, on other scenes. Resumes from `<work>/clip.pt`, saves `<work>/clip/` in transformers' layout and
`<work>/text_encoder/` for the denoiser, and prints zero-shot accuracy on scenes that it has not seen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.foundation.memory import keep_freed_memory
from gsoft_diffusion.publish.whole_model import save_text_encoder
from gsoft_diffusion.scoring.open_clip_layout import read_open_clip
from pretraining.checkpoint import Checkpoint
from pretraining.precision import fast_autocast
from pretraining.render import scene_facts
from pretraining.sprites import CLASSES
from pretraining.tokenizer import MAX_LENGTH
from pretraining.train_vae import to_pixels
from pretraining.world import BACKGROUNDS, COLORS, article

BATCH = 192
PEAK_LR = 1e-3
HELD_BACK = 2048  # scenes kept for the accuracy
GROUP = 8  # scenes of one place and colour


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and brightness, so that what a small autoencoder draws looks like what the encoder was trained on."""
    n = len(pixels)
    soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    mix = (torch.rand(n, 1, 1, 1, generator=generator) * 1.3 - 0.3).clamp(0, 1)
    pixels = pixels + (soft - pixels) * mix
    noise = torch.randn(pixels.shape, generator=generator) * 0.08 * torch.rand(n, 1, 1, 1, generator=generator)
    return pixels * (0.85 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)) + noise


def groups_of_scenes(facts: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """The numbers of the scenes, but for those held back, that share place and colour."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for number, fact in enumerate(facts):
        if number >= HELD_BACK:
            groups.setdefault((fact["background"], fact["color"]), []).append(number)
    return [np.array(numbers) for numbers in groups.values()]


def batch_of_scenes(rng: np.random.Generator, groups: Sequence[np.ndarray], scenes: int) -> np.ndarray:
    """`BATCH` numbers of scenes in ascending order: half of them at random, half in groups of `GROUP`.

    groups: as `groups_of_scenes` gives them. scenes: how many there are.
    """
    chosen = rng.integers(len(groups), size=BATCH // 2 // GROUP)
    alike = [rng.choice(groups[number], GROUP) for number in chosen]
    return np.sort(np.concatenate([rng.integers(HELD_BACK, scenes, BATCH // 2), *alike]))


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy both ways; `same` (B, B) marks pairs with equal captions, which share the target evenly."""
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pooled(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]


@torch.no_grad()
def embed_text(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Unit text embeddings, (len(texts), 128)."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return F.normalize(pooled(clip.get_text_features(input_ids=ids)).float(), dim=-1)


@torch.no_grad()
def embed_images(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit image embeddings, (B, 128), of pictures (B, 3, 64, 64) in [-1, 1]."""
    return torch.cat(
        [F.normalize(pooled(clip.get_image_features(pixel_values=p)).float(), dim=-1) for p in pixels.split(256)]
    )


def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor) -> dict[str, list[str]]:
    """The class word and the background that CLIP chooses for every picture."""
    images = embed_images(clip, pixels)
    choices = {
        "class_word": {
            word: [f"a photo of {article(word)} {phrases[0]}" for phrases in BACKGROUNDS.values()] for word in CLASSES
        },
        "background": {
            **{
                name: [f"a photo of {article(word)} {phrase}" for word in CLASSES for phrase in phrases]
                for name, phrases in BACKGROUNDS.items()
            },
            **{
                color: [f"a photo of {article(word)} on {article(color)} background" for word in CLASSES]
                for color in COLORS
            },
        },
    }
    chosen = {}
    for what, options in choices.items():
        texts = torch.stack([F.normalize(embed_text(clip, tokenizer, t).mean(0), dim=0) for t in options.values()])
        chosen[what] = [list(options)[i] for i in (images @ texts.T).argmax(1)]
    return chosen


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The text half of `clip` as Stable Diffusion's text encoder."""
    assert isinstance(clip.config.text_config, CLIPTextConfig)
    tower = CLIPTextModel(clip.config.text_config)
    _copy_exactly(tower, clip.text_model.state_dict())
    return tower.eval().requires_grad_(False)


def _copy_exactly(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    # the tower alone has its weights below "text_model." in some versions of transformers, the whole model never
    prefix = "text_model." if any(k.startswith("text_model.") for k in module.state_dict()) else ""
    module.load_state_dict({prefix + k.removeprefix("text_model."): v for k, v in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=100_000, help="length of the training")
    parser.add_argument(
        "--start-from", type=expanded_path, help="folder of export_clip to go on from where there is no clip.pt"
    )
    parser.add_argument("--rate", type=float, default=PEAK_LR, help="learning rate at its highest")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    facts = scene_facts(args.work)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    distinct = {caption: i for i, caption in enumerate(dict.fromkeys(f["caption"] for f in facts))}
    tokens = tokenizer(list(distinct), padding="max_length", truncation=True, return_tensors="pt").input_ids
    number = torch.tensor([distinct[f["caption"]] for f in facts])
    groups = groups_of_scenes(facts)

    torch.manual_seed(0)
    clip = build_clip(tokenizer)
    if args.start_from:
        clip.load_state_dict(read_open_clip(args.start_from)[0].state_dict())
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = Checkpoint(args.work / "clip.pt", clip=clip, optimizer=optimizer)
    seen = checkpoint.restore()
    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    while seen < args.images:
        rng = np.random.default_rng((3, seen))
        done = seen / args.images
        lr = args.rate * min(1, (seen + 1) / 40_000) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch_of_scenes(rng, groups, len(scenes))
        generator = torch.Generator().manual_seed(seen)
        pixels = augment(to_pixels(scenes[batch]), generator)
        which = number[batch]
        with fast_autocast():
            image = pooled(clip.get_image_features(pixel_values=pixels))
            text = pooled(clip.get_text_features(input_ids=tokens[which]))
        same = (which[:, None] == which[None]).float()
        loss = contrastive_loss(image.float(), text.float(), clip.logit_scale, same)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += BATCH
        bar.update(BATCH)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        checkpoint.save_when_due(seen)
    checkpoint.save(seen)

    clip.eval().save_pretrained(args.work / "clip")
    tokenizer.save_pretrained(args.work / "clip")
    give_usual_modes(args.work / "clip")
    save_text_encoder(text_tower(clip), args.work / "text_encoder")
    give_usual_modes(args.work / "text_encoder")
    chosen = zero_shot(clip, tokenizer, to_pixels(scenes[:HELD_BACK]))
    for what, answers in chosen.items():
        right = np.mean([f[what] == answer for f, answer in zip(facts, answers, strict=False)])
        print(f"zero-shot {what} on {HELD_BACK} unseen scenes: {right:.3f}")


if __name__ == "__main__":
    main()
