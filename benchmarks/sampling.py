"""A denoiser call while sampling: the base model, the adapter merged, beside the model, and as it was published.

python -m benchmarks.sampling --base sd15 --latents 64 --out benchmarks/results/sampling_sd15_64.json

Every repetition times one call of the UNet, for pictures with guidance (two of each in a batch), in each state. What a
method makes once for all pictures is made before, and the time that Double GSOFT takes for it is given by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.bases import BASES, DTYPES, USUAL, added_conditions, device, load_base, random_text
from benchmarks.measure import CLOCKS, Records, clock_for, file_to_write, median, table
from benchmarks.published import PublishedAdapter
from benchmarks.step import turned
from eval.baselines import inject_baseline
from eval.methods import matched
from gsoft_diffusion.adapters.injection import find_attentions, find_linears, inject

STATES = {
    "base": "base model",
    "merged": "merged",
    "unmerged": "beside the model",
    "published": "as published: solved for and rotated in every call",
    "lora": "LoRA (PEFT), beside the model",
    "boft": "BOFT, all its factors, beside the model",
    "oft": "OFT v2 (PEFT), beside the model",
}
USUAL_STATES = ("base", "merged", "unmerged", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="sd15")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 for mini, else bfloat16, unless given")
    parser.add_argument("--latents", type=int, help="their side; sd15 64, sdxl 128, mini 16, unless given")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time")
    parser.add_argument("--compile", action="store_true", help="the UNet by torch.compile")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(USUAL_STATES))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, help="cpu where other programs run at the same time")
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    args = parser.parse_args()
    args.dtype, args.latents = args.dtype or USUAL[args.base][0], args.latents or USUAL[args.base][1]
    args.clock = args.clock or clock_for(args.device)
    records = Records(args.out, settings_of(args), args.device)
    wanted = [i for i in range(args.repetitions) if not records.has(repetition=i)]
    if wanted:
        measure(args, wanted, records)
    print(report(records.records))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a file of measurements is about: what may not change when more are added to it."""
    settings = {name: getattr(args, name) for name in ("base", "dtype", "latents", "clock")}
    # Files of before do not speak of these.
    settings |= {"batch": args.batch} if args.batch > 1 else {}
    settings |= {"compile": True} if args.compile else {}
    return settings | ({"states": args.states} if args.states != list(USUAL_STATES) else {})


def measure(args: argparse.Namespace, repetitions: list[int], records: Records) -> None:
    """Add a record for each repetition.

    args: as `main` has them. repetitions: their numbers. records: where they go, as they come.
    """
    bench = Bench(args)
    for repetition in tqdm(repetitions):
        records.add(repetition=repetition, **bench.measured(args.states))


class Bench:
    """The UNet, and the one call of it that is timed."""

    def __init__(self, args: argparse.Namespace) -> None:
        dtype, count = DTYPES[args.dtype], 2 * args.batch
        self.unet, text_encoder, length = load_base(args.base, dtype, args.device)
        self.compiles, self.clock = args.compile, CLOCKS[args.clock]
        self.layers = find_linears(find_attentions(self.unet), {})
        if text_encoder is None:
            text = random_text(self.unet, length)
        else:
            with torch.no_grad():
                text = text_encoder(torch.zeros(1, length, dtype=torch.long, device=args.device))[0]
        generator = torch.Generator().manual_seed(0)
        shape = (count, self.unet.config.in_channels, args.latents, args.latents)
        latents = torch.randn(shape, generator=generator)
        self.inputs = (latents.to(args.device, dtype), torch.tensor(500, device=args.device))
        self.conditions = {"encoder_hidden_states": text.repeat(count, 1, 1), **added_conditions(self.unet, count)}

    @torch.no_grad()  # as `generate` does
    def measured(self, states: Sequence[str]) -> dict[str, Any]:
        """Seconds of a call in each of the states, of making the rotated weights, and of merging."""
        result: dict[str, Any] = {"seconds": {}}
        seconds = result["seconds"]
        for state in states:
            if state == "base":
                seconds[state] = self._call()[1]
            elif state == "published":
                published = PublishedAdapter(self._config("double_gsoft"), self.unet, [])
                seconds[state] = self._call()[1]
                published.remove()
            elif state in ("lora", "boft", "oft"):
                baseline = inject_baseline(self._config(state), self.unet)
                seconds[state] = self._call()[1]
                baseline.remove()
        if {"merged", "unmerged"} & set(states):
            adapter = inject(self._config("double_gsoft"), self.unet)
            turned(list(adapter.parameters()))
            first, seconds["unmerged"] = self._call()
            adapter.refresh()  # so that merging makes the rotated weights itself
            started = self.clock()
            adapter.merge()
            merging = self.clock() - started
            if not self.compiles:  # which takes far longer
                result |= {"first_unmerged": first, "merging": merging}
            seconds["merged"] = self._call()[1]
            adapter.remove()
        return result

    def _config(self, method: str) -> Any:
        return matched(method, "small", self.layers, text_encoder=False)

    def _call(self) -> tuple[float, float]:
        """Seconds of the first call, which makes and compiles what is kept, and of the fastest of two more."""
        call = self.unet
        if self.compiles:
            torch.compiler.reset()
            call = torch.compile(self.unet)
        return self._timed(call), min(self._timed(call), self._timed(call))

    def _timed(self, call: Callable[..., Any]) -> float:
        started = self.clock()
        call(*self.inputs, **self.conditions)
        return self.clock() - started


def report(records: list[dict[str, Any]]) -> str:
    """The table: medians over repetitions; ratios only where the base model was measured as well."""
    with_base = all("base" in record["seconds"] for record in records)
    rows = [
        [
            title,
            f"{median(record['seconds'][state] for record in records):.3f}",
            f"{median(r['seconds'][state] / r['seconds']['base'] for r in records):.3f}" if with_base else "",
        ]
        for state, title in STATES.items()
        if all(state in record["seconds"] for record in records)
    ]
    said = f"{table(['', 'call, s', '/ base'], rows)}\n\n{len(records)} repetitions."
    if not all("merging" in record for record in records):
        return said
    making = median(record["first_unmerged"] - record["seconds"]["unmerged"] for record in records)
    merging = median(record["merging"] for record in records)
    return f"{said} Making the rotated weights, once: {making:.2f} s beside the model; {merging:.2f} s merged."


if __name__ == "__main__":
    main()
