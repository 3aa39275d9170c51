"""Scores of pictures: the encoders that compare them with photos and prompts, and the metrics."""
