"""Write the miniature CLIP in open_clip's layout, in half precision, with its tokenizer: `data/mini_clip`.

python -m pretraining.export_clip --work <work folder> --out data/mini_clip

import open_clip
clip = open_clip.create_model("local-dir:data/mini_clip")
"""

from __future__ import annotations

import argparse
import shutil

import torch
from transformers import CLIPModel

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.scoring.open_clip_layout import save_open_clip

COLOR = [0.5, 0.5, 0.5]  # pictures in [-1, 1], as train_clip.py has them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write to")
    args = parser.parse_args()
    clip = CLIPModel.from_pretrained(args.work / "clip", dtype=torch.float32)
    save_open_clip(args.out, clip, mean=COLOR, std=COLOR)
    for name in TOKENIZER_FILES:
        shutil.copy(args.work / "tokenizer" / name, args.out / name)
    print(f"{args.out}: {sum(path.stat().st_size for path in args.out.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
