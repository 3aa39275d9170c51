"""Lay out a work folder from a published base, to train it on where the old work folder is gone.

    python -m pretraining.reopen --base data/mini_base --images 116064 --work <work folder>

Copies tokenizer, autoencoder and text encoder and starts `unet.pt` from the denoiser's averaged weights with an empty
optimizer. The scenes are drawn anew by `pretraining.render`, which draws the same ones every time.
"""

from __future__ import annotations

import argparse
import shutil

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from pretraining.checkpoint import Checkpoint
from pretraining.train_unet import training_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=expanded_path, required=True, help="pipeline folder to go on from")
    parser.add_argument("--images", type=int, required=True, help="how many images its denoiser has seen")
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder to lay out")
    args = parser.parse_args()
    if (args.work / "unet.pt").exists():
        parser.error(f"--work: {args.work}/unet.pt is there already; choose another folder or go on from it")
    args.work.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "text_encoder"):
        shutil.copytree(args.base / name, args.work / name)
    vae = AutoencoderKL.from_pretrained(args.base / "vae", torch_dtype=torch.float32)
    vae.save_pretrained(args.work / "vae")
    give_usual_modes(args.work / "vae")
    weights = UNet2DConditionModel.from_pretrained(args.base / "unet", torch_dtype=torch.float32).state_dict()
    unet, averages, optimizer = training_state(vae.config.latent_channels, weights)
    Checkpoint(args.work / "unet.pt", unet=unet, optimizer=optimizer, averages=averages).save(args.images)


if __name__ == "__main__":
    main()
