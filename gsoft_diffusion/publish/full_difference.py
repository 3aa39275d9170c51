"""An adapter's change of the weights as it is, `W' − W` of every layer, for programs that add such differences."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gsoft.linear_slice import AnyLinear, LinearSlice, whole_of
from gsoft_diffusion.adapters.stack import AdapterStack
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.tensor_stream import TensorStream
from gsoft_diffusion.models.families import BaseModel
from gsoft_diffusion.publish.approximation import Approximation
from gsoft_diffusion.publish.layer_names import matrix_path, module_path
from gsoft_diffusion.publish.tensor_files import rounded


def write_differences(
    place: Path,
    model: BaseModel,
    stack: AdapterStack,
    strengths: Mapping[str, float],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[Approximation]:
    """Write the change of every layer that the adapters are on, one layer at a time. Prints the file's size before.

    place: the file's path. model: the base model. stack: with no adapter in use. strengths: of the adapters to combine,
    by their names in the stack. dtype: of the file, one of `TensorStream`. metadata: texts by name.

    Returns how near each layer comes. Raises UserError if the disk is too full or a number does not fit.
    """
    linears = stack.layers(strengths)
    shapes = {difference_name(model, name, linear): _shape(linear) for name, linear in linears.items()}
    stream = TensorStream(shapes, dtype, metadata)
    free = shutil.disk_usage(place.parent).free
    print(f"writing {stream.size / 1e6:,.1f} MB", flush=True)
    if stream.size > free:
        raise UserError(
            f"--format diff: its file takes {stream.size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free in "
            f"{place.parent}; make room, or choose another disk with --output"
        )
    layers: list[Approximation] = []

    def differences() -> Iterator[tuple[str, Tensor]]:
        composed = stack.composed(strengths)
        for name, weight, rotated in tqdm(composed, desc="differences", unit="layer", total=len(linears)):
            change = rotated - weight
            written = rounded(name, change, dtype)
            lost = change - written.float()
            layers.append(Approximation(name, *(matrix.norm().item() for matrix in (weight, change, lost))))
            linear = linears[name]
            yield difference_name(model, name, linear), _among_columns(linear, written)

    stream.write(place, differences())
    return layers


def difference_name(model: BaseModel, layer: str, linear: AnyLinear) -> str:
    """What programs call the difference of a layer: in a UNet as kohya does, in a transformer as diffusers.

    Rows of a fused matrix have names of their own, as if they were a layer; for columns it is the matrix's.

    model: the base model. layer: its name in the adapter. linear: the model's layer.
    """
    path = matrix_path(layer, linear) if _is_columns(linear) else module_path(layer)
    name = model.kohya_place(path)[0] if isinstance(model.denoiser, UNet2DConditionModel) else path
    return f"{name}.diff"


def _is_columns(linear: AnyLinear) -> bool:
    return isinstance(linear, LinearSlice) and linear.dim == 1


def _shape(linear: AnyLinear) -> tuple[int, ...]:
    """Of a layer's difference in the file: of columns it is that of the whole matrix."""
    return tuple(whole_of(linear).weight.shape if _is_columns(linear) else linear.weight.shape)


def _among_columns(linear: AnyLinear, change: Tensor) -> Tensor:
    """The change of columns with zeros for the matrix's other columns; the change of anything else as it is."""
    if not isinstance(linear, LinearSlice) or linear.dim == 0:
        return change
    return F.pad(change, (linear.start, linear.whole.in_features - linear.start - linear.length))
