"""The Triton kernels behind `pipelines.ops.torch_ops`: one operation on every image of a batch in one launch or two.

Affine transforms have a kernel of their own, because they compute in float64 and need more than twice the registers of
the other operations. A kernel takes for every image the registers of its hungriest operation, and the more registers a
thread takes, the fewer threads work at a time (docs/performance.md).

They are imported only where they run, so a machine without Triton needs none. They compute what the torch version does,
in the same types and order of operations; the launches forbid the compiler to contract a multiplication and an addition
into one (that rounds once instead of twice, and a truncated result may then differ).
"""

# Only Triton's compiler understands the types of tl.static_range and of the options of a launch.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

# The kinds of operation on an image.
COPY = tl.constexpr(0)
TABLE = tl.constexpr(1)
COLOR = tl.constexpr(2)
SHARPNESS = tl.constexpr(3)
AFFINE = tl.constexpr(4)

_PIXELS_PER_PROGRAM = 256


def launch(kernel, images: torch.Tensor, out: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Write what `augment` or `augment_affine` makes of images; nothing waits for the device.

    Args:
      images, out: uint8 [B, S, S, 3], contiguous, not the same memory.
      tensors: the kernel's other tensors, contiguous. The first one has an entry for each image that is written.
    """
    size = images.shape[1]
    blocks = triton.cdiv(size * size, _PIXELS_PER_PROGRAM)
    with torch.cuda.device_of(images):
        kernel[(len(tensors[0]) * blocks,)](
            images, out, *tensors, size, blocks, _PIXELS_PER_PROGRAM, enable_fp_fusion=False
        )


@triton.jit
def augment(images, out, kinds, factors, tables, size, blocks, block: tl.constexpr):
    """Write every changed image but those of AFFINE. Program i: pixels [(i % blocks) block, ...) of image i // blocks.

    kinds: int32 [B]; factors: float32 [B], for COLOR and SHARPNESS; tables: uint8 [B, 3, 256], for TABLE.
    """
    image = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = pixel < size * size
    # A batch may hold more than 2**31 values; an image does not.
    start = image.to(tl.int64) * (size * size * 3)
    source = images + start
    target = out + start + pixel * 3
    kind = tl.load(kinds + image)
    if kind == TABLE:
        _look_up(source, target, tables + image * 768, pixel, mask)
    elif kind == COLOR:
        _color(source, target, tl.load(factors + image), pixel, mask)
    elif kind == SHARPNESS:
        _sharpness(source, target, tl.load(factors + image), pixel, mask, size)
    elif kind == COPY:
        for channel in tl.static_range(3):
            tl.store(target + channel, tl.load(source + pixel * 3 + channel, mask=mask), mask=mask)


@triton.jit
def _look_up(source, target, table, pixel, mask):
    for channel in tl.static_range(3):
        value = tl.load(source + pixel * 3 + channel, mask=mask, other=0).to(tl.int32)
        tl.store(target + channel, tl.load(table + channel * 256 + value, mask=mask), mask=mask)


@triton.jit
def _color(source, target, factor, pixel, mask):
    red = tl.load(source + pixel * 3, mask=mask, other=0).to(tl.int32)
    green = tl.load(source + pixel * 3 + 1, mask=mask, other=0).to(tl.int32)
    blue = tl.load(source + pixel * 3 + 2, mask=mask, other=0).to(tl.int32)
    gray = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    tl.store(target, _blend(gray, red, factor), mask=mask)
    tl.store(target + 1, _blend(gray, green, factor), mask=mask)
    tl.store(target + 2, _blend(gray, blue, factor), mask=mask)


@triton.jit
def _sharpness(source, target, factor, pixel, mask, size):
    row = pixel // size
    column = pixel % size
    inner = mask & (row > 0) & (row < size - 1) & (column > 0) & (column < size - 1)
    for channel in tl.static_range(3):
        value = tl.load(source + pixel * 3 + channel, mask=mask, other=0).to(tl.int32)
        total = 4 * value
        for down in tl.static_range(-1, 2):
            for right in tl.static_range(-1, 2):
                neighbour = source + (pixel + down * size + right) * 3 + channel
                total += tl.load(neighbour, mask=inner, other=0).to(tl.int32)
        smooth = tl.where(inner, (2 * total + 13) // 26, value)
        tl.store(target + channel, _blend(smooth, value, factor), mask=mask)


@triton.jit
def _blend(degenerate, value, factor):
    """int32, int32, float32 -> uint8."""
    blended = degenerate.to(tl.float32) + factor * (value - degenerate).to(tl.float32)
    return _clip(blended)


@triton.jit
def _clip(value):
    """To uint8: limited to [0, 255], truncated."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.uint8)


@triton.jit
def augment_affine(images, out, rows, matrices, fill, size, blocks, block: tl.constexpr):
    """Write the images of some rows. Program i: pixels [(i % blocks) block, ...) of image rows[i // blocks].

    rows: int32 [n], n > 0; matrices: float64 [n, 6]; fill: uint8 [3], for pixels that come from outside the image.
    """
    chosen = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    mask = pixel < size * size
    start = tl.load(rows + chosen).to(tl.int64) * (size * size * 3)
    source = images + start
    target = out + start + pixel * 3
    matrix = matrices + chosen * 6
    x = (pixel % size).to(tl.float64) + 0.5
    y = (pixel // size).to(tl.float64) + 0.5
    source_x = tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)
    source_y = tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)
    inside = mask & (source_x >= 0) & (source_x < size) & (source_y >= 0) & (source_y < size)
    source_x -= 0.5
    source_y -= 0.5
    left = tl.floor(source_x)
    top = tl.floor(source_y)
    to_right = source_x - left
    to_lower = source_y - top
    # Far outside, where nothing is loaded, they need not fit into 32 bits.
    left = tl.where(inside, left, 0.0).to(tl.int32)
    top = tl.where(inside, top, 0.0).to(tl.int32)
    for channel in tl.static_range(3):
        line0 = _cubic_line(source + channel, left, top - 1, to_right, inside, size)
        line1 = _cubic_line(source + channel, left, top, to_right, inside, size)
        line2 = _cubic_line(source + channel, left, top + 1, to_right, inside, size)
        line3 = _cubic_line(source + channel, left, top + 2, to_right, inside, size)
        value = _clip(_cubic(line0, line1, line2, line3, to_lower))
        tl.store(target + channel, tl.where(inside, value, tl.load(fill + channel)), mask=mask)


@triton.jit
def _cubic_line(source, left, row, t, inside, size):
    """float64: between the pixels at `left` and left + 1 of a row, edge pixels repeated."""
    line = source + _limit(row, size) * size * 3
    v0 = tl.load(line + _limit(left - 1, size) * 3, mask=inside, other=0).to(tl.float64)
    v1 = tl.load(line + _limit(left, size) * 3, mask=inside, other=0).to(tl.float64)
    v2 = tl.load(line + _limit(left + 1, size) * 3, mask=inside, other=0).to(tl.float64)
    v3 = tl.load(line + _limit(left + 2, size) * 3, mask=inside, other=0).to(tl.float64)
    return _cubic(v0, v1, v2, v3, t)


@triton.jit
def _limit(index, size):
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def _cubic(v0, v1, v2, v3, t):
    linear = v2 - v0
    square = 2 * (v0 - v1) + v2 - v3
    cube = v1 - v0 - v2 + v3
    return v1 + t * (linear + t * (square + t * cube))


def launch_nothing() -> None:
    """Compile and launch a kernel on the current GPU. This takes a driver, a C compiler and Python.h."""
    _nothing[(1,)](torch.zeros(1, device="cuda"))


@triton.jit
def _nothing(values):
    tl.store(values, 0.0)
