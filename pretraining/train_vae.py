"""Stage 1: the autoencoder, 64 px pictures to 16×16×8 latents (AutoencoderKL, f = 4).

    python -m pretraining.train_vae --work <work folder> --images 400000

Loss: L1 + L1 of the gradients + L1 at half and quarter size + 1e-6 · KL. The rate is constant and falls over the last
third; resuming with a larger `--images` only moves that tail. Resumes from `<work>/vae.pt`. Every `LOG_EVERY` images
`<work>/vae_psnr.csv` gets a line, and `<work>/vae_kept.safetensors` the averaged weights for `--start-from`. At
the end the latents' mean and standard deviation are folded into `quant_conv` and `post_quant_conv`, so that
`scaling_factor` is 1, and `<work>/vae/` is saved in diffusers' layout.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.foundation.memory import keep_freed_memory
from pretraining.checkpoint import Average, Checkpoint
from pretraining.kept_weights import keep, start_from
from pretraining.precision import fast_autocast

BATCH = 16
PEAK_LR = 4e-4
KL_WEIGHT = 1e-6
LATENT_CHANNELS = 8
HELD_BACK = 256  # scenes at the start of the set that no training uses
LOG_EVERY = 16_000  # images


def build_vae(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # start with little noise in the latents, else the decoder learns to pass them over
        vae.quant_conv.weight[latent_channels:].zero_()
        vae.quant_conv.bias[latent_channels:].fill_(-6.0)
    return vae


def to_pixels(scenes: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8, of a file's memory too, to (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def learning_rate(seen: int, images: int, peak: float, warmup: int, tail: float) -> float:
    """`peak` after a linear rise over `warmup` images, falling along a cosine to a fiftieth over the last `tail`."""
    fallen = max(0.0, (seen / images - 1 + tail) / tail)
    return peak * min(1, (seen + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] through the latents' means and back."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(64)])


def psnr(y: Tensor, x: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; both (B, 3, H, W) in [-1, 1]."""
    mse = (y - x).square().mean((1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())


def demo_pictures() -> Tensor:
    """The demo subjects' pictures, (50, 3, 64, 64), whose things are in no scene."""
    paths = sorted((Path(__file__).parents[1] / "data" / "subjects").glob("*/*.png"))
    return to_pixels(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=400_000, help="length of the training")
    parser.add_argument("--latent-channels", type=int, default=LATENT_CHANNELS, help="of the latents; 4 is a trial")
    parser.add_argument("--start-from", type=expanded_path, help="kept weights to go on from where there is no vae.pt")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    held_back, demo = to_pixels(scenes[:HELD_BACK]), demo_pictures()
    scenes = scenes[HELD_BACK:]
    torch.manual_seed(0)
    vae = build_vae(args.latent_channels)
    started = start_from(args.start_from, vae) if args.start_from else 0
    average = Average(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(args.work / "vae.pt", vae=vae, average=average, optimizer=optimizer)
    seen = checkpoint.restore() or started
    averaged = build_vae(args.latent_channels)

    def autoencode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return vae.decode(latents).sample, posterior.mean, posterior.logvar

    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    while seen < args.images:
        rng = np.random.default_rng((2, seen))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen, args.images, PEAK_LR, warmup=4000, tail=1 / 3)
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
        if seen % LOG_EVERY < BATCH or seen >= args.images:
            average.copy_to(averaged)
            keep(args.work / "vae_kept.safetensors", averaged, seen)
            figures = [psnr(reconstructed(averaged, x), x) for x in (held_back, demo)]
            with (args.work / "vae_psnr.csv").open("a") as log:
                log.write(f"{seen},{figures[0]:.2f},{figures[1]:.2f}\n")
    checkpoint.save(seen)

    average.copy_to(vae)
    fold_statistics(vae, to_pixels(scenes[:1024]))
    vae.save_pretrained(args.work / "vae")
    give_usual_modes(args.work / "vae")
    scenes_back, demo_back = reconstructed(vae, held_back), reconstructed(vae, demo)
    print(f"PSNR: scenes {psnr(scenes_back, held_back):.2f} dB, demo subjects {psnr(demo_back, demo):.2f} dB")
    # Eight a row, the originals above what comes back: the first picture of each demo subject, then scenes.
    x, y = torch.cat([demo[::5], held_back[:30]]), torch.cat([demo_back[::5], scenes_back[:30]])
    rows = torch.cat([torch.cat([x[i : i + 8], y[i : i + 8]]) for i in range(0, 40, 8)])
    grid = rows.reshape(10, 8, 3, 64, 64).permute(0, 3, 1, 4, 2).reshape(10 * 64, 8 * 64, 3)
    picture = Image.fromarray(((grid + 1) * 127.5).round().byte().numpy())
    picture.resize((1024, 1280), Image.Resampling.LANCZOS).save(args.work / "vae.png")


if __name__ == "__main__":
    main()
