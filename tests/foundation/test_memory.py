from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from gsoft_diffusion.foundation import memory
from gsoft_diffusion.foundation.errors import UserError
from gsoft_diffusion.foundation.memory import check_weights, free_memory, is_apart, running_out_explained, waits_not


def test_weights_are_counted_in_the_type_they_will_have(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10, 10), "b": torch.zeros(5), "model_ema.a": torch.zeros(10, 10)}, path)
    monkeypatch.setattr(memory, "free_memory", lambda device: 210)
    check_weights("m", [(path, torch.bfloat16)], "cpu", "")
    with pytest.raises(UserError, match=r"not enough memory for m: its weights alone take 0\.00 GB.*programs$"):
        check_weights("m", [(path, torch.float32)], "cpu", "")
    with pytest.raises(UserError, match=r"end other programs, or give --this$"):
        check_weights("m", [(path, torch.float32)], "cpu", "--this")
    check_weights("m", [(tmp_path / "missing.safetensors", torch.float32)], "cpu", "")  # for loading to find


@pytest.mark.parametrize(("limit", "free"), [("1000", 930), ("max", None), (None, None)])
def test_a_containers_limit_counts(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 5_000}))
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("100\n")
        (tmp_path / "memory.stat").write_text("anon 60\ninactive_file 20\nactive_file 10\nshmem 10\n")
    assert free_memory(torch.device("cpu")) == (free or 5_000)


def test_apples_gpus_share_the_main_memory_and_say_in_words_that_it_is_full():
    assert [is_apart(torch.device(name)) for name in ("cpu", "mps", "cuda")] == [False, False, True]
    assert [waits_not(torch.device(name)) for name in ("cpu", "mps", "cuda")] == [False, False, True]
    with pytest.raises(UserError, match=r"out of memory.*; rest"), running_out_explained("rest"):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)")


def test_running_out_is_explained():
    with (
        pytest.raises(UserError, match=r"out of memory \(.*\); draw smaller pictures"),
        running_out_explained("draw smaller pictures"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"), running_out_explained("draw smaller pictures"):
        torch.zeros(2) + torch.zeros(3)
