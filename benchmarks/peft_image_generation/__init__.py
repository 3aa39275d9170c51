"""GSOFT in PEFT's public comparison of methods on image generation, beside the methods of PEFT."""
