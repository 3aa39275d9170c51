from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig, RobertaModel

import gsoft
from examples.language.layers import find_layers
from examples.language.methods import METHODS, ROTATIONS, Adapted, published_count

MATCHED = sorted(METHODS.keys() - {"full", "gsoft_dense"})
ROBERTA_BASE = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def adapted(config, method: str, device: str = "meta") -> Adapted:
    """A method on a model with random weights, or with none."""
    with torch.device(device):
        return Adapted(AutoModelForSequenceClassification.from_config(config), method)


def test_the_published_count_of_roberta_base():
    """Table 1 says 1.42M; the code counts the pooler, which nobody reads, and leaves the head out."""
    with torch.device("meta"):
        model = RobertaModel(ROBERTA_BASE, add_pooling_layer=True)
        config = gsoft.Config(target_modules="all-linear", **ROTATIONS["gsoft"])
        with pytest.warns(UserWarning, match="Q is not dense"):
            adapter = gsoft.inject(model, config)
    assert published_count(adapter) == 1_423_104
    pooler = 2 * 768 * 8 + 768
    assert adapted(ROBERTA_BASE, "gsoft").published == 1_423_104 - pooler
    assert adapted(ROBERTA_BASE, "gsoft").learned == 12 * (2 * 6912 * 7 // 2 + 6912)


WIDE = {"vocab_size": 64, "num_hidden_layers": 1}  # the widths of the real models, in one layer of each


@pytest.mark.parametrize(
    "config",
    [RobertaConfig(**WIDE), BertConfig(**WIDE, hidden_size=384, num_attention_heads=12, intermediate_size=1536)],
    ids=["roberta", "minilm"],
)
def test_learned_counts_are_within_ten_percent(config):
    counts = {method: adapted(config, method, "cpu").learned for method in MATCHED}
    assert max(counts.values()) <= 1.1 * min(counts.values()), counts


def test_counts_of_minilm():
    counts = {method: adapted(MINILM, method).learned for method in METHODS if method not in ("oft", "boft")}
    assert counts == {
        "full": 22_565_376,
        "lora": 165_888,
        "gsoft": 165_888,
        "double_gsoft": 165_888,
        "gsoft_dense": 270_720,
    }


TINY = BertConfig(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=3
)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_base_model_and_reaches_every_layer(method):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(TINY).eval()
    tokens = torch.randint(64, (4, 9))
    with torch.no_grad():
        before = model(tokens).logits
    encoder = find_layers(model).encoder
    made = Adapted(model, method).eval()
    torch.testing.assert_close(made(input_ids=tokens).logits, before, atol=1e-6, rtol=1e-5)
    learned = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    frozen = {name: tensor.clone() for name, tensor in made.named_parameters() if not tensor.requires_grad}
    for _ in range(2):  # one half of LoRA gets a gradient only from the second step on
        optimizer.zero_grad()
        made(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    assert [tuple(parameter.shape) for parameter in learned if not torch.count_nonzero(parameter.grad)] == []
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in made.named_parameters() if name in frozen)
    if method != "full":
        assert made.model.classifier.weight.requires_grad
        assert not made.model.bert.embeddings.word_embeddings.weight.requires_grad
        assert len(encoder) == 12
