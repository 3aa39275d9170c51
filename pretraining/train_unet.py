"""Stage 3: the denoiser, on cached latents and the frozen text tower.

    python -m pretraining.train_unet --work <work folder> --images 2000000
    python -m pretraining.train_unet --work <work folder> --images 6000000 --batch 256 --compile   # on a GPU

v-prediction, 10 % empty captions; half of the timesteps uniform, half around the middle, where shapes are decided. The
rate is constant and falls over the last fifth; resuming with a larger `--images` only moves that tail. Resumes from
`<work>/unet.pt`. `--out` keeps a short run with another `--rate`, `--batch` or `--widths` apart.

The weights are averaged over a shorter and a longer time. Every `--assemble-every` images `<work>/unet_loss.csv` gets a
line with the loss of both averages on scenes that are held back, and the better one is written to `<work>/mini_base/`
as a complete Stable Diffusion v1 pipeline; `<work>/unet_kept.safetensors` is what `--start-from` takes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.foundation.memory import keep_freed_memory
from gsoft_diffusion.publish.whole_model import save_text_encoder
from pretraining.checkpoint import Average, Checkpoint
from pretraining.kept_weights import keep, start_from
from pretraining.precision import CPU, fast_autocast
from pretraining.render import scene_facts
from pretraining.train_vae import LATENT_CHANNELS, build_vae, learning_rate, to_pixels

BATCH = 32
PEAK_LR = 1e-3
WIDTHS = (96, 192)
EMPTY_CAPTIONS = 0.1
AVERAGES = (0.9995, 0.9999)  # share that each average keeps at an update of BATCH images
HELD_BACK = 2048  # scenes at the start of the set that no training uses
JUDGED = 1024  # of them, whose loss is measured


def build_unet(latent_channels: int = LATENT_CHANNELS, widths: tuple[int, int] = WIDTHS) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
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


def draw_timesteps(n: int, count: int, device: torch.device = CPU) -> Tensor:
    """`n` of `count` timesteps: every second uniform, the others logit-normal (Esser et al., arXiv 2403.03206)."""
    position = torch.rand(n, device=device)
    position[1::2] = torch.randn(len(position[1::2]), device=device).sigmoid()
    return (position * count).long().clamp(max=count - 1)


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, scenes: np.ndarray, path: Path) -> np.ndarray:
    """Latent means of all scenes, (N, C, 16, 16) float16, computed once, on the device of `vae`.

    Raises SystemExit if those in the file are of another autoencoder or of other scenes.
    """
    of, made_of = path.with_suffix(".sha256"), _digest(vae, scenes)
    if path.exists() and of.exists() and of.read_text() != made_of:
        raise SystemExit(f"{path}: of another autoencoder or other scenes; delete it, and it is made anew")
    if not path.exists():
        beside = path.with_suffix(".tmp.npy")
        shape = (len(scenes), vae.config.latent_channels, 16, 16)
        latents = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float16, shape=shape)
        for i in tqdm(range(0, len(scenes), 256), desc="latents"):
            with fast_autocast(vae.device):
                pixels = to_pixels(scenes[i : i + 256]).to(vae.device)
                mean = vae.encode(pixels).latent_dist.mean
            latents[i : i + 256] = mean.float().cpu().numpy()
        latents.flush()
        of.write_text(made_of)
        beside.rename(path)
    return np.load(path, mmap_mode="r")


def _digest(vae: AutoencoderKL, scenes: np.ndarray) -> str:
    """SHA-256 of the autoencoder's weights, how many scenes there are, and the first and the last of them."""
    digest = hashlib.sha256(str(scenes.shape).encode())
    for tensor in vae.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for some in (scenes[:256], scenes[-256:]):
        digest.update(np.ascontiguousarray(some).tobytes())
    return digest.hexdigest()


class Prompts:
    """Embeddings of captions, computed once, where the encoder is: `embed` takes numbers, -1 for the empty one."""

    def __init__(self, captions: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(["", *captions]))}
        ids = tokenizer(list(distinct), padding="max_length", truncation=True, return_tensors="pt").input_ids
        self._of_caption = torch.tensor([distinct[caption] for caption in [*captions, ""]])  # -1 is the last
        parts = []
        with torch.no_grad(), fast_autocast(encoder.device):
            for part in tqdm(ids.split(512), desc="prompts"):
                parts.append(encoder(part.to(encoder.device)).last_hidden_state.half())
        self._embeddings = torch.cat(parts)  # (D, L, 128) float16, of D distinct captions

    def embed(self, numbers: np.ndarray) -> Tensor:
        """(B, L, 128) float32."""
        numbers_of_distinct = self._of_caption[torch.from_numpy(numbers)]
        return self._embeddings[numbers_of_distinct.to(self._embeddings.device)].float()


@torch.no_grad()
def held_back_loss(unet: UNet2DConditionModel, latents: np.ndarray, prompts: Prompts) -> float:
    """The v-loss on the first `JUDGED` scenes, with timesteps evenly spread; the noise is always the same."""
    device, scheduler, generator = unet.device, build_scheduler(), torch.Generator().manual_seed(0)
    total = 0.0
    for start in range(0, JUDGED, 64):
        numbers = np.arange(start, start + 64)
        x = torch.from_numpy(latents[numbers]).float().to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        count = len(scheduler.alphas_cumprod)
        timesteps = torch.from_numpy((numbers + 0.5) / JUDGED * count).long()[torch.randperm(64, generator=generator)]
        timesteps = ((timesteps * 17) % count).to(device)  # every part has early and late ones
        with fast_autocast(device):
            prediction = unet(scheduler.add_noise(x, noise, timesteps), timesteps, prompts.embed(numbers)).sample
        total += (prediction.float() - scheduler.get_velocity(x, noise, timesteps)).square().mean().item() * 64
    return total / JUDGED


def assemble(work: Path, unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the whole pipeline; the large parts in half precision, the text encoder as it is."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    loaded = AutoencoderKL.from_pretrained(work / "vae")
    vae = build_vae(loaded.config.latent_channels)  # not as loaded: its configuration has the work folder's path
    vae.load_state_dict(loaded.state_dict())
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
    save_text_encoder(pipeline.text_encoder, folder / "text_encoder")
    give_usual_modes(folder)
    for name in (
        "vocab.json",
        "merges.txt",
    ):  # transformers 5 leaves out the two files that Stable Diffusion's layout has
        (folder / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())


def training_state(
    latent_channels: int = LATENT_CHANNELS,
    weights: dict[str, Tensor] | None = None,
    widths: tuple[int, int] = WIDTHS,
    device: torch.device = CPU,
    batch: int = BATCH,
) -> tuple[UNet2DConditionModel, nn.ModuleList, AdamW]:
    """The denoiser, its averages and its optimizer as at the start, or as at the start from `weights`.

    batch: images of a step, over which averages reach as many images as with `BATCH`.
    """
    torch.manual_seed(0)
    unet = build_unet(latent_channels, widths)
    if weights is not None:
        unet.load_state_dict(weights)
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain products: much faster backward than the fused kernel on a CPU
    else:
        unet.to(device, memory_format=torch.channels_last)  # as a GPU's convolutions want it
    optimizer = AdamW(unet.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    return unet, nn.ModuleList(Average(unet, decay ** (batch / BATCH)) for decay in AVERAGES), optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--images", type=int, default=2_000_000, help="length of the training")
    parser.add_argument("--assemble-every", type=int, default=64_000, help="images between two saved pipelines")
    parser.add_argument("--start-from", type=expanded_path, help="kept weights to go on from where there is no unet.pt")
    parser.add_argument("--rate", type=float, default=PEAK_LR, help="learning rate at its highest")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--widths", type=int, nargs=2, default=WIDTHS, help="channels of the two levels")
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda; unless given, the GPU if there is one",
    )
    parser.add_argument(
        "--compile", action="store_true", help="on two cores a tenth faster, after minutes of compiling"
    )
    parser.add_argument("--out", type=expanded_path, help="folder of the results, for short runs; default: --work")
    args = parser.parse_args()
    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    scenes = np.load(args.work / "scenes.npy", mmap_mode="r")
    captions = [facts["caption"] for facts in scene_facts(args.work)]
    device: torch.device = args.device
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(device)
    latents = cache_latents(vae, scenes, args.work / "latents.npy")
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.work / "text_encoder", dtype=torch.float32).requires_grad_(False)
    prompts = Prompts(captions, tokenizer, encoder.to(device))  # type: ignore[arg-type]  # transformers hides the signature

    channels = vae.config.latent_channels
    unet, averages, optimizer = training_state(channels, widths=args.widths, device=device, batch=args.batch)
    started = 0
    if args.start_from:
        kept = build_unet(channels, args.widths)
        started = start_from(args.start_from, kept)
        unet, averages, optimizer = training_state(channels, kept.state_dict(), args.widths, device, args.batch)
    checkpoint = Checkpoint(out / "unet.pt", unet=unet, optimizer=optimizer, averages=averages)
    seen = checkpoint.restore() or started
    predict = torch.compile(unet) if args.compile else unet
    scheduler = build_scheduler()
    count = len(scheduler.alphas_cumprod)
    near = torch.from_numpy(np.array(latents)).to(device)

    bar = tqdm(total=args.images, initial=seen, unit="img", mininterval=10)
    smooth: Tensor | None = None
    while seen < args.images:
        rng = np.random.default_rng((4, seen))
        torch.manual_seed(seen)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen, args.images, args.rate, warmup=500 * args.batch, tail=0.2)
        batch = np.sort(rng.integers(HELD_BACK, len(latents), args.batch))
        x = near[torch.from_numpy(batch).to(device)].float()
        context = prompts.embed(np.where(rng.random(args.batch) < EMPTY_CAPTIONS, -1, batch))
        noise = torch.randn(x.shape, device=device)
        timesteps = draw_timesteps(args.batch, count, device)
        noisy = scheduler.add_noise(x, noise, timesteps)
        target = scheduler.get_velocity(x, noise, timesteps)
        with fast_autocast(device):
            prediction: Tensor = predict(noisy, timesteps, context).sample
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average in averages:
            cast(Average, average).update(unet)
        seen += args.batch
        smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.005)
        bar.update(args.batch)
        if seen // args.batch % 100 == 0:  # reading it waits for the device
            bar.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)
        checkpoint.save_when_due(seen)
        if seen % args.assemble_every < args.batch or seen >= args.images:
            candidates = []
            for average in averages:
                candidates.append(build_unet(channels, args.widths).to(device))
                cast(Average, average).copy_to(candidates[-1])
            losses = [held_back_loss(candidate, latents, prompts) for candidate in candidates]
            best = candidates[int(np.argmin(losses))]
            keep(out / "unet_kept.safetensors", best, seen)
            best.set_attn_processor(AttnProcessor2_0())
            assemble(args.work, best.half().cpu(), out / "mini_base")
            with (out / "unet_loss.csv").open("a") as log:
                log.write(",".join([str(seen), *(f"{loss:.5f}" for loss in (smooth.item(), *losses))]) + "\n")
    checkpoint.save(seen)


if __name__ == "__main__":
    main()
