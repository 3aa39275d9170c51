"""Several adapters on one diffusion model, each at its own strength, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from gsoft.stack import Stack
from gsoft_diffusion.adapters.file import AdapterFile, read_adapter
from gsoft_diffusion.adapters.injection import Adapter
from gsoft_diffusion.adapters.loading import check_base
from gsoft_diffusion.foundation.errors import user_errors


class AdapterStack(Stack):
    """A stack of adapters of one diffusion model, read from files that `save_adapter` wrote; see `Stack`."""

    def __init__(self, denoiser: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> None:
        """denoiser: the UNet or transformer.
        text_encoders: the CLIP text encoders, in the pipeline's order.
        """
        super().__init__()
        self._models = (denoiser, text_encoders)

    @user_errors()
    def load(self, name: str, path: str | Path, *, accept_other_base: bool = False) -> AdapterFile:
        """Read an adapter, to be used by this name.

        name: by which `use` calls it. path: as in `read_adapter`. accept_other_base: as in `load_adapter`.

        Returns what the file says. Raises UserError as `load_adapter`, or if the name is taken.
        """
        self.check_new(name)
        file = read_adapter(path)
        with self.disabled():
            check_base(file, *self._models, accept_other_base=accept_other_base)
        self.add(name, Adapter(file.config, *self._models), file.tensors)
        return file

    @user_errors()
    def use(self, strengths: Mapping[str, float]) -> None:
        """As `Stack.use`; UserError for a name that is not loaded and for a strength that is not a finite number."""
        super().use(strengths)

    def composed(self, strengths: Mapping[str, float]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """As `Stack.composed`, with the UserErrors of `use`."""
        with user_errors():
            yield from super().composed(strengths)
