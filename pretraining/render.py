"""Draw the training set: `scenes.npy`, (N, 64, 64, 3) uint8, and one caption a line with what is true of the scene.

python -m pretraining.render --sprites <npm folder> --out <work folder> --scenes 100000
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.processes import end_with_parent
from pretraining.sprites import add_sprites
from pretraining.world import COLORED, SIZE, World

CHUNK = 2000  # scenes drawn by one job, with a seed of its own: the same set on any number of cores

_world: World
_colored: float


def scene_facts(work: Path) -> list[dict[str, Any]]:
    """What is true of each scene of the training set in a work folder: its `caption`, `class_word` and so on."""
    return [json.loads(line) for line in (work / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]


def _start(sprites: Path, colored: float, subjects: bool) -> None:
    global _world, _colored
    end_with_parent()
    _world, _colored = World(sprites, subjects=subjects), colored


def _chunk(seed: int) -> tuple[np.ndarray, list[dict]]:
    rng = np.random.default_rng(seed)
    scenes = [_world.sample(rng, _colored) for _ in range(CHUNK)]
    facts = [{k: v for k, v in vars(s).items() if k != "image"} for s in scenes]
    return np.stack([s.image for s in scenes]), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sprites(parser)
    parser.add_argument("--out", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--scenes", type=int, default=100_000, help=f"how many, a multiple of {CHUNK}")
    parser.add_argument(
        "--colored", type=float, default=COLORED, help="share of scenes whose thing has another colour than its own"
    )
    parser.add_argument(
        "--subjects", action="store_true", help="draw the things that are kept out, too: for `train_judge` alone"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.scenes < CHUNK or args.scenes % CHUNK:
        parser.error(f"--scenes {args.scenes}: must be a multiple of {CHUNK}")
    args.out.mkdir(parents=True, exist_ok=True)
    shape = (args.scenes, SIZE, SIZE, 3)
    # Both files appear at the end: captions of a set that is not whole must not stand beside an earlier set's pictures.
    beside, captions = args.out / "scenes.tmp.npy", args.out / "scenes.tmp.jsonl"
    images = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
    jobs = range(args.scenes // CHUNK)
    with (
        ProcessPoolExecutor(
            args.workers, initializer=_start, initargs=(args.sprites, args.colored, args.subjects)
        ) as pool,
        captions.open("w") as lines,
    ):
        for i, (chunk, facts) in enumerate(
            tqdm(pool.map(_chunk, [args.seed * 1_000_003 + j for j in jobs]), total=len(jobs))
        ):
            images[i * CHUNK : (i + 1) * CHUNK] = chunk
            lines.writelines(json.dumps(f) + "\n" for f in facts)
    images.flush()
    beside.rename(args.out / "scenes.npy")
    captions.rename(args.out / "scenes.jsonl")


if __name__ == "__main__":
    main()
