"""`torch.compile` of adapted models: whole graphs, no further compilations, and the numbers of the plain models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import PIXELS
from tiny_families import WRITERS
from tiny_models import randomise, run, tiny_text_encoder, tiny_unet, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gsoft import adapter as adapter_module
from gsoft_diffusion.adapters.injection import Adapter, inject
from gsoft_diffusion.config import AdapterConfig
from gsoft_diffusion.models.families import Flux, Flux2Dev, Flux2Klein, StableDiffusion3, ZImage
from gsoft_diffusion.models.families.base import whole_view
from gsoft_diffusion.models.loading import load_model

CONFIG = AdapterConfig(nblocks=4, text_encoder=True)
STEPS = 4


def outputs_and_gradients(adapter: Adapter, output: Callable[[], Tensor]) -> list[Tensor]:
    """Of some optimizer steps, and of sampling after them."""
    start = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        made = output()
        made.square().mean().backward()
        found += [made.detach(), *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)]
        optimizer.step()
    with torch.no_grad():
        found.append(output())
    adapter.load_state_dict(start)
    return found


def check(adapter: Adapter, plain: Callable[[], Tensor], compiled: Callable[[], Tensor]) -> None:
    for ours, reference in zip(
        outputs_and_gradients(adapter, compiled), outputs_and_gradients(adapter, plain), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_is_one_graph_for_training_and_one_for_sampling(counter, monkeypatch, room, checkpointing):
    """With rotated weights, and with rotated activations where there is no room for the weights."""
    if not room:
        monkeypatch.setattr(adapter_module, "KEPT_WEIGHT_BYTES", 0)
    unet = tiny_unet().train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), unet)
    randomise(adapter, size=0.1)
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    check(adapter, lambda: run(unet), lambda: run(compiled))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_a_text_encoder_is_one_graph(counter):
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    adapter = inject(CONFIG, unet, [text_encoder])
    randomise(adapter, size=0.1)
    compiled = torch.compile(text_encoder, backend=counter, fullgraph=True)
    check(adapter, lambda: text_encoder(tokens())[0], lambda: compiled(tokens())[0])
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [StableDiffusion3, Flux, Flux2Klein, Flux2Dev, ZImage], ids=lambda family: family.__name__
)
def test_a_transformer_has_as_many_graphs_as_its_base(counter, family, tmp_path):
    model = load_model(str(WRITERS[family](tmp_path / "base")))
    latents = torch.randn(1, *model.latent_shape(PIXELS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = model.encode_prompts(["a dog"])

    def output() -> Tensor:
        return model.predict(latents, torch.tensor([500]), conditioning, whole_view(PIXELS, PIXELS))

    model.denoiser.compile(backend=counter)
    with torch.no_grad():
        output()
    of_base = counter.frame_count
    adapter = inject(AdapterConfig(block_size=4, text_encoder=False), model.denoiser)
    randomise(adapter, size=0.1)
    compiled = outputs_and_gradients(adapter, output)
    # And as many in training, and in sampling. Z-Image's base breaks up, and parts of it without layers stay.
    if family is ZImage:
        assert of_base < counter.frame_count <= 3 * of_base
    else:
        assert counter.frame_count == 3 * of_base == 3
    with torch.compiler.set_stance("force_eager"):
        plain = outputs_and_gradients(adapter, output)
    for ours, reference in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def test_weights_follow_the_parameters_in_a_compiled_model(counter):
    unet = tiny_unet()
    adapter = inject(AdapterConfig(nblocks=4, text_encoder=False), unet)
    compiled = torch.compile(unet, backend=counter)
    with torch.no_grad():
        before = run(compiled)
        randomise(adapter, size=0.1)
        assert not torch.allclose(run(compiled), before)
        with adapter.disabled():
            torch.testing.assert_close(run(compiled), before)
        adapter.merge()
        merged = run(compiled)
        adapter.unmerge()
        torch.testing.assert_close(run(compiled), merged)
