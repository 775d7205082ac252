"""The number formats of forward passes and of what stays in float32."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the forward passes; auto is bf16 on GPUs that have it, fp16 on others, fp32 on CPUs."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def allow_tf32(allowed: bool) -> None:
    """Set whether GPUs may round the factors of float32 matrix products and convolutions to TensorFloat-32."""
    # Setting fp32_precision, which PyTorch 2.9 and newer have, would make reading these two settings an error, and
    # torch.compile reads them (pytorch/pytorch#166387).
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
