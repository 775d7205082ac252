"""Codecs: how a row of logits becomes bytes, and back, on the device and without making the host wait for it."""

import dataclasses
import functools
import re
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from pipelines.common.errors import UserError

_DEPTH = 20.0  # nats; classes further below the best one add nothing to a loss in float32.
_COMPACT_TOP, _TAIL_LEVELS = 16, 7  # the classes that `compact` stores one by one, and the largest number in 3 bits
# With fewer classes topK is refused: what it leaves out is systematic. A student of 1,000 classes had 8 % more KL with
# the 50 largest, and none of that with int8.
_TOP_NEEDS = 4096
_MOST_NUMBERED = 1 << 16  # classes that two bytes can number


@dataclasses.dataclass(frozen=True)
class Codec:
    """One way to store a row of logits.

    Bytes have no NaN, so who calls `encode` checks the logits with `can_encode`. All functions compile with
    torch.compile(fullgraph=True, dynamic=False), and `decode` never fails, whatever the bytes are.

    Attributes:
      name: int8, fp32, fp16, compact, or topK for a number K.
      row_bytes: bytes of an encoded row.
      encode: logits [B, C] of any floating type -> uint8 [B, row_bytes], on the logits' device.
      decode: uint8 [B, row_bytes] -> float32 [B, C] with the logits' softmax, up to the codec's error. All but fp32 and
        fp16 subtract a constant from each row.
      any_temperature: whether the decoded logits may be softened by a temperature other than 1.
      largest: the largest absolute value of a logit that it can store.
    """

    name: str
    row_bytes: int
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    any_temperature: bool = True
    largest: float = torch.finfo(torch.float32).max

    def can_encode(self, logits: torch.Tensor) -> torch.Tensor:
        """Which rows have only finite logits of at most `largest`: [B, C] of any floating type -> bool [B]."""
        return (logits.float().abs() <= self.largest).all(1)

    @property
    def refused(self) -> str:
        """What logits are that it cannot encode, for messages."""
        return f"not finite or beyond {self.largest:,.0f}" if self.name == "fp16" else "not finite"


def open_codec(name: str, num_classes: int) -> Codec:
    """The codec of a name, for rows of `num_classes` logits.

    Raises:
      UserError: there is no such codec, or it does not serve that many classes.
    """
    reason, top = "", re.fullmatch(r"top([1-9]\d{0,4})", name)
    if top is None and name not in _BY_NAME:
        reason = f"it must be one of {', '.join([*_BY_NAME, 'topK'])}"
    elif (top or name == "compact") and num_classes > _MOST_NUMBERED:
        reason = f"it can number {_MOST_NUMBERED} classes, and there are {num_classes}. Use int8"
    elif top and (num_classes <= _TOP_NEEDS or int(top[1]) >= num_classes):
        needs = f"topK needs more than {_TOP_NEEDS} classes, and more than K"
        reason = f"{needs}; there are {num_classes}. Use int8 or compact"
    if reason:
        raise UserError(f"codec is '{name}'; {reason}", argument="codec")
    return _largest(name, int(top[1]), num_classes, has_levels=False) if top else _BY_NAME[name](name, num_classes)


def _floating(dtype: torch.dtype, name: str, num_classes: int) -> Codec:
    """The logits themselves, rounded to a floating type."""
    encode, decode = functools.partial(_octets, dtype=dtype), functools.partial(_floats, dtype=dtype)
    return Codec(name, num_classes * dtype.itemsize, encode, decode, largest=torch.finfo(dtype).max)


def _encode_grid(logits: torch.Tensor) -> torch.Tensor:
    """Distances below the best class on a grid of squares, which is fine near the best class and coarse far below it.

    An error of a distance d changes the class's probability by about exp(-d) times the error, so large distances may
    have large errors.
    """
    return (_below_best(logits).clamp(max=_DEPTH).div(_DEPTH).sqrt() * 255).round().to(torch.uint8)


def _decode_grid(rows: torch.Tensor) -> torch.Tensor:
    return -(rows.float() * (_DEPTH**0.5 / 255)).square()


def _largest(name: str, top: int, num_classes: int, *, has_levels: bool) -> Codec:
    """The largest logits in float16, less the best one; all others together keep their probability.

    A row has values, low and high bytes of the classes' numbers, and the shift, which is the others' logit. That holds
    for temperature 1 alone. With `has_levels` the others lie on 8 evenly spaced levels below the shift, and a row ends
    with the spacing and 3 bits for each class. The levels reach one standard deviation below the others' mean; what is
    lower gets the lowest level, where probabilities are smallest.
    """
    num_others, end_of_top = max(num_classes - top, 1), 4 * top

    def encode(logits: torch.Tensor) -> torch.Tensor:
        below = _below_best(logits)
        values, classes = below.topk(top, dim=1, largest=False)
        is_top = torch.zeros_like(below, dtype=torch.bool).scatter(1, classes, True)
        tail, decoded = [], torch.zeros_like(below)
        if has_levels:
            further = (below - values[:, -1:]).masked_fill(is_top, 0)
            mean = further.sum(1, keepdim=True) / num_others
            deviation = (further - mean).square().masked_fill(is_top, 0).sum(1, keepdim=True).div(num_others).sqrt()
            spacing = ((mean + deviation) / _TAIL_LEVELS).clamp(1e-3, 1e3).half()
            levels = (further / spacing.float()).round().clamp(max=_TAIL_LEVELS)
            tail, decoded = [_octets(spacing), _pack(levels.int())], spacing.float() * levels
        mass, own = ((-each).masked_fill(is_top, -torch.inf).logsumexp(1, keepdim=True) for each in (below, decoded))
        numbers = [(classes >> bits & 255).to(torch.uint8) for bits in (0, 8)]
        return torch.cat([_octets(-values), *numbers, _octets(mass - own), *tail], dim=1)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        low, high = rows[:, 2 * top : end_of_top].long().chunk(2, dim=1)
        # A class that is not there would end the process on a GPU. Only a forged file can have one.
        classes = (low | high << 8).clamp(max=num_classes - 1)
        others = _floats(rows[:, end_of_top : end_of_top + 2]).expand(-1, num_classes)
        if has_levels:
            spacing = _floats(rows[:, end_of_top + 2 : end_of_top + 4])
            others = others - spacing * _unpack(rows[:, end_of_top + 4 :], num_classes)
        return others.scatter(1, classes, _floats(rows[:, : 2 * top]))

    row_bytes = end_of_top + (4 + -(-3 * num_classes // 8) if has_levels else 2)
    return Codec(name, row_bytes, encode, decode, any_temperature=has_levels)


def _below_best(logits: torch.Tensor) -> torch.Tensor:
    """How far each logit lies below the row's largest, in float32."""
    logits = logits.float()
    return logits.amax(1, keepdim=True) - logits


def _octets(values: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """The bytes of values in a floating type: uint8. What the type cannot hold becomes the largest that it can."""
    largest = torch.finfo(dtype).max
    return values.float().clamp(-largest, largest).to(dtype).contiguous().view(torch.uint8)


def _floats(octets: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Undo `_octets`, in float32."""
    return octets.contiguous().view(dtype).float()


def _pack(levels: torch.Tensor) -> torch.Tensor:
    """Numbers below 8, int32 [B, C], in 3 bits each: uint8 [B, 3 * C / 8 rounded up]."""
    eights = pad(levels, (0, -levels.shape[1] % 8)).unflatten(1, (-1, 8))
    words = (eights << torch.arange(0, 24, 3, dtype=torch.int32, device=levels.device)).sum(2, dtype=torch.int32)
    octets = torch.stack([(words >> shift & 255).to(torch.uint8) for shift in (0, 8, 16)], dim=2).flatten(1)
    return octets[:, : -(-3 * levels.shape[1] // 8)]


def _unpack(octets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Undo `_pack`: int32 [B, C]."""
    low, middle, high = pad(octets, (0, -octets.shape[1] % 3)).int().unflatten(1, (-1, 3)).unbind(2)
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=octets.device)
    return ((low | middle << 8 | high << 16).unsqueeze(2) >> shifts & 7).flatten(1)[:, :num_classes]


def _compact(name: str, num_classes: int) -> Codec:
    return _largest(name, min(_COMPACT_TOP, num_classes), num_classes, has_levels=True)


_BY_NAME: dict[str, Callable[[str, int], Codec]] = {
    "int8": lambda name, num_classes: Codec(name, num_classes, _encode_grid, _decode_grid),
    "fp32": functools.partial(_floating, torch.float32),
    "fp16": functools.partial(_floating, torch.float16),
    "compact": _compact,
}
