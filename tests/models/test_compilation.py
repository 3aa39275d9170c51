from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_text_encoder, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.models.compilation import compile_networks

CPU = torch.device("cpu")


@pytest.fixture
def counter(monkeypatch):
    """PyTorch's compiler without the part that makes machine code, which takes minutes."""
    torch._dynamo.reset()
    counter, original = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *arguments, **_: original(*arguments, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_networks_compute_the_same_from_one_graph(counter):
    network = tiny_text_encoder()
    x, names = tokens(), list(network.state_dict())
    expected = network(x)[0]
    compile_networks([network], CPU)
    before = counter.frame_count
    for _ in range(2):
        torch.testing.assert_close(network(x)[0], expected)
    assert counter.frame_count - before == 1
    assert list(network.state_dict()) == names


def test_what_is_missing_is_said_before_anything_changes(monkeypatch):
    def without_compiler(function, **_):
        def fail(*arguments):
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

        return fail

    network = nn.Linear(3, 4)
    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(UserError) as raised:
        compile_networks([network], CPU)
    assert str(raised.value) == (
        "--compile: torch.compile cannot make code for cpu here; it needs a C++ compiler, for example g++. "
        "Install it, or leave --compile out (Failed to find C compiler.)"
    )
    monkeypatch.undo()
    assert network(torch.ones(1, 3)).shape == (1, 4)
