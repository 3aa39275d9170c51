"""What a training step and a picture cost, in time and memory."""

import gsoft_diffusion  # noqa: F401 - before diffusers: it sees to it that torchvision can be imported
