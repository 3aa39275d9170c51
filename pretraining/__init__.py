"""The scripts that made the miniature base and the miniature encoders, in `data/`."""

import gsoft_diffusion  # noqa: F401 - before diffusers: it sees to it that torchvision can be imported
