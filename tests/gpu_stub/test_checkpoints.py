"""The copy of a run's state on its way from the device into a file."""

import pytest
import timm
import torch

from trainer.state import checkpoint


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
