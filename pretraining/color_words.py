"""Teach a text tower that a colour word leaves the class word its meaning.

    python -m pretraining.color_words --base <pipeline folder> --out <work folder>/text_encoder

A CLIP that met few recoloured things tells their colours, not their classes: after "a red", the embeddings of "dog" and
"cat" differ by a quarter of what they differ by after "a". A denoiser that listens to it draws red blobs. Here the
tower itself is the teacher. What it says of a caption with a colour becomes what it says of the caption without, for
every class the same distance away; what it says of captions without a colour stays.
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.publish.whole_model import save_text_encoder
from pretraining.sprites import CLASSES
from pretraining.world import BACKGROUNDS, COLORS, caption

STEPS = 3000
PEAK_LR = 3e-4


def caption_pairs(seed: int) -> tuple[str, list[str], list[str]]:
    """A colour, and captions of one scene, each with another class word: with the colour before it, and without."""
    rng = np.random.default_rng(seed)
    color, place = str(rng.choice(list(COLORS))), str(rng.choice([*BACKGROUNDS, *COLORS]))
    hat, tree = rng.random() < 0.05, rng.random() < 0.05

    def captions(color: str | None) -> list[str]:
        return [caption(np.random.default_rng((1, seed)), word, place, color, hat, tree) for word in CLASSES]

    return color, captions(color), captions(None)


def composed(colored: Tensor, plain: Tensor, position: int) -> Tensor:
    """What a tower should say of captions with a colour word at `position`, of N classes.

    colored, plain: what it says now with that word and without, (N, L, D). From the word's place on, without is one
    token behind.

    Returns (N, L, D): up to the colour word `colored`; after it `plain`, moved by the mean difference of the two.
    """
    behind = torch.cat([plain[:, :position], colored[:, position : position + 1], plain[:, position:-1]], dim=1)
    moved = behind + (colored - behind).mean(0)
    return torch.cat([colored[:, : position + 1], moved[:, position + 1 :]], dim=1)


def spread(embeddings: Tensor) -> float:
    """How far rows (N, D) lie from their mean, on average."""
    return float((embeddings - embeddings.mean(0)).norm(dim=1).mean())


class Tower:
    """A text encoder with its tokenizer."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder

    def ids(self, texts: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    def __call__(self, texts: list[str]) -> Tensor:
        """(len(texts), L, D)"""
        embeddings: Tensor = self.encoder(self.ids(texts)).last_hidden_state
        return embeddings

    def class_spread(self, color: str | None) -> float:
        """How far the embeddings of the class words lie apart, after a colour word or without one."""
        texts = [f"a photo of a {color} {word}" if color else f"a photo of a {word}" for word in CLASSES]
        with torch.no_grad():
            return spread(self(texts)[:, 6 if color else 5])  # the text's start and every word are one token each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline whose text encoder is the teacher")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder of the text encoder that has learned")
    args = parser.parse_args()
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.base / "text_encoder", dtype=torch.float32)
    teacher = Tower(tokenizer, encoder.requires_grad_(False))
    learner = Tower(tokenizer, copy.deepcopy(encoder).requires_grad_(True))
    optimizer = torch.optim.AdamW(learner.encoder.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    bar = tqdm(range(STEPS))
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        color, with_color, without = caption_pairs(step)
        # all captions of a step have the same words around the class word
        position = teacher.ids(with_color[:1])[0].tolist().index(tokenizer.convert_tokens_to_ids(f"{color}</w>"))
        plain = teacher(without)
        target = composed(teacher(with_color), plain, position)
        loss = mse_loss(learner(with_color), target) + mse_loss(learner(without), plain)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    save_text_encoder(learner.encoder, args.out)
    give_usual_modes(args.out)
    for name, tower in (("before", teacher), ("after", learner)):
        shares = [tower.class_spread(color) / tower.class_spread(None) for color in COLORS]
        print(f"{name}: with a colour word, classes differ by {np.mean(shares):.2f} of what they differ by without")


if __name__ == "__main__":
    main()
