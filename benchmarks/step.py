"""A training step's time and memory with every method, on the same layers at an equal number of parameters.

python -m benchmarks.step --base sd15 --latents 64 --out benchmarks/results/step_sd15_64.json

Every repetition puts each method in turn into the same model, takes a step to warm up and a few that are timed, and
takes it out again; ratios are medians over the repetitions, each within its own. A run that was stopped goes on where
it was; run with the same arguments again it only prints the table. With `--device cuda` every step waits until the
GPU has finished, and memory is what tensors hold of the card's.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.bases import BASES, DTYPES, USUAL, added_conditions, device, load_base, random_text
from benchmarks.measure import (
    CLOCKS,
    Records,
    bytes_in_use,
    clock_for,
    file_to_write,
    median,
    peak_bytes,
    reset_peak,
    table,
)
from benchmarks.peft_boft import compute_as_peft
from benchmarks.published import PublishedAdapter
from eval.baselines import inject_baseline
from eval.methods import matched
from gsoft_diffusion.adapters.injection import find_attentions, find_clip_attentions, find_linears, inject
from gsoft_diffusion.foundation.memory import keep_freed_memory

METHODS = {
    "floor": "frozen, only the attentions' output biases train",
    "biases": "frozen, an output bias of every adapted layer trains",
    "lora": "LoRA (PEFT)",
    "lora_half": "LoRA (PEFT), its parameters in the base's dtype",
    "double_gsoft": "Double GSOFT",
    "published": "Double GSOFT as published",
    "boft": "BOFT, all its factors, computed as here",
    "boft_peft": "BOFT, all its factors, computed as in PEFT",
    "oft": "OFT v2 (PEFT)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="sd15")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 for mini, else bfloat16, unless given")
    parser.add_argument("--latents", type=int, help="their side; sd15 64, sdxl 128, mini 16, unless given")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="the UNet by torch.compile")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--text_encoder", action="store_true", help="adapt and train it as well")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each repetition")
    parser.add_argument("--clock", choices=CLOCKS, help="cpu where other programs run at the same time")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    args.dtype, args.latents = args.dtype or USUAL[args.base][0], args.latents or USUAL[args.base][1]
    args.clock = args.clock or clock_for(args.device)
    if args.text_encoder and args.base == "sdxl":
        parser.error("--text_encoder: sdxl is measured without its text encoders")
    records = Records(args.out, settings_of(args), args.device)
    wanted = [
        (repetition, method)
        for repetition in range(args.repetitions)
        for method in args.methods[repetition % len(args.methods) :] + args.methods[: repetition % len(args.methods)]
        if not records.has(repetition=repetition, method=method)
    ]
    if wanted:
        if args.device.type == "cpu":
            keep_freed_memory()  # as training does
        bench = Bench(args)
        for repetition, method in tqdm(wanted, unit="method"):
            records.add(repetition=repetition, method=method, **bench.measured(method, args.steps))
    print(report(records.records))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a file of measurements is about: what may not change when more are added to it."""
    left_out = {"out", "methods", "repetitions", "steps", "device"}  # the device is in what is said of the machine
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    if not args.compile:
        del settings["compile"]  # which files of before do not speak of
    return settings


SIZED_AS = {"published": "double_gsoft", "lora_half": "lora", "boft_peft": "boft"}
ANGLE = 0.02  # standard deviation of what a rotation is made from: what Cayley's map costs depends on it


def turned(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Rotations away from the identity, as they are after some training; scales as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.ndim > 1:
                parameter.copy_(torch.normal(0, ANGLE, parameter.shape, generator=generator))
    return parameters


class Bench:
    """The model, and the one batch that every method trains on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, dtype = args.device, DTYPES[args.dtype]
        self.unet, self.text_encoder, length = load_base(args.base, dtype, self.device)
        self.call, self.compiles = self.unet, args.compile
        self.trains_text, self.clock = args.text_encoder, CLOCKS[args.clock]
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch, self.unet.config.in_channels, args.latents, args.latents)
        latents = torch.randn(shape, generator=generator)
        self.latents = latents.to(self.device, dtype)
        self.noise = torch.randn(latents.shape, generator=generator).to(self.device)
        self.timesteps = torch.randint(1000, (args.batch,), generator=generator).to(self.device)
        self.conditions = added_conditions(self.unet, args.batch)
        if self.text_encoder is None:
            self.text = random_text(self.unet, length)
        else:
            tokens = torch.randint(self.text_encoder.config.vocab_size, (1, length), generator=generator)
            self.tokens = tokens.to(self.device)
            with torch.no_grad():
                self.text = self.text_encoder(self.tokens)[0]
        text_encoders = [self.text_encoder] if self.trains_text else []
        self.layers = find_linears(find_attentions(self.unet), find_clip_attentions(self.trains_text, text_encoders))

    def measured(self, method: str, steps: int) -> dict[str, Any]:
        """What `measure` returns, or what it ran out of."""
        try:
            return self.measure(method, steps)
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}

    def measure(self, method: str, steps: int) -> dict[str, Any]:
        """Seconds of the first step, which compiles, and of each timed one; memory; how many numbers are trained."""
        gc.collect()
        before = bytes_in_use(self.device)
        parameters, remove = self._put_in(method)
        if self.compiles:
            torch.compiler.reset()
            self.call = torch.compile(self.unet)
        try:
            return self._measure(parameters, before, steps)
        finally:
            remove()

    def _measure(self, parameters: list[nn.Parameter], before: int | None, steps: int) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)  # as in training
        started = self.clock()
        self._step(optimizer)
        first = self.clock() - started
        reset_peak(self.device)
        loss = self._loss()
        kept = None if before is None else bytes_in_use(self.device) - before  # type: ignore[operator]
        loss.backward()
        peak = peak_bytes(self.device)
        del loss
        optimizer.zero_grad()
        seconds = []
        for _ in range(steps):
            started = self.clock()
            self._step(optimizer)
            seconds.append(self.clock() - started)
        return {
            "first_seconds": first,
            "seconds": seconds,
            "kept_bytes": kept,  # for the backward pass, by the optimizer, and by the adapter itself
            "peak_bytes": peak,
            "parameters": sum(parameter.numel() for parameter in parameters),
        }

    def _put_in(self, method: str) -> tuple[list[nn.Parameter], Callable[[], None]]:
        """Put the method into the model; returns its trainable parameters and what takes it out again."""
        text_encoders = [self.text_encoder] if self.trains_text else []
        if method in ("floor", "biases"):
            return self._biases(every_layer=method == "biases")
        config: Any = matched(SIZED_AS.get(method, method), "small", self.layers, self.trains_text)
        if method == "published":
            published = PublishedAdapter(config, self.unet, text_encoders)
            return turned(published.trainable()), published.remove
        adapter: Any = (inject if method == "double_gsoft" else inject_baseline)(config, self.unet, text_encoders)
        parameters = list(adapter.parameters())
        if method == "boft_peft":
            compute_as_peft([self.unet, *text_encoders])
        if method == "lora_half":
            for parameter in parameters:
                parameter.data = parameter.data.to(self.latents.dtype)
        return turned(parameters) if method == "double_gsoft" else parameters, adapter.remove

    def _biases(self, every_layer: bool) -> tuple[list[nn.Parameter], Callable[[], None]]:
        """The floor. The first attention's products need no backward pass if only biases behind them train."""
        linears = [layer for layer in self.layers.values() if isinstance(layer, nn.Linear)]
        before = {layer: layer.bias for layer in linears if every_layer or layer.bias is not None}
        for layer, bias in before.items():
            layer.bias = nn.Parameter(
                layer.weight.new_zeros(layer.out_features) if bias is None else bias.detach().clone()
            )

        def remove() -> None:
            for layer, bias in before.items():
                layer.bias = bias

        return [layer.bias for layer in before], remove

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        self._loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    def _loss(self) -> Tensor:
        text = self.text_encoder(self.tokens)[0] if self.trains_text else self.text
        text = text.expand(len(self.latents), -1, -1)
        prediction = self.call(self.latents, self.timesteps, encoder_hidden_states=text, **self.conditions).sample
        return (prediction.float() - self.noise).square().mean()


def report(records: list[dict[str, Any]]) -> str:
    """The table: medians over repetitions; ratios within each repetition; without what could not be measured."""
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for record in (record for record in records if "error" not in record):
        by_method.setdefault(record["method"], {})[record["repetition"]] = record
    seconds = {name: {i: min(r["seconds"]) for i, r in found.items()} for name, found in by_method.items()}

    def ratio(name: str, other: str) -> str:
        both = seconds[name].keys() & seconds.get(other, {}).keys()
        return f"{median(seconds[name][i] / seconds[other][i] for i in both):.3f}" if both else ""

    def mebibytes(name: str, what: str) -> str:
        values = [record[what] for record in by_method[name].values() if record[what] is not None]
        return f"{median(values) / 2**20:,.0f}" if values else ""

    rows = [
        [
            title,
            f"{median(seconds[name].values()):.3f}",
            ratio(name, "floor"),
            ratio(name, "lora"),
            mebibytes(name, "kept_bytes"),
            mebibytes(name, "peak_bytes"),
            f"{next(iter(by_method[name].values()))['parameters']:,}",
        ]
        for name, title in METHODS.items()
        if name in by_method
    ]
    count = max(map(len, by_method.values()), default=0)
    header = ["", "step, s", "/ floor", "/ LoRA", "kept, MiB", "peak, MiB", "stored numbers"]
    return f"{table(header, rows)}\n\n{count} repetitions; the faster of each repetition's steps."


if __name__ == "__main__":
    main()
