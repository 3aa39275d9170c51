"""A miniature DINO on the world: a vision transformer that learns without captions, for scoring pictures.

    python -m pretraining.train_dino --work <work folder> --images 55000 --out data/mini_dino

Self-distillation (Caron et al., arXiv 2104.14294): the student, shown small crops, must say what the teacher, a running
average of it, says of large ones. The two large crops show one thing in two places, a background augmentation (Ryali et
al., arXiv 2103.12719): crops of one picture have the place in common, which is easier to learn and not what is asked. A
batch's embeddings are pushed apart (KoLeo, Sablayrolles et al., arXiv 1806.03198, as in DINOv2): in so short a training
they would stay close together.
Resumes from `<work>/dino.pt`; saves the teacher in transformers' layout, in half precision. Colours are changed little:
what tells two subjects of a class apart is often their colour.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTModel

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.foundation.memory import keep_freed_memory
from pretraining.checkpoint import Checkpoint
from pretraining.precision import fast_autocast
from pretraining.render import scene_facts
from pretraining.train_vae import to_pixels

BATCH = 32
PEAK_LR = 1e-3
WEIGHT_DECAY = 0.05
SIZE, SMALL_SIZE = 64, 32  # pixels of large and small crops
SMALL_CROPS = 4
PROTOTYPES = 1024
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
CENTER_MOMENTUM = 0.9
TEACHER_MOMENTUM = 0.98  # at first; the teacher stands still at the end
CROWDING_WEIGHT = 0.1
COLOR = [0.5, 0.5, 0.5]  # mean and standard deviation: pictures in [-1, 1]


def build_vit() -> ViTModel:
    config = ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False)


class Distilled(nn.Module):
    """Backbone and head; the teacher is another of these."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build_vit()
        width = self.vit.config.hidden_size
        self.head = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 128))
        self.prototypes = nn.Linear(128, PROTOTYPES, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) of pictures (B, 3, side, side) in [-1, 1], and their cosines with the prototypes."""
        whole = pixels.shape[-1] == SIZE
        token = self.vit(pixels, interpolate_pos_encoding=not whole).last_hidden_state[:, 0]
        directions = F.normalize(self.prototypes.weight, dim=-1)
        return token, F.linear(F.normalize(self.head(token), dim=-1), directions)


def crops(pixels: Tensor, size: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One crop of each picture, between `low` and `high` of its area, maybe mirrored, its colours a little changed."""
    n = len(pixels)

    def uniform(a: float, b: float) -> Tensor:
        return a + (b - a) * torch.rand(n, generator=generator)

    side = uniform(low, high).sqrt()
    stretch = uniform(-0.15, 0.15).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    x, y = (1 - width) * uniform(-1, 1), (1 - height) * uniform(-1, 1)
    mirror = uniform(0, 1).sub(0.5).sign()
    zero = torch.zeros(n)
    maps = torch.stack([width * mirror, zero, x, zero, height, y], dim=1).view(n, 2, 3)
    out = F.grid_sample(pixels, F.affine_grid(maps, [n, 3, size, size], align_corners=False), align_corners=False)
    out = out * uniform(0.75, 1.25)[:, None, None, None] + uniform(-0.15, 0.15)[:, None, None, None]
    gray = out.mean(dim=1, keepdim=True)
    out = gray + (out - gray) * uniform(0.7, 1.3)[:, None, None, None]
    soft = F.avg_pool2d(out, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where((uniform(0, 1) < 0.3)[:, None, None, None], soft, out)


def distillation_loss(student: list[Tensor], teacher: list[Tensor], center: Tensor) -> Tensor:
    """Mean cross-entropy of the student's view of each crop with the teacher's of each other large crop."""
    losses = []
    for number, said in enumerate(teacher):
        target = ((said - center) / TEACHER_TEMPERATURE).softmax(dim=-1)
        for other, answer in enumerate(student):
            if other != number:
                losses.append(-(target * (answer / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1).mean())
    return torch.stack(losses).mean()


def crowding(embeddings: Tensor) -> Tensor:
    """KoLeo: −mean log distance of each embedding (B, D), at length 1, to the nearest other; lower when they spread."""
    directions = F.normalize(embeddings, dim=-1)
    nearest = (directions @ directions.T).detach().fill_diagonal_(-2).argmax(dim=1)
    return -(F.pairwise_distance(directions, directions[nearest])).log().mean()


class Center(nn.Module):
    """Running mean of what the teacher says; taking it away keeps one prototype from winning everything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(PROTOTYPES))

    @torch.no_grad()
    def update(self, teacher: list[Tensor]) -> None:
        assert isinstance(self.value, Tensor)
        self.value.lerp_(torch.cat(teacher).mean(dim=0), 1 - CENTER_MOMENTUM)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def save(vit: ViTModel, folder: Path) -> None:
    """Weights in half precision, and how pictures are to be prepared."""
    copy.deepcopy(vit).half().save_pretrained(folder)
    give_usual_modes(folder)
    size = {"height": SIZE, "width": SIZE}
    preprocessing = {"size": size, "do_center_crop": False, "image_mean": COLOR, "image_std": COLOR}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=55_000, help="length of the training")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write the model to")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    facts = scene_facts(args.work)
    things = [f"{fact['sprite']} {fact['color']}" for fact in facts]
    train(scenes, things, args.images, args.work / "dino.pt", args.out)


class Pairs:
    """Draws scenes (N, 64, 64, 3) uint8 together with others of the same thing; never the first ones, for the checks.

    things: what each scene shows; scenes of the same thing differ in place, size and pose.
    """

    def __init__(self, scenes: np.ndarray, things: Sequence[str]) -> None:
        self.scenes = scenes
        self.first = min(2048, len(scenes) // 2)
        number = np.unique(things, return_inverse=True)[1][self.first :]
        self._sorted = np.argsort(number, kind="stable") + self.first
        ends = np.searchsorted(np.sort(number), number, side="right")
        starts = np.searchsorted(np.sort(number), number, side="left")
        self._group = np.stack([starts, ends], axis=1)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Two pictures of each of `n` things, in [-1, 1]."""
        one = np.sort(rng.integers(self.first, len(self.scenes), n))
        starts, ends = self._group[one - self.first].T
        other = self._sorted[rng.integers(starts, ends)]
        return to_pixels(self.scenes[one]), to_pixels(np.stack([self.scenes[number] for number in other]))


def train(scenes: np.ndarray, things: Sequence[str], images: int, state: Path, out: Path, batch: int = BATCH) -> None:
    """Train on `images` of the scenes (N, 64, 64, 3) uint8 of the things they show."""
    pairs = Pairs(scenes, things)
    torch.manual_seed(0)
    student = Distilled()
    teacher = copy.deepcopy(student).requires_grad_(False)
    center = Center()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR)
    checkpoint = Checkpoint(state, student=student, teacher=teacher, center=center, optimizer=optimizer)
    seen = checkpoint.restore()
    with tqdm(total=images, initial=seen, unit="img", mininterval=10) as bar:
        while seen < images:
            progress = seen / images
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min(1, 10 * (progress + 1e-3)) * (0.01 + 0.99 * cosine)
            rng, generator = np.random.default_rng((4, seen)), torch.Generator().manual_seed(seen)
            pair = pairs.draw(batch, rng)
            large = [crops(pixels, SIZE, 0.5, 1, generator) for pixels in pair]
            small = [crops(pixels, SMALL_SIZE, 0.2, 0.6, generator) for pixels in pair for _ in range(SMALL_CROPS // 2)]
            with fast_autocast():
                with torch.no_grad():
                    said = list(teacher(torch.cat(large))[1].float().chunk(len(large)))
                embeddings, answers = student(torch.cat(large))
                answers = list(answers.float().chunk(len(large)))
                answers += list(student(torch.cat(small))[1].float().chunk(len(small)))
            assert isinstance(center.value, Tensor)
            crowded = torch.stack([crowding(view) for view in embeddings.float().chunk(len(large))]).mean()
            loss = distillation_loss(answers, said, center.value) + CROWDING_WEIGHT * crowded
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            if progress < 0.03:  # the prototypes stay where they are until there is something to sort
                student.prototypes.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
            center.update(said)
            follow(teacher, student, 1 - (1 - TEACHER_MOMENTUM) * cosine)
            seen += batch
            bar.update(batch)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            checkpoint.save_when_due(seen)
    checkpoint.save(seen)
    save(teacher.vit, out)


if __name__ == "__main__":
    main()
