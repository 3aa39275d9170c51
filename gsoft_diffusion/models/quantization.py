"""A frozen base in four bits, by bitsandbytes' NormalFloat (Dettmers et al., *QLoRA*, 2023).

Only layers that no adapter uses are quantised. Adapted layers keep the dtype they were loaded in, so an adapter is
trained on the weights with which it is used later, and does not know whether its base was quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gsoft.linear_slice import whole_of
from gsoft_diffusion.foundation.errors import UserError, first_line
from gsoft_diffusion.models.attention_layers import attention_layers, denoiser_attentions


def require_bitsandbytes() -> None:
    """Raise UserError unless bitsandbytes is there."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"--quantize_base needs a library: pip install bitsandbytes ({first_line(error)})") from error


def quantizable(model: nn.Module, fused_attention: bool) -> dict[str, nn.Linear]:
    """The linear layers in a model's lists of blocks, without those of attention that are adapted, by their paths.

    fused_attention: whether attention that shares matrices with the feed-forward layer is adapted as well.

    Outside of the blocks, for embeddings and the output, they are few and matter most. What the model's library wants
    exact stays so too: T5 casts its activations to the dtype of some weights.
    """
    attentions = denoiser_attentions(model, fused_attention).values()
    adapted = {whole_of(layer) for attention in attentions for layer in attention_layers(attention).values()}
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and module not in adapted
        and path.startswith(lists)
        and exact.isdisjoint(path.split("."))
    }


def quantize(model: nn.Module, quant_type: str, device: torch.device | str, fused_attention: bool) -> None:
    """Put bitsandbytes' 4-bit layers in the place of all that `quantizable` finds.

    The same weights give the same layers on the same kind of device, so a resumed run goes on with what it had.

    model: the network, changed in place; it computes in the dtype of its weights, as before.
    quant_type: bitsandbytes' name of the 4-bit type, such as nf4.
    device: where the new layers go; all others stay where they are.
    fused_attention: as in `quantizable`.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in quantizable(model, fused_attention).items():
        weight = linear.weight.detach()
        layer: Any = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            quant_type=quant_type,
            device="meta",
        )
        layer.weight = Params4bit(weight, requires_grad=False, quant_type=quant_type, module=layer)
        layer.bias = linear.bias
        # Some CPUs get another packing when not training, which has no gradient and does not come back exactly.
        layer.support_avx512bf16_for_cpu = False
        model.set_submodule(path, layer.to(device))


def numbers_in(parameter: nn.Parameter) -> int:
    """How many weights the parameter stands for, quantised or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
