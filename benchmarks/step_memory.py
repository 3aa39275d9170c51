"""How close the estimate of a training step's memory comes to what a step takes.

python -m benchmarks.step_memory --out benchmarks/results/step_memory.json

Every case has a process of its own, in which a step with another adapter has warmed up. A run that was stopped goes on
where it was; run again it only prints the table.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.bases import DTYPES, load_base
from benchmarks.measure import Records, bytes_in_use, file_to_write, peak_bytes, reset_peak, table
from gsoft_diffusion.adapters.injection import inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.loading import load_model
from gsoft_diffusion.training.predictor import Predictor
from gsoft_diffusion.training.step_memory import step_bytes

CASES = [
    {"base": base, "dtype": dtype, "latents": side, "batch": batch, "gradient_checkpointing": checkpointing}
    for base, dtype, side, batch in (
        ("mini", "float32", 16, 4),
        ("sd15", "float32", 32, 1),
        ("sd15", "bfloat16", 32, 1),
    )
    for checkpointing in (False, True)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file_to_write, required=True, help="JSON file of the measurements")
    records = Records(parser.parse_args().out, {})
    context = multiprocessing.get_context("spawn")
    for case in tqdm([case for case in CASES if not records.has(**case)], unit="case"):
        with context.Pool(1) as pool:
            records.add(**case, **pool.apply(measure, kwds=case))
    print(report(records.records))


def measure(base: str, dtype: str, latents: int, batch: int, gradient_checkpointing: bool) -> dict[str, Any]:
    """Bytes as estimated and as measured, and the seconds of the processor that the estimate took."""
    model: Any = load_model("data/mini_base")
    model.unet, model.text_encoder, _ = load_base(base, DTYPES[dtype])
    shape = (model.unet.config.in_channels, latents, latents)

    def loss(denoiser: Predictor) -> Tensor:
        zeros = torch.zeros(batch, dtype=torch.long)
        return denoiser(torch.zeros(batch, *shape), zeros, zeros[:1], zeros, torch.zeros(batch, 6)).square().mean()

    adapter = inject(AdapterConfig(nblocks=32), model.denoiser, model.text_encoders)
    started = time.process_time()
    options: dict[str, Any] = {"trains_text": True, "gradient_checkpointing": gradient_checkpointing}
    estimated = step_bytes(model, adapter, batch, shape, **options)
    seconds = time.process_time() - started
    if gradient_checkpointing:
        model.checkpoint_gradients()
    loss(Predictor(model, adapter, [""]).train()).backward()
    adapter.remove()
    adapter = inject(AdapterConfig(nblocks=32), model.denoiser, model.text_encoders)
    denoiser = Predictor(model, adapter, [""]).train()
    gc.collect()
    reset_peak()
    before, resident = bytes_in_use(), peak_bytes()
    value = loss(denoiser)
    kept = bytes_in_use() - before  # type: ignore[operator]
    value.backward()
    peak = peak_bytes() - resident  # type: ignore[operator]
    return {"estimated_bytes": estimated, "peak_bytes": peak, "kept_bytes": kept, "seconds": seconds}


def report(records: list[dict[str, Any]]) -> str:
    """The table."""

    def row(record: dict[str, Any]) -> list[str]:
        case = f"{record['base']}, {record['dtype']}, batch {record['batch']}, latents {record['latents']}"
        size = {name: record[f"{name}_bytes"] for name in ("estimated", "peak", "kept")}
        ratios = [f"{size['estimated'] / size[name]:.2f}" for name in ("kept", "peak")]
        switch = "checkpointing" if record["gradient_checkpointing"] else ""
        return [case, switch, *(f"{n / 2**20:,.0f}" for n in size.values()), *ratios, f"{record['seconds']:.1f}"]

    header = [
        "",
        "",
        "estimated, MiB",
        "peak, MiB",
        "kept, MiB",
        "estimated / kept",
        "estimated / peak",
        "estimate, s of processor",
    ]
    return table(header, map(row, records))


if __name__ == "__main__":
    main()
