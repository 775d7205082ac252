"""Codecs: how a row of logits becomes bytes, and back, on the device and without making the host wait for it."""

import dataclasses
import math
import re
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from pipelines.common.errors import UserError

_DEPTH = 20.0  # nats; classes further below the best one add nothing to a loss in float32.
_LEVELS = 255  # the largest number in a byte
_EXACT = {"fp32": torch.float32, "fp16": torch.float16}
_COMPACT_TOP = 16  # classes that `compact` stores one by one
_TAIL_LEVELS = 7  # the largest number in 3 bits
# With fewer classes topK is refused: what it leaves out is systematic. A student of 1,000 classes had 8 % more KL with
# the 50 largest, and none of that with int8.
_TOP_NEEDS = 4096
_MOST_NUMBERED = 1 << 16  # classes that two bytes can number
CODECS = ("int8", *_EXACT, "compact", "topK")


@dataclasses.dataclass(frozen=True)
class Codec:
    """One way to store a row of logits.

    Neither function can report logits that are not finite, because bytes have no NaN: a NaN may decode to any number.
    Who calls `encode` must check the logits before, as tools/record_teacher.py does. Both functions compile with
    torch.compile(fullgraph=True, dynamic=False), and `decode` returns finite or not, but never fails, for any bytes.

    Attributes:
      name: int8, fp32, fp16, compact, or topK for a number K.
      num_classes: C.
      row_bytes: bytes of an encoded row.
      encode: logits [B, C] of any floating type -> uint8 [B, row_bytes], on the logits' device.
      decode: uint8 [B, row_bytes] -> float32 [B, C]. Their softmax is that of the logits, up to the codec's error; only
        fp32 and fp16 return the logits themselves, and the others subtract a constant from each row.
      any_temperature: whether the decoded logits may be softened by a temperature other than 1.
      is_lossless: whether the decoded logits are those that a teacher computes, bit for bit.
    """

    name: str
    num_classes: int
    row_bytes: int
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    any_temperature: bool = True
    is_lossless: bool = False


def open_codec(name: str, num_classes: int) -> Codec:
    """The codec of a name, for rows of `num_classes` logits.

    Raises:
      UserError: there is no such codec, or it does not serve that many classes.
    """
    if name == "int8":
        return Codec(name, num_classes, num_classes, _encode_grid, _decode_grid)
    if name in _EXACT:
        return _exact(name, num_classes)
    top = re.fullmatch(r"top([1-9]\d{0,4})", name)
    if name != "compact" and top is None:
        raise UserError(f"codec is '{name}'; it must be one of {', '.join(CODECS)}", argument="codec")
    if num_classes > _MOST_NUMBERED:
        reason = f"it can number {_MOST_NUMBERED} classes, and there are {num_classes}. Use int8"
        raise UserError(f"codec is '{name}'; {reason}", argument="codec")
    if top is None:
        return _compact(num_classes)
    if num_classes <= _TOP_NEEDS or int(top[1]) >= num_classes:
        reason = f"topK needs more than {_TOP_NEEDS} classes, and more than K; there are {num_classes}"
        raise UserError(f"codec is '{name}'; {reason}. Use int8 or compact", argument="codec")
    return _largest(name, int(top[1]), num_classes)


def _exact(name: str, num_classes: int) -> Codec:
    """The logits in a type of their own. What float16 cannot hold becomes the largest number that it can."""
    dtype = _EXACT[name]
    largest = torch.finfo(dtype).max

    def encode(logits: torch.Tensor) -> torch.Tensor:
        return logits.float().clamp(-largest, largest).to(dtype).contiguous().view(torch.uint8)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return rows.contiguous().view(dtype).float()

    return Codec(name, num_classes, num_classes * dtype.itemsize, encode, decode, is_lossless=name == "fp32")


def _encode_grid(logits: torch.Tensor) -> torch.Tensor:
    """Distances below the best class on a grid of squares, which is fine near the best class and coarse far below it.

    An error of the distance d changes the class's probability by about exp(-d) times the error, so large distances may
    have large errors. The spacing at d grows with the square root of d.
    """
    below = _below_best(logits).clamp(max=_DEPTH)
    return (below.div(_DEPTH).sqrt() * _LEVELS).round().to(torch.uint8)


def _decode_grid(rows: torch.Tensor) -> torch.Tensor:
    return -(rows.float() * (_DEPTH**0.5 / _LEVELS)).square()


def _compact(num_classes: int) -> Codec:
    """The 16 largest logits in float16, and all others on 8 evenly spaced levels below the 16th, 3 bits each.

    The levels reach one standard deviation below the mean of the others; what is lower gets the lowest level, where the
    probabilities are smallest. Then all levels are shifted, so that the others together keep their probability: without
    that, the gradients of the largest classes had twice the error. A row is: values, classes, shift, spacing, levels.
    """
    top = min(_COMPACT_TOP, num_classes)
    num_level_bytes = -(-3 * num_classes // 8)

    def encode(logits: torch.Tensor) -> torch.Tensor:
        head, is_top, log_mass, smallest = _encode_top(logits, top)
        below = (_below_best(logits) - smallest).masked_fill(is_top, 0)
        count = max(num_classes - top, 1)
        mean = below.sum(1, keepdim=True) / count
        deviation = (below - mean).square().masked_fill(is_top, 0).sum(1, keepdim=True).div(count).sqrt()
        spacing = ((mean + deviation) / _TAIL_LEVELS).clamp(1e-3, 1e3).half()
        levels = (below / spacing.float()).round().clamp(max=_TAIL_LEVELS)
        decoded_mass = (-spacing.float() * levels).masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True)
        shift = _to_half(log_mass - decoded_mass)
        return torch.cat([head, shift.view(torch.uint8), spacing.view(torch.uint8), _pack(levels.int())], dim=1)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        shift, spacing = _halves(rows[:, 4 * top : 4 * top + 4]).unsqueeze(2).unbind(1)
        levels = _unpack(rows[:, 4 * top + 4 :], num_classes)
        return _decode_top(rows, top, shift - spacing * levels)

    return Codec("compact", num_classes, 4 * top + 4 + num_level_bytes, encode, decode)


def _largest(name: str, top: int, num_classes: int) -> Codec:
    """The K largest logits in float16. The others have equal parts of the probability that is left over.

    At another temperature their true probabilities would not add up to what equal ones do.
    """

    def encode(logits: torch.Tensor) -> torch.Tensor:
        head, _, log_mass, _ = _encode_top(logits, top)
        return torch.cat([head, _to_half(log_mass - math.log(num_classes - top)).view(torch.uint8)], dim=1)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return _decode_top(rows, top, _halves(rows[:, 4 * top :]).expand(-1, num_classes))

    return Codec(name, num_classes, 4 * top + 2, encode, decode, any_temperature=False)


def _below_best(logits: torch.Tensor) -> torch.Tensor:
    """How far each logit lies below the row's largest, in float32."""
    logits = logits.float()
    return logits.amax(1, keepdim=True) - logits


def _encode_top(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode the largest logits of each row, less the largest one.

    Returns:
      uint8 [B, 4 * top]: values in float16, then the low and the high bytes of the classes' numbers; bool [B, C], which
      classes these are; float32 [B, 1], the logarithm of the sum of exp over all others; and float32 [B, 1], how far
      the smallest of the values lies below the largest.
    """
    below = _below_best(logits)
    values, classes = below.topk(top, dim=1, largest=False)
    is_top = torch.zeros_like(below, dtype=torch.bool).scatter(1, classes, True)
    log_mass = (-below).masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True)
    numbers = [(classes >> shift & 255).to(torch.uint8) for shift in (0, 8)]
    return torch.cat([_to_half(-values).view(torch.uint8), *numbers], dim=1), is_top, log_mass, values[:, -1:]


def _decode_top(rows: torch.Tensor, top: int, others: torch.Tensor) -> torch.Tensor:
    """Put the largest logits, which rows of `_encode_top` begin with, into the others: float32 [B, C]."""
    low, high = rows[:, 2 * top : 4 * top].long().chunk(2, dim=1)
    # A class that is not there would end the process on a GPU. Only a forged file can have one.
    classes = (low | high << 8).clamp(max=others.shape[1] - 1)
    return others.scatter(1, classes, _halves(rows[:, : 2 * top]))


def _to_half(values: torch.Tensor) -> torch.Tensor:
    """Values in float16, without infinities."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half()


def _halves(rows: torch.Tensor) -> torch.Tensor:
    """The float16 numbers in bytes, as float32: [B, bytes / 2]."""
    return rows.contiguous().view(torch.float16).float()


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Numbers below 8, int32 [B, C], in 3 bits each: uint8 [B, 3 * C / 8 rounded up]."""
    num_classes = levels.shape[1]
    eights = pad(levels, (0, -num_classes % 8)).reshape(len(levels), -1, 8)
    words = (eights << torch.arange(0, 24, 3, dtype=torch.int32, device=levels.device)).sum(2, dtype=torch.int32)
    octets = torch.stack([(words >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], dim=2)
    return octets.flatten(1)[:, : -(-3 * num_classes // 8)]


def _unpack(octets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Undo `_pack`: int32 [B, C]."""
    threes = pad(octets, (0, -octets.shape[1] % 3)).reshape(len(octets), -1, 3).int()
    words = threes[:, :, 0] | threes[:, :, 1] << 8 | threes[:, :, 2] << 16
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=octets.device)
    return (words.unsqueeze(2) >> shifts & 7).flatten(1)[:, :num_classes]
