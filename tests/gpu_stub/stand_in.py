"""What the stand-in counted in this process, and memory that is taken as DALI takes it: outside of torch."""

import ctypes
import os


def triton_launches() -> int:
    """Kernels launched through the driver."""
    return _number(ctypes.CDLL("libcuda.so.1").stub_driver_launches, ctypes.c_long)


class DeviceMemory:
    """Bytes of the device, until it is collected. Where there is not as much, a RuntimeError, as DALI's."""

    def __init__(self, nbytes: int):
        self._pointer = ctypes.c_void_p()
        if _runtime().cudaMalloc(ctypes.byref(self._pointer), ctypes.c_size_t(nbytes)):
            _runtime().cudaGetLastError()
            raise RuntimeError(f"{nbytes >> 20} MiB of the device: out of memory")

    def __del__(self):
        _runtime().cudaFree(self._pointer)


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["CUDA_STUB"])


def _number(function, kind) -> int:
    function.restype = kind
    return function()
