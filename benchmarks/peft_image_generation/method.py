"""GSOFT in the shape of a PEFT method: what PEFT's `run.py` and `utils.py` ask of a configuration and of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

import gsoft

PEFT_TYPE = "GSOFT"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them


class GSOFTConfig:
    """Stands for `peft.PeftConfig`.

    rotations: the library's settings.
    """

    peft_type = PEFT_TYPE

    def __init__(self, rotations: gsoft.Config) -> None:
        self.rotations = rotations

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GSOFTConfig:
        """From the folder's `adapter_config.json`. Raises ValueError if it is of another method, and ConfigError."""
        values = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
        if (kind := values.pop("peft_type", None)) != PEFT_TYPE:
            raise ValueError(f"{folder}: peft_type is {kind}; PEFT's own runner runs its methods")
        return cls(gsoft.Config.from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes into the result."""
        return {"peft_type": PEFT_TYPE} | self.rotations.to_dict()


class GSOFTModel(nn.Module):
    """Stands for `peft.PeftModel`: a model with rotations, which answers as the model does."""

    def __init__(self, model: nn.Module, config: GSOFTConfig) -> None:
        """Raises GSOFTError if the configuration does not fit the model."""
        super().__init__()
        self.model = model
        self.config_of_the_method = config
        self.adapter = gsoft.inject(model, config.rotations)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block this is the base model."""
        with self.adapter.disabled():
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        trained = self.adapter.parameter_counts()["total"]
        return trained, trained + sum(parameter.numel() for parameter in self.model.parameters())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what is trained under the name that PEFT looks for, and its configuration."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        gsoft.save(self.adapter, Path(folder) / WEIGHTS_NAME)
        text = json.dumps(self.config_of_the_method.to_dict(), indent=2)
        (Path(folder) / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def get_gsoft_model(model: nn.Module, config: GSOFTConfig, autocast_adapter_dtype: bool = True) -> GSOFTModel:
    """Stands for `peft.get_peft_model`.

    model: the base, on its device. config: of the rotations. autocast_adapter_dtype: whether what is trained is in
    float32, as in PEFT; rotations always are. Raises ValueError if it is False, and GSOFTError if the configuration
    does not fit the model.
    """
    if not autocast_adapter_dtype:
        raise ValueError("autocast_adapter_dtype is False, but rotations are float32; leave it out")
    adapted = GSOFTModel(model, config)
    return adapted.to(next(model.parameters()).device)
