"""The interface that training needs of an adapter, of GSOFT or of another method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from gsoft_diffusion.config import AdapterConfig


class TrainableAdapter(Protocol):
    """An `nn.Module` whose parameters are all that trains; it is in the base model already.

    Names of parameters start with `unet`, `transformer` or `text_encoder`. What has no docstring here is the module's.
    """

    @property
    def config(self) -> Any:
        """Its settings: `text_encoder` says whether it is in the text encoders too."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def parameter_counts(self) -> dict[str, int]:
        """How many numbers are trained, in each part and in `total`."""

    def orthogonality_error(self) -> float | None:
        """Largest deviation of a rotation from orthogonality; None for methods without rotations."""

    def disabled(self) -> AbstractContextManager[None]:
        """Inside the block the models are the untouched base models."""


MakeAdapter = Callable[[AdapterConfig, nn.Module, Sequence[nn.Module]], TrainableAdapter]
