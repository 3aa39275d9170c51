"""A second judge: a convolutional network that names class, place and colour, trained on drawn scenes alone.

    python -m pretraining.train_judge --work <work folder> --images 400000

The miniature CLIP is no independent judge of a base that listens to its text tower. This network shares neither weights
nor architecture with it, and has never met the denoiser. Resumes from `<work>/judge.pt`, saves
`<work>/judge.safetensors` and prints its accuracy on scenes that it has not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.memory import keep_freed_memory
from pretraining.checkpoint import Average, Checkpoint
from pretraining.precision import fast_autocast
from pretraining.render import scene_facts
from pretraining.sprites import CLASSES
from pretraining.train_clip import augment
from pretraining.train_vae import learning_rate, to_pixels
from pretraining.world import BACKGROUNDS, COLORS

BATCH = 128
PEAK_LR = 2e-3
HELD_BACK = 2048  # scenes at the start of the set that are kept for the accuracy
ITS_OWN = "its own"  # the colour of what was not recoloured
ANSWERS: dict[str, list[str]] = {
    "class_word": list(CLASSES),
    "background": [*BACKGROUNDS, *COLORS],
    "color": [ITS_OWN, *COLORS],
}


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [-1, 1] to logits for each of the questions of `ANSWERS`."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.GroupNorm(8, after),
                nn.ReLU(),
            )
            for before, after in pairs
        )
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], len(words)) for name, words in ANSWERS.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))  # (B, widths[-1])
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, pixels: Tensor) -> dict[str, list[str]]:
        """What it sees on each picture."""
        parts = [self(part) for part in pixels.split(256)]
        return {
            name: [words[i] for i in torch.cat([part[name] for part in parts]).argmax(1).tolist()]
            for name, words in ANSWERS.items()
        }


def load_judge(path: Path) -> Judge:
    judge = Judge()
    load_model(judge, path)
    return judge.eval()


def numbered(facts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """What is true of the scenes, as numbers of `ANSWERS`, each (N,)."""
    return {
        name: torch.tensor([words.index(fact[name] or ITS_OWN) for fact in facts]) for name, words in ANSWERS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=400_000, help="length of the training")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    facts = scene_facts(args.work)
    true = numbered(facts)

    torch.manual_seed(0)
    judge = Judge()
    average = Average(judge)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_LR, weight_decay=0.05)
    checkpoint = Checkpoint(args.work / "judge.pt", judge=judge, average=average, optimizer=optimizer)
    seen = checkpoint.restore()
    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    while seen < args.images:
        rng = np.random.default_rng((5, seen))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen, args.images, PEAK_LR, warmup=10_000, tail=0.5)
        batch = np.sort(rng.integers(HELD_BACK, len(scenes), BATCH))
        pixels = augment(to_pixels(scenes[batch]), torch.Generator().manual_seed(seen))
        with fast_autocast():
            logits = judge(pixels)
        loss = torch.stack([F.cross_entropy(logits[name].float(), true[name][batch]) for name in ANSWERS]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(judge)
        seen += BATCH
        bar.update(BATCH)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        checkpoint.save_when_due(seen)
    checkpoint.save(seen)

    average.copy_to(judge)
    save_model(judge, args.work / "judge.safetensors")
    answers = judge.eval().answers(to_pixels(scenes[:HELD_BACK]))
    for name, given in answers.items():
        right = np.mean([(fact[name] or ITS_OWN) == answer for fact, answer in zip(facts, given, strict=False)])
        print(f"{name} on {HELD_BACK} unseen scenes: {right:.3f}")


if __name__ == "__main__":
    main()
