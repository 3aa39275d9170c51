"""Scores for subject-driven generation, and the comparison of GSOFT with LoRA, BOFT, OFT and full fine-tuning."""

import gsoft_diffusion  # noqa: F401 - before transformers and open_clip: it sees to it that torchvision can be imported
