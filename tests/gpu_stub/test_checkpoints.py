"""The copy of a run's state on its way from the device into a file."""

import gc

import pytest
import timm
import torch
from torch.utils._pytree import tree_leaves, tree_map

from gpu_stub.runs import built, updates
from gpu_stub.stand_in import pinned_allocations, pinned_bytes
from trainer.state import checkpoint

MIB = 1 << 20


def state_of(name: str, memory_format: torch.memory_format) -> dict:
    """What a checkpoint holds of a model: its weights four times, and a counter for each parameter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to("cuda", memory_format=memory_format)
    copies = [{key: value.clone() for key, value in model.state_dict().items()} for _ in range(4)]
    return {"copies": copies, "steps": [torch.zeros((), device="cuda") for _ in model.parameters()], "epoch": 7}


def test_a_copy_takes_few_pieces_of_pinned_memory_and_hardly_more_than_the_state():
    """torch rounds each piece up to a power of two, and pinning one takes longer than filling it."""
    state = state_of("resnet18", torch.channels_last)
    nbytes = sum(leaf.nbytes for leaf in tree_leaves(state) if torch.is_tensor(leaf))
    gc.collect()
    torch._C._host_emptyCache()
    pieces, before = pinned_allocations(), pinned_bytes()
    copies = [checkpoint.to_host(state) for _ in range(3)]
    assert 3 <= pinned_allocations() - pieces <= 3 * (nbytes // (48 * MIB) + 1)
    assert 3 * nbytes <= pinned_bytes() - before < 1.15 * 3 * nbytes
    del copies
    gc.collect()
    copy = checkpoint.to_host(state)  # from the memory of the earlier ones
    assert pinned_bytes() - before < 1.15 * 3 * nbytes
    assert checkpoint.digest_of(copy) == checkpoint.digest_of(tree_map(_on_host, state))


def _on_host(leaf):
    return leaf.cpu() if torch.is_tensor(leaf) else leaf


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_copy_is_written_as_the_state_itself_would_be(memory_format, tmp_path):
    """Values, types and strides; and a tensor's file does not hold the tensors beside it."""
    model = timm.create_model("tiny_cnn", num_classes=10).to("cuda", memory_format=memory_format)
    state = {
        **model.state_dict(),
        "half": torch.arange(5, device="cuda").to(torch.bfloat16),
        "empty": torch.empty(0, 3, device="cuda"),
        "flags": torch.tensor([True, False, True]).cuda(),
        "part": torch.tensor([[1, 2, 3], [4, 5, 6]]).cuda()[:, 1:],
        "on the host": torch.arange(3),
    }
    copy = checkpoint.to_host(state)
    torch.save(copy, tmp_path / "copy.pt")
    torch.save({key: value.cpu() for key, value in state.items()}, tmp_path / "state.pt")
    read = torch.load(tmp_path / "copy.pt", weights_only=True)
    for key, value in state.items():
        assert torch.equal(read[key], value.cpu()) and read[key].dtype == value.dtype, key
        assert read[key].stride() == torch.empty_like(value, device="cpu").stride(), key
    assert abs((tmp_path / "copy.pt").stat().st_size - (tmp_path / "state.pt").stat().st_size) < 512


def test_a_copy_does_not_change_with_the_state():
    values = torch.tensor([1.0, 2.0]).cuda()
    copy = checkpoint.to_host({"values": values})
    values.copy_(torch.tensor([3.0, 4.0]))
    assert copy["values"].tolist() == [1.0, 2.0]


def test_copying_waits_for_the_device_once(tmp_path, monkeypatch, no_host_sync):
    run = built(tmp_path / "run", {})
    run.step(iter(updates(run, 0, 1)[0]), 0)
    checkpoint.content_of(run.state)  # asks the system for pinned memory, which is a wait of its own
    waits = []
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: waits.append(stream))
    with no_host_sync():
        checkpoint.content_of(run.state)
    assert len(waits) == 1
