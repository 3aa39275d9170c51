"""Defaults of settings that depend on the base model."""

from __future__ import annotations

# What a run needs follows from the base: angles of a small model's few, narrow layers have further to go.
# The paper trains no text encoder; there a tenth of the denoiser's rate is a guess.
FULL_SIZE = {"max_train_steps": 3000, "learning_rate": 2e-5, "text_encoder_lr": 2e-6}
MINIATURE = {"max_train_steps": 600, "learning_rate": 2e-4, "text_encoder_lr": 4e-6}
GUIDANCE, MINIATURE_GUIDANCE = 5.0, 3.0  # with MINIATURE, by the sweep in data/README.md
MINIATURE_BELOW = 128  # pixels, the side of the pictures that a base was made for

# An adapter's blocks. With 32 of them, the paper's, the numbers grow with the square of a layer's width: that is for
# widths that give blocks of side 64 or less. Wider layers get blocks of side 64, with which two factors leave no zeros
# in a rotation of up to 64² = 4096 (paper, Theorem 2); smaller ones if the file would still be larger than LARGEST.
NBLOCKS = 32
BLOCK_SIZES = (64, 32, 16)
LARGEST = 500_000_000  # bytes
