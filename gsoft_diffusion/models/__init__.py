"""Base models: their families, loading, quantisation, noise. Nothing here knows of adapters."""
