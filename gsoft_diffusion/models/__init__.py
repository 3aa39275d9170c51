"""Base models: their families, loading, quantisation, noise, and which of their layers an adapter may be on.

Nothing here knows how adapters are made.
"""
