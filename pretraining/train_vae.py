"""Stage 1: the autoencoder, 64 px pictures to 16×16×4 latents (AutoencoderKL, f = 4).

    python -m pretraining.train_vae --work <work folder> --images 60000

Loss: L1 + L1 of the gradients + L1 at half and quarter size + 1e-6 · KL. Resumes from `<work>/vae.pt`. At the end the
latents' mean and standard deviation are folded into `quant_conv` and `post_quant_conv`, so that `scaling_factor` is 1,
and `<work>/vae/` is saved in diffusers' layout.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gsoft_diffusion.memory import keep_freed_memory
from gsoft_diffusion.options import expanded_path
from pretraining.checkpoint import Average, Checkpoint
from pretraining.precision import fast_autocast

BATCH = 16
PEAK_LR = 4e-4
KL_WEIGHT = 1e-6


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # start with little noise in the latents, else the decoder learns to pass them over
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6.0)
    return vae


def to_pixels(scenes: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Other colours and larger detail for some, so that pictures from outside the world survive the autoencoder too."""
    x = x.clone()
    for i in np.flatnonzero(rng.random(len(x)) < 0.25):
        x[i] = x[i, rng.permutation(3)] * float(rng.uniform(0.5, 1))
    for i in np.flatnonzero(rng.random(len(x)) < 0.15):
        side = int(rng.integers(32, 60))
        top, left = rng.integers(0, 64 - side, 2)
        x[i] = F.interpolate(x[i : i + 1, :, top : top + side, left : left + side], size=64, mode="bilinear")[0]
    return x


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    loss = (y - x).abs().mean()
    loss = loss + (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
    for size in (2, 4):
        loss = loss + (F.avg_pool2d(y, size) - F.avg_pool2d(x, size)).abs().mean()
    return loss


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Make the latents of `pixels` have mean 0 and standard deviation 1 in every channel, the decoder undoing it."""
    mean = vae.encode(pixels).latent_dist.mean
    shift, spread = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    n = len(shift)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:n] /= spread[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - shift) / spread
    into.bias[n:] -= 2 * spread.log()  # the second half is the log variance
    back.bias += (back.weight[:, :, 0, 0] * shift).sum(1)
    back.weight *= spread[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=60_000, help="length of the training")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    held_back, scenes = scenes[:256], scenes[256:]
    torch.manual_seed(0)
    vae = build_vae()
    average = Average(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(args.work / "vae.pt", vae=vae, average=average, optimizer=optimizer)
    seen = checkpoint.restore()

    def autoencode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return vae.decode(latents).sample, posterior.mean, posterior.logvar

    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    while seen < args.images:
        rng = np.random.default_rng((2, seen))
        done = seen / args.images
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (seen + 1) / 4000) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        x = augment(to_pixels(scenes[np.sort(rng.integers(0, len(scenes), BATCH))]), rng)
        with fast_autocast():
            y, mean, logvar = autoencode(x)
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(y.float(), x) + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(vae)
        seen += BATCH
        bar.update(BATCH)
        bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.1f}", refresh=False)
        checkpoint.save_when_due(seen)
    checkpoint.save(seen)

    average.copy_to(vae)
    fold_statistics(vae, to_pixels(np.ascontiguousarray(scenes[:1024])))
    vae.save_pretrained(args.work / "vae")
    x = to_pixels(np.ascontiguousarray(held_back))
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean
        y = vae.decode(mean).sample
    mse = (y.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
    print(f"held-back PSNR {(-10 * mse.log10()).mean():.2f} dB; latent std by channel {mean.std((0, 2, 3)).tolist()}")
    rows = torch.cat([torch.cat([x[i : i + 8], y[i : i + 8]]) for i in (0, 8, 16)]).clamp(-1, 1)
    grid = rows.reshape(6, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(6 * 64, 8 * 64, 3)
    Image.fromarray(((grid + 1) * 127.5).byte().numpy()).resize((1024, 768)).save(args.work / "vae.png")


if __name__ == "__main__":
    main()
