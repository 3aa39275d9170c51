"""What `import gsoft` offers, and that it needs nothing but PyTorch, NumPy and safetensors."""

from __future__ import annotations

import subprocess
import sys
from inspect import isclass, isfunction
from pathlib import Path

import pytest

import gsoft

REPOSITORY = Path(__file__).resolve().parents[2]
OTHERS = ("diffusers", "transformers", "accelerate", "peft", "gsoft_diffusion", "bitsandbytes", "yaml", "PIL")

ALONE = """
import importlib.abc, sys

class Unimportable(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others}:
            raise ModuleNotFoundError(f"{{name}} is not to be imported")

sys.meta_path.insert(0, Unimportable())
import pkgutil, gsoft, torch
for module in pkgutil.iter_modules(gsoft.__path__):
    __import__(f"gsoft.{{module.name}}")
model = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 12))
adapter = gsoft.inject(model, gsoft.Config(block_size=6))
optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
model(torch.ones(3, 12)).square().sum().backward()
optimizer.step()
trained = model(torch.ones(3, 12))
gsoft.save(adapter, {path!r})
with adapter.disabled():
    assert not torch.equal(model(torch.ones(3, 12)), trained)
adapter.remove()
again = gsoft.load({path!r}, model)
assert torch.equal(model(torch.ones(3, 12)), trained)
again.merge()
again.remove()
stack = gsoft.AdapterStack(model)
stack.load("a", {path!r})
stack.use({{"a": 1.0}})
torch.testing.assert_close(model(torch.ones(3, 12)), trained)
gsoft.orthogonal(torch.nn.Linear(12, 12), block_size=6)
gsoft.OrthogonalLinear(12, block_size=6)(torch.ones(1, 12))
print(sorted({others} & sys.modules.keys()))
"""


def test_works_where_nothing_else_can_be_imported(tmp_path):
    code = ALONE.format(others=set(OTHERS), path=str(tmp_path / "adapter.safetensors"))
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    names = set(gsoft.__all__)
    assert names <= set(dir(gsoft))
    found = [getattr(gsoft, name) for name in names]
    assert all(isclass(value) or isfunction(value) for value in found)  # a module of the name would hide it


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = gsoft.Nothing


def test_importing_it_does_not_load_pytorch():
    code = "import sys, gsoft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
