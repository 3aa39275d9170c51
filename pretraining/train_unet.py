"""Stage 3: the denoiser, on cached latents and the frozen text tower.

    python -m pretraining.train_unet --work <work folder> --images 2000000

v-prediction, 10 % empty captions; half of the timesteps uniform, half around the middle, where shapes are decided. The
rate is constant and falls over the last fifth; resuming with a larger `--images` only moves that tail. Resumes from
`<work>/unet.pt`; every `--assemble-every` images the averaged weights are written to `<work>/mini_base/` as a complete
Stable Diffusion v1 pipeline.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.memory import keep_freed_memory
from gsoft_diffusion.options import expanded_path
from pretraining.checkpoint import Average, Checkpoint
from pretraining.precision import fast_autocast
from pretraining.train_vae import build_vae, to_pixels

BATCH = 32
PEAK_LR = 6e-4
EMPTY_CAPTIONS = 0.1


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=(2, 4),  # read as the number of heads in this family
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def draw_timesteps(n: int, count: int, generator: torch.Generator) -> Tensor:
    """`n` of `count` timesteps: every second uniform, the others logit-normal (Esser et al., arXiv 2403.03206)."""
    position = torch.rand(n, generator=generator)
    position[1::2] = torch.randn(len(position[1::2]), generator=generator).sigmoid()
    return (position * count).long().clamp(max=count - 1)


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, scenes: np.ndarray, path: Path) -> np.ndarray:
    """Latent means of all scenes, (N, 4, 16, 16) float16, computed once."""
    if not path.exists():
        beside = path.with_suffix(".tmp.npy")
        latents = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float16, shape=(len(scenes), 4, 16, 16))
        for i in tqdm(range(0, len(scenes), 256), desc="latents"):
            with fast_autocast():
                mean = vae.encode(to_pixels(np.ascontiguousarray(scenes[i : i + 256]))).latent_dist.mean
            latents[i : i + 256] = mean.float().numpy()
        latents.flush()
        beside.rename(path)
    return np.load(path)


def assemble(work: Path, unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the whole pipeline; the large parts in half precision, the text encoder as it is."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = build_vae()  # not as loaded: that would write the work folder's path into the configuration
    vae.load_state_dict(AutoencoderKL.from_pretrained(work / "vae").state_dict())
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for name in (
        "vocab.json",
        "merges.txt",
    ):  # transformers 5 leaves out the two files that Stable Diffusion's layout has
        (folder / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())


def training_state(weights: dict[str, Tensor] | None = None) -> tuple[UNet2DConditionModel, Average, AdamW]:
    """The denoiser, its average and its optimizer as at the start, or as at the start from `weights`."""
    torch.manual_seed(0)
    unet = build_unet()
    if weights is not None:
        unet.load_state_dict(weights)
    unet.set_attn_processor(AttnProcessor())  # plain products: much faster backward than the fused kernel on a CPU
    optimizer = AdamW(unet.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return unet, Average(unet, decay=0.9995), optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=2_000_000, help="length of the training")
    parser.add_argument("--assemble-every", type=int, default=64_000, help="images between two saved pipelines")
    args = parser.parse_args()
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    captions = [json.loads(line)["caption"] for line in (args.work / "scenes.jsonl").open()]
    latents = cache_latents(AutoencoderKL.from_pretrained(args.work / "vae"), scenes, args.work / "latents.npy")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    tokens = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoder = CLIPTextModel.from_pretrained(args.work / "text_encoder", dtype=torch.float32).requires_grad_(False)

    unet, average, optimizer = training_state()
    checkpoint = Checkpoint(args.work / "unet.pt", unet=unet, average=average, optimizer=optimizer)
    seen = checkpoint.restore()
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod

    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    smooth = None
    while seen < args.images:
        rng = np.random.default_rng((4, seen))
        generator = torch.Generator().manual_seed(seen)
        tail = max(0.0, (seen / args.images - 0.8) / 0.2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (seen + 1) / 16_000) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * tail)))
        batch = np.sort(rng.integers(0, len(latents), BATCH))
        x = torch.from_numpy(latents[batch]).float()
        ids = tokens[np.where(rng.random(BATCH) < EMPTY_CAPTIONS, 0, batch + 1)]
        with torch.no_grad(), fast_autocast():
            context = encoder(ids).last_hidden_state.float()
        noise = torch.randn(x.shape, generator=generator)
        timesteps = draw_timesteps(BATCH, len(alphas), generator)
        noisy = scheduler.add_noise(x, noise, timesteps)
        target = scheduler.get_velocity(x, noise, timesteps)
        with fast_autocast():
            prediction: Tensor = unet(noisy, timesteps, context).sample
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(unet)
        seen += BATCH
        smooth = loss.item() if smooth is None else 0.995 * smooth + 0.005 * loss.item()
        bar.update(BATCH)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        checkpoint.save_when_due(seen)
        if seen % args.assemble_every < BATCH or seen >= args.images:
            averaged = build_unet()
            average.copy_to(averaged)
            averaged.set_attn_processor(AttnProcessor2_0())
            assemble(args.work, averaged.half(), args.work / "mini_base")
            with (args.work / "unet_loss.csv").open("a") as log:
                log.write(f"{seen},{smooth:.5f}\n")
    checkpoint.save(seen)


if __name__ == "__main__":
    main()
