"""A CUDA without a device: what can be known of the GPU path on a machine without a GPU.

`runtime.c` stands in for libcudart and cuBLAS and `driver.c` for the driver. Memory and copies are the host's, and
kernels do nothing. torch's allocator, streams and synchronization debug mode, Triton's driver and inductor's code
generation are real. So a trainer starts, compiles, searches for its micro-batch until memory runs out, updates,
evaluates, saves and ends, and only the numbers mean nothing.

The tests here run in a process that was started on the stand-in: `tests/end_to_end/test_gpu_stub.py` starts one in
`make test`, `make gpu-stub` runs the long ones, too. The tests marked `gpu` decide what needs a device:
DALI itself, whose static runtime refuses the stand-in, pixels, NCCL, speed, and cuDNN with its memory.
"""
