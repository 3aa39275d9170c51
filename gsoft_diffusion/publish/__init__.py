"""What others get: merged models, LoRAs, model cards, repositories on the hub."""
