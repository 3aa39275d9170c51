"""accelerate as a run sets it up, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

from accelerate.state import AcceleratorState
from pretended import pretended_gpu

from gsoft_diffusion.training.accelerator import make_accelerator


def test_frozen_buffers_are_not_sent_again_in_every_step(config):
    assert not make_accelerator(config).ddp_handler.broadcast_buffers


def test_half_precision_is_recommended_on_a_gpu(config, capfd):
    said = "note: this run computes in float32; --mixed_precision bf16 (fp16 on older GPUs) is faster"
    make_accelerator(config)
    assert said not in capfd.readouterr().out
    with pretended_gpu():
        make_accelerator(config)
        assert said in capfd.readouterr().out
        AcceleratorState._reset_state(reset_partial_state=True)
        make_accelerator(replace(config, mixed_precision="bf16"))
    assert said not in capfd.readouterr().out
