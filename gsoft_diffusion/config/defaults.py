"""Defaults of settings that depend on the base model."""

from __future__ import annotations

# What a run needs follows from the base: angles of a small model's few, narrow layers have further to go.
# The paper trains no text encoder; there a tenth of the denoiser's rate is a guess.
FULL_SIZE = {"max_train_steps": 3000, "learning_rate": 2e-5, "text_encoder_lr": 2e-6}
MINIATURE = {"max_train_steps": 500, "learning_rate": 2e-4, "text_encoder_lr": 4e-6}
GUIDANCE, MINIATURE_GUIDANCE = 5.0, 3.0  # above it the miniature's shapes come apart
MINIATURE_BELOW = 128  # pixels, the side of the pictures that a base was made for
