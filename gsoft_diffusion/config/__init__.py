"""Every setting of the project: frozen dataclasses that validate themselves and round-trip through JSON."""

from __future__ import annotations

from gsoft_diffusion.config.adapter import AdapterConfig
from gsoft_diffusion.config.app import AppConfig
from gsoft_diffusion.config.concept import Concept
from gsoft_diffusion.config.export import ExportConfig
from gsoft_diffusion.config.generation import GenerationConfig
from gsoft_diffusion.config.sampler import SamplerConfig
from gsoft_diffusion.config.training import TrainingConfig

__all__ = [
    "AdapterConfig",
    "AppConfig",
    "Concept",
    "ExportConfig",
    "GenerationConfig",
    "SamplerConfig",
    "TrainingConfig",
]
