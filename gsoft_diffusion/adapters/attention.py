"""The UNet's attention with rotated projections, as a diffusers attention processor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.utils import is_xformers_available
from torch import Tensor

from gsoft.linear import RotatedLayer, rotate_together
from gsoft_diffusion.foundation.errors import UserError, first_line

# Processors that differ from ours only in how they compute the attention product: nothing is lost by replacing them.
STOCK_PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


class GSOFTAttnProcessor:
    """diffusers' `AttnProcessor2_0` with `to_q`, `to_k`, `to_v` and `to_out[0]` rotated.

    The attention product runs on the backend chosen with `unet.set_attention_backend(name)`, by default PyTorch's fused
    one. Not an `nn.Module`, and that on purpose: diffusers would make it a submodule of the UNet, where
    `unet.to(dtype)` would cast the trained parameters and `unet.save_pretrained` write them among the weights. What is
    learned belongs to the `Adapter`.
    """

    _parallel_config = None  # diffusers' contract for processors that dispatch; it also wants `_attention_backend`

    def __init__(self, rotated: Mapping[str, RotatedLayer]) -> None:
        """rotated: what computes with the layer of each name in `PROJECTIONS`."""
        self.rotated = dict(rotated)
        self._backend: AttentionBackendName | None = None

    @property
    def _attention_backend(self) -> AttentionBackendName | None:
        return self._backend

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        if backend == AttentionBackendName.XFORMERS:
            require_xformers()
        self._backend = backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the attention, as diffusers calls a processor.

        attn: the attention whose layers are used.
        hidden_states: `(B, S, C)` or `(B, C, H, W)`, and so is the result.
        encoder_hidden_states: `(B, S', C')`, what is attended to; None for self-attention.
        attention_mask: as `attn.prepare_attention_mask` takes it; None to attend to everything.
        temb: for a spatial norm, if `attn` has one.
        args, kwargs: what diffusers passes to other processors; not used.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)

        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, H·W, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross is not None:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        batch_size, key_length = encoder_hidden_states.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key_length, batch_size)
            attention_mask = attention_mask.view(batch_size, attn.heads, -1, attention_mask.shape[-1])

        if encoder_hidden_states is hidden_states:
            query, key, value = self._project(attn, ("to_q", "to_k", "to_v"), hidden_states)
        else:
            (query,) = self._project(attn, ("to_q",), hidden_states)
            key, value = self._project(attn, ("to_k", "to_v"), encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))  # (B, S, heads, D)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            scale=None if attn.scale_qk else attn.scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2).to(query.dtype)  # (B, S, heads·D)

        hidden_states = self.rotated["to_out"](attn.to_out[0], hidden_states)
        hidden_states = attn.to_out[1](hidden_states)  # dropout

        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _project(self, attn: Attention, names: Sequence[str], x: Tensor) -> list[Tensor]:
        return rotate_together([self.rotated[name] for name in names], [getattr(attn, name) for name in names], x)


class GuardedAttention(Attention):
    """The class of an `Attention` with a GSOFT processor, which it protects from accidental replacement.

    diffusers' switches for memory-efficient and sliced attention replace the processor, and with it would go what was
    trained. Here they choose the backend inside the processor instead, or are declined with a warning. A class, not a
    patched instance, so that copies of the UNet are guarded as well.
    """

    processor: Any  # a GSOFTAttnProcessor

    def set_processor(self, processor: Any) -> None:
        """Keep the GSOFT processor. UserError for a processor that computes something else and cannot be combined."""
        if isinstance(processor, GSOFTAttnProcessor):
            super().set_processor(processor)
        elif isinstance(processor, XFormersAttnProcessor):
            self.set_use_memory_efficient_attention_xformers(True)
        elif isinstance(processor, STOCK_PROCESSORS):
            name = type(processor).__name__
            warnings.warn(
                f"{name} was declined: GSOFT's attention processor stays, with its own fused attention", stacklevel=2
            )
        else:
            raise UserError(
                f"{type(processor).__name__} would replace the trained GSOFT attention processors; "
                "remove the adapter first (adapter.remove())"
            )

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Callable | None = None
    ) -> None:
        """Switch the backend inside the GSOFT processor.

        use_memory_efficient_attention_xformers: True for xformers, False for PyTorch's fused attention.
        attention_op: ignored with a warning; xformers chooses its operator itself.

        Raises UserError where xformers cannot run.
        """
        if attention_op is not None:
            warnings.warn("attention_op was ignored: xformers chooses its operator itself", stacklevel=2)
        backend = AttentionBackendName.XFORMERS if use_memory_efficient_attention_xformers else None
        self.processor._attention_backend = backend


def try_xformers() -> None:
    """Compute a tiny attention with xformers on the GPU. Raises whatever it raises where its kernels do not run."""
    import xformers.ops

    query = torch.zeros(1, 8, 1, 8, dtype=torch.float16, device="cuda")
    xformers.ops.memory_efficient_attention(query, query, query)


def require_xformers() -> None:
    """Raise UserError unless xformers can run here: it must be installed and needs a GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            "xformers has no CPU kernels and no GPU was found; leave it out: PyTorch's fused attention is used"
        )
    if not is_xformers_available():
        raise UserError("xformers is not installed; install it (pip install xformers) or leave it out")
    try:
        try_xformers()
    except Exception as error:  # kernels that were built for another PyTorch raise whatever they do
        raise UserError(
            f"xformers is installed but does not run here ({first_line(error)}); leave it out: PyTorch's fused "
            "attention is used"
        ) from error


def attach(attention: Attention, rotated: Mapping[str, RotatedLayer]) -> None:
    """Replace the attention's processor by a GSOFT processor, guarded, that keeps an xformers choice made before.

    attention: changed in place. rotated: what computes with the layer of each name in `PROJECTIONS`.
    """
    previous = attention.processor
    attention.set_processor(GSOFTAttnProcessor(rotated))
    attention.__class__ = GuardedAttention
    if isinstance(previous, XFormersAttnProcessor):
        attention.set_processor(previous)


def detach(attention: Attention, processor: Any) -> None:
    """Undo `attach`: put an ordinary processor back.

    attention: changed in place. processor: the one it had before.
    """
    attention.__class__ = Attention
    attention.set_processor(processor)


def check_supported(attention: Attention, path: str) -> None:
    """Raise UserError for an attention that the processor cannot compute correctly, or that is adapted already.

    attention: of a UNet; it is not changed. path: its name, for the message.
    """
    if isinstance(attention, GuardedAttention):
        raise UserError(f"{path}: the UNet carries a GSOFT adapter already; remove it first (adapter.remove())")
    if attention.added_kv_proj_dim is not None or attention.to_k is None or attention.to_out is None:
        raise UserError(
            f"{path}: attention with added key and value projections is not supported (Stable Diffusion is)"
        )
    if not isinstance(attention.processor, STOCK_PROCESSORS):
        name = type(attention.processor).__name__
        raise UserError(
            f"{path}: its {name} would be lost; load the GSOFT adapter before anything else changes attention"
        )
