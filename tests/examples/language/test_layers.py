from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    RobertaModel,
)

from examples.language.layers import find_layers
from gsoft_diffusion.foundation.errors import UserError

SMALL = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


CONFIGS = {
    "bert": (BertConfig(**SMALL), ("bert.pooler", "classifier")),
    "roberta": (RobertaConfig(**SMALL), ("classifier",)),
    "distilbert": (
        DistilBertConfig(vocab_size=64, dim=48, n_layers=2, n_heads=4, hidden_dim=96),
        ("pre_classifier", "classifier"),
    ),
    "electra": (ElectraConfig(**SMALL, embedding_size=48), ("classifier",)),
    "deberta": (DebertaV2Config(**SMALL, pooler_hidden_size=48), ("pooler", "classifier")),
    "modernbert": (ModernBertConfig(**SMALL, pad_token_id=0), ("head", "classifier")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_encoder_is_adapted_and_the_head_is_trained(name):
    config, head = CONFIGS[name]
    model = model_of(config)
    layers = find_layers(model)
    body = f"{model.base_model_prefix}."
    linears = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert layers.head == head
    assert layers.dead == ()
    assert set(layers.encoder) == {path for path in linears if path.startswith(body) and ".pooler" not in path}
    assert len(layers.encoder) >= 8


def test_a_pooler_that_nobody_reads_is_dead():
    model = model_of(RobertaConfig(**SMALL))
    model.roberta = RobertaModel(model.config, add_pooling_layer=True)  # as in the paper's code
    layers = find_layers(model)
    assert layers.dead == ("roberta.pooler.dense",)
    assert layers.head == ("classifier",)
    assert not any("pooler" in path for path in layers.encoder)


def test_the_model_is_left_as_it_is():
    model = model_of(BertConfig(**SMALL)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_layers(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_a_head_is_refused():
    with pytest.raises(UserError, match="BertModel is no encoder with a head"):
        find_layers(BertModel(BertConfig(**SMALL)))
