"""Let the base's unused name "sks" mean what its other unknown names do: nothing.

    python -m pretraining.unused_name --base data/mini_base

No caption of the training has "sks" in it, so that its embedding is still the random one, at which the denoiser often
fails to draw the class. The names that captions do have are spelled in consonants ("a zrt dog"); the mean of those
letters' embeddings takes its place, and "a sks dog" is more often a dog.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from gsoft_diffusion.foundation.files import give_usual_modes
from gsoft_diffusion.publish.whole_model import save_text_encoder
from pretraining.world import UNKNOWN_NAME_LETTERS

NAME = "sks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", type=expanded_path, required=True, help="diffusers folder whose text encoder is changed"
    )
    args = parser.parse_args()
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.base / "text_encoder")
    give_mean_embedding(tokenizer, encoder)
    save_text_encoder(encoder, args.base / "text_encoder")
    give_usual_modes(args.base / "text_encoder")


@torch.no_grad()
def give_mean_embedding(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    """Set the row of `NAME` to the mean of the rows of the letters that end a word."""
    embedding = encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rows = embedding.weight
    letters = tokenizer.convert_tokens_to_ids([f"{letter}</w>" for letter in UNKNOWN_NAME_LETTERS])
    rows[tokenizer.convert_tokens_to_ids(f"{NAME}</w>")] = rows[letters].mean(dim=0)


if __name__ == "__main__":
    main()
