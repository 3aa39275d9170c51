"""The base's tokenizer: CLIP's byte-pair encoding in CLIP's file layout, with a vocabulary of about a thousand tokens.

    python -m pretraining.tokenizer --work <work folder> --out <folder>

Learned from the captions and the words of `VOCABULARY_TEXTS`; whatever else a prompt says falls apart into letters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from gsoft_diffusion.config.command_line import expanded_path
from pretraining.render import scene_facts

MAX_LENGTH = 32  # tokens; the longest DreamBooth prompt has 18 words
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 700
PROMPTS = Path(__file__).parent.parent / "data" / "prompts"


def learn(texts: list[str]) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary in CLIP's order (bytes, bytes that end a word, merges, the two specials) and merges by rank."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{c}</w>" for c in alphabet]
    tokens += [a + b for a, b in merges] + [START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def save(vocabulary: dict[str, int], merges: list[Any], folder: Path) -> CLIPTokenizer:
    """Write `vocab.json` and `merges.txt`, Stable Diffusion's files, and transformers' own; returns what loads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH, pad_token=END)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=expanded_path, required=True, help="work folder of the pretraining")
    parser.add_argument("--out", type=expanded_path, required=True, help="folder to write the tokenizer to")
    args = parser.parse_args()
    captions = [facts["caption"] for facts in scene_facts(args.work)[:20_000]]
    names = "sks zwx qrs stuffed animal bowl can toy sneaker boot teapot vase sunglasses cartoon plushie photo picture"
    texts = captions + [names] * 20
    for path in sorted(PROMPTS.glob("*.txt")):
        texts += [line.replace("{0}", "sks").replace("{1}", "dog") for line in path.read_text().splitlines()] * 20
    vocabulary, merges = learn(texts)
    tokenizer = save(vocabulary, merges, args.out)
    for prompt in ("a photo of a sks dog on the beach", "a purple elephant with the Eiffel Tower in the background"):
        print(len(vocabulary), tokenizer.tokenize(prompt))


if __name__ == "__main__":
    main()
