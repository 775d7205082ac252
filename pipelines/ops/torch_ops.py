"""RandAugment's operations, and Gaussian blur, on a batch of pixels that lies on the device.

Every operation gives the pixels of its PIL function in `pipelines.ops.pil_ops`, to the last bit: where PIL computes
in float32 or float64 and truncates, this computes in the same type and order and truncates; a quotient that PIL rounds
is computed from integers where that gives the same. The readable version in torch is the reference on every device; on
the GPU two Triton kernels (`pipelines.ops.triton_ops`), one for affine transforms, do a layer of operations at once.

The host knows each row's operations from the plan, so nothing here waits for the device.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from pipelines.ops.torch_blur import blur, box_weights
from pipelines.plan.draws import Op

Fill = tuple[int, int, int]
_Matrix = tuple[float, float, float, float, float, float]
_VALUES = np.arange(256)


def apply_ops(
    images: torch.Tensor, ops: np.ndarray, args: np.ndarray, fill: Fill, *, kernel: bool | None = None
) -> torch.Tensor:
    """Each row's operations, one column of `ops` after the other.

    Args:
      images: uint8 [B, S, S, 3], on any device; not changed.
      ops: uint8 [B, L] on the host, values of `Op`.
      args: float32 [B, L] on the host, the argument of each as `Op` describes it.
      fill: RGB colour that rotating, shearing and shifting leave where no pixel comes from.
      kernel: the Triton kernel (True) or torch (False); None takes the kernel on CUDA if Triton works there.
    Returns:
      uint8 [B, S, S, 3], a tensor of its own on the device of `images`.
    """
    if kernel is None:
        kernel = images.is_cuda and not kernel_error()
    args = args.astype(np.float32)
    if not ops.any():
        return images.clone(memory_format=torch.contiguous_format)
    layer = _kernel_layer if kernel else _torch_layer
    images = images.contiguous()
    for column in np.flatnonzero(ops.any(axis=0)).tolist():
        images = layer(images, ops[:, column], args[:, column], fill)
    return images


def erase(images: torch.Tensor, boxes: np.ndarray, fill: Fill) -> torch.Tensor:
    """Random erasing: one box of each image becomes the fill colour.

    Args:
      images: uint8 [B, S, S, 3]; not changed.
      boxes: int32 [B, 4] on the host: top, left, height, width in pixels. An empty box erases nothing.
    Returns:
      uint8 [B, S, S, 3], a tensor of its own on the device of `images`.
    """
    top, left, height, width = _to_device(boxes.astype(np.int32), images.device).T[..., None]
    row = torch.arange(images.shape[1], device=images.device)
    column = torch.arange(images.shape[2], device=images.device)
    # The shape of both is [B, S].
    rows, columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    return torch.where((rows[:, :, None] & columns[:, None, :])[..., None], _colour(fill, images.device), images)


@functools.cache
def kernel_error() -> str:
    """Why Triton's kernels do not run on the current GPU, "" if they do. One is run to find out."""
    try:
        from pipelines.ops.triton_ops import launch_nothing

        launch_nothing()
    except Exception as error:  # Missing Triton, drivers, C compilers or Python.h lead to various errors.
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device. To a GPU it goes from pinned memory, so that the host does not wait for it."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _colour(fill: Fill, device: torch.device) -> torch.Tensor:
    return _to_device(np.array(fill, dtype=np.uint8), device)


def _torch_layer(images: torch.Tensor, ops: np.ndarray, args: np.ndarray, fill: Fill) -> torch.Tensor:
    """One operation a row, into a new tensor. The rows of an operation are taken out, changed together and put back."""
    out = images.clone()
    for op in np.unique(ops[ops != Op.NONE]).tolist():
        chosen = np.flatnonzero(ops == op)
        rows = _to_device(chosen, images.device)
        out.index_copy_(0, rows, _FUNCTIONS[op](images.index_select(0, rows), args[chosen], fill))
    return out


def _kernel_layer(images: torch.Tensor, ops: np.ndarray, args: np.ndarray, fill: Fill) -> torch.Tensor:
    """The same by the Triton kernels, in one launch or two, into a new tensor; torch blurs."""
    from pipelines.ops import triton_ops as kernel

    device, out = images.device, torch.empty_like(images)
    kind_of = {
        **dict.fromkeys([*_TABLES, *_PIXEL_TABLES], kernel.TABLE),
        **dict.fromkeys(_MATRICES, kernel.AFFINE),
        Op.COLOR: kernel.COLOR,
        Op.SHARPNESS: kernel.SHARPNESS,
    }
    kinds = np.array([kind_of.get(op, kernel.COPY).value for op in ops.tolist()], dtype=np.int32)
    factors, tables = _to_device(args, device), _all_tables(images, ops, args)
    kernel.launch(kernel.augment, images, out, _to_device(kinds, device), factors, tables)
    affine = np.flatnonzero(kinds == kernel.AFFINE.value)
    if len(affine):
        matrices = _host_matrices(ops[affine], args[affine], images.shape[1])
        rows, matrices = _to_device(affine.astype(np.int32), device), _to_device(matrices, device)
        kernel.launch(kernel.augment_affine, images, out, rows, matrices, _colour(fill, device))
    blurred = np.flatnonzero(ops == Op.GAUSSIAN_BLUR)
    if len(blurred):
        rows = _to_device(blurred, device)
        out.index_copy_(0, rows, _gaussian_blur(images.index_select(0, rows), args[blurred], fill))
    return out


def _all_tables(images: torch.Tensor, ops: np.ndarray, args: np.ndarray) -> torch.Tensor:
    """The table of each row, uint8 [B, 3, 256]; rows whose operation has none hold nothing of meaning."""
    known = np.zeros((len(ops), 256), dtype=np.uint8)
    for op in _TABLES:
        known[ops == op] = _TABLES[op](args[ops == op, None]).astype(np.uint8)
    tables = _to_device(known, images.device)[:, None, :].repeat(1, 3, 1)
    for op, function in _PIXEL_TABLES.items():
        chosen = np.flatnonzero(ops == op)
        if len(chosen):
            rows = _to_device(chosen, images.device)
            tables.index_copy_(0, rows, function(images.index_select(0, rows), args[chosen]))
    return tables


# --- tables: operations that map each value, whatever the pixels are ---
# Each function takes arguments, float32 [n, 1], and returns integers [n, 256] in [0, 255].


def _invert(args: np.ndarray) -> np.ndarray:
    return np.broadcast_to(255 - _VALUES, (len(args), 256))


def _posterize(bits: np.ndarray) -> np.ndarray:
    return _VALUES & -(1 << np.maximum(8 - bits.astype(np.int64), 0))


def _solarize(threshold: np.ndarray) -> np.ndarray:
    return np.where(threshold.astype(np.int64) > _VALUES, _VALUES, 255 - _VALUES)


def _solarize_add(add: np.ndarray) -> np.ndarray:
    return np.where(_VALUES < 128, (_VALUES + add.astype(np.int64)).clip(0, 255), _VALUES)


def _brightness(factor: np.ndarray) -> np.ndarray:
    return (factor * _VALUES.astype(np.float32)).clip(0, 255)  # This blends with black; storing truncates.


_TABLES: dict[Op, Callable[[np.ndarray], np.ndarray]] = {
    Op.INVERT: _invert,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.BRIGHTNESS: _brightness,
}


# --- tables that are made from the pixels ---
# Each function takes images, uint8 [n, S, S, 3], and arguments, float32 [n], and returns uint8 [n, 3, 256].


def _auto_contrast(images: torch.Tensor, args: np.ndarray) -> torch.Tensor:
    """Source: PIL.ImageOps.autocontrast, in Python's float64."""
    # The shape of both is [n, 3, 1].
    low = images.amin((1, 2))[..., None].to(torch.float64)
    high = images.amax((1, 2))[..., None].to(torch.float64)
    values = torch.arange(256, dtype=torch.float64, device=images.device)
    # torch computes `255.0 / tensor` as 255 times the reciprocal, which is rounded twice.
    scale = torch.full_like(low, 255.0) / (high - low)  # This is inf for a constant channel, which is not changed.
    offset = -low * scale
    return torch.where(high > low, values * scale + offset, values).clamp(0, 255).to(torch.uint8)


def _equalize(images: torch.Tensor, args: np.ndarray) -> torch.Tensor:
    """Source: PIL.ImageOps.equalize."""
    counts = _histograms(images)
    highest = images.amax((1, 2))[..., None].long()
    # The counts of the highest value do not belong to the step, which is [n, 3, 1].
    step = (images.shape[1] * images.shape[2] - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    values = torch.arange(256, device=images.device)
    table = (step // 2 + below) // step.clamp(min=1)
    # The step is 0 where there is only one value, or hardly another one.
    return torch.where(step > 0, table, values).clamp(max=255).to(torch.uint8)


def _histograms(images: torch.Tensor) -> torch.Tensor:
    """int64 [n, 3, 256]."""
    channels = 256 * torch.arange(3, device=images.device)
    index = (images + channels).reshape(len(images), -1)
    counts = torch.zeros(len(images), 3 * 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(1, index, torch.ones_like(index)).reshape(-1, 3, 256)


def _contrast(images: torch.Tensor, args: np.ndarray) -> torch.Tensor:
    """Source: PIL.ImageEnhance.Contrast: a blend with the mean brightness, rounded half up."""
    pixels = images.shape[1] * images.shape[2]
    mean = (2 * _gray(images).sum((1, 2), dtype=torch.int64) + pixels) // (2 * pixels)
    values = torch.arange(256, device=images.device)
    # The shape is [n, 256].
    table = _blend(mean[:, None], values, _to_device(args[:, None], images.device))
    return table[:, None, :].expand(-1, 3, -1)


_PIXEL_TABLES: dict[Op, Callable[[torch.Tensor, np.ndarray], torch.Tensor]] = {
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.CONTRAST: _contrast,
}


def _through_table(op: Op, images: torch.Tensor, args: np.ndarray, fill: Fill) -> torch.Tensor:
    tables = _all_tables(images, np.full(len(args), op), args)
    channels = 256 * torch.arange(3, device=images.device)
    index = (images + channels).reshape(len(images), -1)
    return tables.reshape(len(images), -1).gather(1, index).reshape(images.shape)


# --- blends with an image made from the pixels ---


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """uint8; factor 0 gives `degenerate`, 1 gives `images`. Source: PIL.Image.blend, float32 and truncated."""
    blended = degenerate + factor * (images - degenerate).to(torch.float32)
    return blended.clamp(0, 255).to(torch.uint8)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """int32 [n, S, S]. Source: PIL's convert('L'): ITU-R 601-2 luma in 16 bits, rounded."""
    red, green, blue = images.to(torch.int32).unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _color(images: torch.Tensor, args: np.ndarray, fill: Fill) -> torch.Tensor:
    """Source: PIL.ImageEnhance.Color: a blend with the gray image."""
    return _blend(_gray(images)[..., None], images.to(torch.int32), _per_image(args, images.device))


def _sharpness(images: torch.Tensor, args: np.ndarray, fill: Fill) -> torch.Tensor:
    """Source: PIL.ImageEnhance.Sharpness: a blend with the smoothed image."""
    images = images.to(torch.int32)
    return _blend(_smooth(images), images, _per_image(args, images.device))


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """int32 [n, S, S, 3]: weights 1 and, in the middle, 5 of 13; the border stays.

    Source: PIL.ImageFilter.SMOOTH, rounded half up. PIL sums float32; an odd number of 26ths is never near a whole
    number, so integers give the same.
    """
    smooth = images.clone()
    size = images.shape[1]
    if size < 3:
        return smooth
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * images[:, 1:-1, 1:-1]
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


def _per_image(args: np.ndarray, device: torch.device) -> torch.Tensor:
    return _to_device(args, device)[:, None, None, None]


# --- affine transforms ---
# Each function takes an argument and the size in pixels, and returns a matrix (a, b, c, d, e, f): the pixel at (x, y)
# comes from (a x + b y + c, d x + e y + f).


def _rotate(degrees: float, size: int) -> _Matrix:
    """About the centre. Source: PIL.Image.rotate; its short cuts for right angles give the same pixels."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    centre = size / 2
    return cos, sin, cos * -centre + sin * -centre + centre, -sin, cos, -sin * -centre + cos * -centre + centre


_MATRICES: dict[Op, Callable[[float, int], _Matrix]] = {
    Op.ROTATE: _rotate,
    Op.SHEAR_X: lambda factor, size: (1, factor, 0, 0, 1, 0),
    Op.SHEAR_Y: lambda factor, size: (1, 0, 0, factor, 1, 0),
    Op.TRANSLATE_X: lambda fraction, size: (1, 0, fraction * size, 0, 1, 0),
    Op.TRANSLATE_Y: lambda fraction, size: (1, 0, 0, 0, 1, fraction * size),
}


def _host_matrices(ops: np.ndarray, args: np.ndarray, size: int) -> np.ndarray:
    """float64 [n, 6], of operations in _MATRICES."""
    rows = zip(ops.tolist(), args.tolist(), strict=True)
    return np.array([_MATRICES[op](arg, size) for op, arg in rows], dtype=np.float64)


def _transform(op: Op, images: torch.Tensor, args: np.ndarray, fill: Fill) -> torch.Tensor:
    matrices = _host_matrices(np.full(len(args), op), args, images.shape[1])
    return _affine(images, _to_device(matrices, images.device), _colour(fill, images.device))


def _affine(images: torch.Tensor, matrices: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Bicubic resampling at the centres of the pixels, edge pixels repeated, truncated.

    Args:
      matrices: float64 [n, 6].
      colour: uint8 [3], for pixels that come from outside.
    Source: PIL.Image.transform, which computes in float64.
    """
    size = images.shape[1]
    centre = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5
    x, y = centre, centre[:, None]
    # Each of them is [n, 1, 1].
    a, b, c, d, e, f = matrices.T[..., None, None]
    source_x, source_y = a * x + b * y + c, d * x + e * y + f
    inside = (source_x >= 0) & (source_x < size) & (source_y >= 0) & (source_y < size)
    source_x, source_y = source_x - 0.5, source_y - 0.5
    left, top = source_x.floor(), source_y.floor()
    to_right, to_lower = (source_x - left)[:, None], (source_y - top)[:, None]
    columns = [(left.long() + i).clamp(0, size - 1) for i in range(-1, 3)]
    lines = [size * (top.long() + i).clamp(0, size - 1) for i in range(-1, 3)]
    # The shape is [n, 3, S * S]: separate channels are twice as fast on the CPU. Float32 holds whole numbers exactly.
    planes = images.permute(0, 3, 1, 2).flatten(2).to(torch.float32)

    def tap(line: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return planes.gather(2, (line + column).flatten(1)[:, None].expand(-1, 3, -1)).reshape(-1, 3, size, size)

    def across(line: torch.Tensor) -> torch.Tensor:
        v0, v1, v2, v3 = (tap(line, column) for column in columns)
        return _cubic(v0, v1, v2, v3, to_right)

    v0, v1, v2, v3 = (across(line) for line in lines)
    resampled = _cubic(v0, v1, v2, v3, to_lower).clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], resampled, colour[:, None, None]).permute(0, 2, 3, 1)


def _cubic(v0: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor, v3: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Float64 between v1 (t = 0) and v2 (t = 1). Source: PIL's cubic, a = -1, in its order of operations."""
    linear = v2 - v0
    square = 2 * (v0 - v1) + v2 - v3
    cube = v1 - v0 - v2 + v3
    return v1 + t * (linear + t * (square + t * cube))


def _gaussian_blur(images: torch.Tensor, args: np.ndarray, fill: Fill) -> torch.Tensor:
    return blur(images, _to_device(box_weights(args), images.device))


# Each function takes images [n, S, S, 3], arguments [n] and the fill colour, and returns images.
_FUNCTIONS: dict[Op, Callable[[torch.Tensor, np.ndarray, Fill], torch.Tensor]] = {
    **{op: functools.partial(_through_table, op) for op in (*_TABLES, *_PIXEL_TABLES)},
    **{op: functools.partial(_transform, op) for op in _MATRICES},
    Op.COLOR: _color,
    Op.SHARPNESS: _sharpness,
    Op.GAUSSIAN_BLUR: _gaussian_blur,
}
