"""LipConvnet: a classifier whose robustness to small changes is proven, of orthogonal convolutions (paper, §7.3)."""
