"""What a training step of each method costs: seconds, and the memory that its forward pass keeps."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import CLOCKS, bytes_in_use
from examples.language.methods import Adapted
from examples.language.tasks import TASKS
from examples.language.training import Run, load_model, training_device

REPETITIONS = 3
STEPS = 2  # timed, in each repetition


def measure(run: Run) -> dict[str, Any]:
    """Take a few training steps on one batch of full-length texts.

    run: the settings; nothing of the task but its kind of head matters. Returns `seconds` of each step, of the
    processor on a CPU, and `kept_bytes`: what the forward pass keeps for the backward pass, with the rotated weights
    that GSOFT makes for it. None where the system does not say.
    """
    gc.collect()
    torch.manual_seed(run.seed)
    model, tokenizer = load_model(run.model, TASKS[run.task])
    shape = (run.batch_size, run.max_length)
    tokens = torch.randint(len(tokenizer) // 2, len(tokenizer), shape)
    device = training_device()
    batch = {
        "input_ids": tokens.to(device),
        "attention_mask": torch.ones_like(tokens, device=device),
        "labels": torch.zeros(run.batch_size, dtype=torch.long if TASKS[run.task].labels else torch.float).to(device),
    }
    adapted = Adapted(model, run.method).to(device).train()
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0)
    clock = CLOCKS["cpu" if device.type == "cpu" else "wall"]

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
            return adapted(**batch).loss

    def step() -> float:
        started = clock()
        loss().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)  # as the Trainer does
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    step()
    if adapted.adapter is not None:
        adapted.adapter.refresh()  # else it still holds the rotated weights of the step before
    before = _in_use(device)
    held = loss()
    kept = None if before is None else (_in_use(device) or 0) - before
    del held
    step()  # finds rotations that were made for the loss above
    return {"seconds": [step() for _ in range(STEPS)], "kept_bytes": kept}


def _in_use(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated() if device.type == "cuda" else bytes_in_use()
