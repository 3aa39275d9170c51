"""Adapters in modules whose parameters are spread over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
from plain_models import inputs, mlp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import gsoft
from gsoft import Config, GSOFTError

PROCESSES = 2


class Trained(nn.Module):
    """A model and its adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.adapter = gsoft.inject(self.net, Config(block_size=3, nfactors="dense"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def train(module: nn.Module) -> None:
    optimizer = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.1)
    for _ in range(3):
        module(inputs(5, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def spread(rank: int, kind: str, folder: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    module, path = Trained(), Path(folder, f"{rank}.safetensors")
    if kind == "fully_shard":
        fully_shard(module, mesh=init_device_mesh("cpu", (PROCESSES,)))
        train(module)
        gsoft.save(module.adapter, path)
    else:
        whole = FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
        train(whole)
        with pytest.raises(GSOFTError, match=r"0\.q_in is spread over processes \(FSDP\); gather the adapter"):
            gsoft.save(module.adapter, path)
        with FullyShardedDataParallel.summon_full_params(whole):
            gsoft.save(module.adapter, path)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_what_was_trained_in_pieces_is_saved_whole(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(spread, (kind, str(tmp_path)), nprocs=PROCESSES)
    alone = Trained()
    train(alone)
    for rank in range(PROCESSES):
        for name, tensor in gsoft.read(tmp_path / f"{rank}.safetensors").tensors.items():
            torch.testing.assert_close(tensor, alone.adapter.state_dict()[name], rtol=1e-4, atol=1e-6)
