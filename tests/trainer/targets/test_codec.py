"""Codecs: what a row of logits loses on its way through bytes, for logits as a teacher of 1,000 classes has them."""

import numpy as np
import pytest
import torch

from pipelines.common.errors import UserError
from trainer.targets.codec import open_codec
from trainer.update.compiler import why_not

NAMES = ("int8", "fp32", "fp16", "compact")
# Mean KL, and the error of one row's gradient and of the mean gradient of 1,024 rows, relative to these gradients.
BOUNDS = {
    "fp32": (0, 0, 0),
    "fp16": (2e-6, 0.004, 0.003),
    "int8": (2e-4, 0.01, 0.007),
    "compact": (2e-2, 0.03, 0.02),
}
BYTES = {"int8": 1000, "fp16": 2000, "fp32": 4000, "compact": 443}


def noise(*shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixed_logits(rows: int = 1024, num_classes: int = 1000) -> torch.Tensor:
    """Logits of mixed images: two labels, eight classes that resemble them, and a tail that is wider in some rows."""
    generator = torch.Generator().manual_seed(0)

    def uniform(columns: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, columns, generator=generator)

    def classes(columns: int) -> torch.Tensor:
        return torch.randint(num_classes, (rows, columns), generator=generator)

    logits = noise(rows, num_classes, seed=1) * uniform(1, 0.9, 1.7)
    logits.scatter_add_(1, classes(1), uniform(1, 6.5, 10.5)).scatter_add_(1, classes(1), uniform(1, 3.5, 8.5))
    return logits.scatter_add_(1, classes(8), uniform(8, 0, 5))


def kl(logits: torch.Tensor, decoded: torch.Tensor, temperature: float = 1) -> torch.Tensor:
    """KL(softmax of logits || softmax of decoded) of each row, computed in float64."""
    expected = (logits.double() / temperature).log_softmax(1)
    return (expected.exp() * (expected - (decoded.double() / temperature).log_softmax(1))).sum(1)


def test_the_logits_are_as_broad_as_a_teachers():
    """The study measured 2.5 nats, and 0.49 and 0.83 of the probability in the largest class and the 20 largest."""
    probabilities = mixed_logits().softmax(1)
    assert 2.2 < -(probabilities * probabilities.log()).sum(1).mean() < 2.8
    mass = probabilities.sort(1, descending=True).values.cumsum(1).mean(0)
    assert 0.4 < mass[0] < 0.6 and 0.7 < mass[19] < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_what_a_codec_loses(name):
    logits, codec = mixed_logits(), open_codec(name, 1000)
    rows = codec.encode(logits)
    assert rows.dtype == torch.uint8 and rows.shape == (1024, codec.row_bytes) and codec.row_bytes == BYTES[name]
    decoded = codec.decode(rows)
    assert decoded.dtype == torch.float32 and decoded.shape == logits.shape
    most_kl, most_row, most_mean = BOUNDS[name]
    assert kl(logits, decoded).mean() <= most_kl and kl(logits, decoded).max() <= 5 * most_kl
    student = (0.8 * logits + 0.7 * noise(1024, 1000, seed=5)).softmax(1)  # the gradient is student - teacher
    error, gradient = decoded.softmax(1) - logits.softmax(1), student - logits.softmax(1)
    assert (error.norm(dim=1) / gradient.norm(dim=1)).mean() <= most_row
    assert error.mean(0).norm() / gradient.mean(0).norm() <= most_mean
    best = decoded.gather(1, logits.argmax(1, keepdim=True))
    assert (best == decoded.amax(1, keepdim=True)).all()  # It may share its level with others.


@pytest.mark.parametrize("name", NAMES)
def test_any_temperature_softens_them(name):
    logits, codec = mixed_logits(256), open_codec(name, 1000)
    assert codec.any_temperature
    decoded = codec.decode(codec.encode(logits))
    for temperature in (0.5, 2, 4):
        assert kl(logits, decoded, temperature).mean() <= 2 * BOUNDS[name][0]


def test_compact_keeps_the_probability_of_the_tail():
    """Its error would otherwise be the same in every row, and training would not average it out."""
    logits, codec = mixed_logits(), open_codec("compact", 1000)
    largest = logits.topk(16, dim=1).indices
    expected, found = (
        each.softmax(1).gather(1, largest).sum(1) for each in (logits, codec.decode(codec.encode(logits)))
    )
    assert (expected - found).abs().max() < 2e-3 and (expected - found).mean().abs() < 1e-4


@pytest.mark.parametrize("num_classes", [21, 1000])
def test_a_row_of_compact_has_the_layout_of_the_format(num_classes):
    """Stores are read by later versions, and by other programs: this reader knows the layout alone."""
    codec = open_codec("compact", num_classes)
    rows = codec.encode(mixed_logits(4, num_classes))
    for row, decoded in zip(rows.numpy(), codec.decode(rows).numpy(), strict=True):
        shift, spacing = row[64:68].view("<f2").astype(np.float32)
        bits = int.from_bytes(row[68:].tobytes(), "little")
        expected = np.array([shift - spacing * np.float32(bits >> 3 * each & 7) for each in range(num_classes)])
        expected[row[32:48] + 256 * row[48:64].astype(int)] = row[:32].view("<f2")
        assert np.array_equal(decoded, expected) and decoded.max() == 0


def test_a_byte_of_int8_is_a_point_of_the_grid_of_squares():
    decoded = open_codec("int8", 256).decode(torch.arange(256, dtype=torch.uint8)[None])[0]
    np.testing.assert_allclose(decoded.numpy(), -20 * (np.arange(256) / 255) ** 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_any_type(name, dtype):
    logits, codec = mixed_logits(8).to(dtype), open_codec(name, 1000)
    assert torch.equal(codec.encode(logits), codec.encode(logits.float()))
    strided = torch.stack([logits, logits], dim=2)[:, :, 0]
    assert not strided.is_contiguous() and torch.equal(codec.encode(strided), codec.encode(logits))


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_exact_codecs_return_the_logits_themselves(name):
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[name]
    logits, codec = mixed_logits(8).to(dtype), open_codec(name, 1000)
    assert torch.equal(codec.decode(codec.encode(logits)), logits.float())


@pytest.mark.parametrize("num_classes", [2, 3, 10, 16, 17, 24, 1001])
@pytest.mark.parametrize("name", NAMES)
def test_few_classes_and_odd_numbers_of_them(name, num_classes):
    codec = open_codec(name, num_classes)
    for logits in (
        3 * noise(64, num_classes, seed=3),
        torch.full((2, num_classes), 7.0),
        1e5 * noise(9, num_classes, seed=4),
    ):
        decoded = codec.decode(codec.encode(logits))
        assert decoded.isfinite().all() and decoded.shape == logits.shape
        if logits.abs().max() < 1e4:
            assert (decoded.softmax(1) - logits.softmax(1)).abs().max() < 0.02


def test_top_k_is_for_many_classes_at_temperature_1():
    logits, codec = 4 * noise(64, 5000, seed=0), open_codec("top100", 5000)
    rows = codec.encode(logits)
    assert rows.shape == (64, codec.row_bytes) and codec.row_bytes == 402 and not codec.any_temperature
    found, expected = codec.decode(rows).softmax(1), logits.softmax(1)
    largest = expected.topk(100, dim=1).indices
    assert (found - expected).gather(1, largest).abs().max() < 2e-3
    others = found.scatter(1, largest, 0)
    left = 1 - expected.gather(1, largest).sum(1)
    assert torch.allclose(others.amax(1), left / 4900, rtol=0.01) and torch.allclose(others.sum(1), left, rtol=0.01)


def test_any_bytes_decode_to_something():
    """A forged file has any bytes. Memory outside of the row would be read or written by a class that is not there."""
    for name, num_classes in [*((name, 300) for name in NAMES), ("top100", 5000)]:
        codec = open_codec(name, num_classes)
        octets = torch.randint(
            256, (64, codec.row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        assert codec.decode(octets).shape == (64, num_classes)


CODECS = [*((name, 1000) for name in NAMES), ("top100", 5000)]


@pytest.mark.parametrize("name, num_classes", CODECS)
def test_both_functions_are_one_graph(name, num_classes):
    """Nothing in them makes the host wait or falls back to Python."""
    logits, codec = 3 * noise(16, num_classes, seed=0), open_codec(name, num_classes)
    encode, decode = (
        torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
        for function in (codec.encode, codec.decode)
    )
    rows = codec.encode(logits)
    assert torch.equal(encode(logits), rows) and torch.equal(decode(rows), codec.decode(rows))


@pytest.mark.parametrize("name, num_classes", [each for each in CODECS if each[0] in ("int8", "fp16", "compact")])
def test_compiled_and_eager_decoding_are_the_same(name, num_classes):
    if reason := why_not(torch.device("cpu")):
        pytest.skip(reason)
    codec = open_codec(name, num_classes)
    rows = codec.encode(3 * noise(16, num_classes, seed=0))
    assert torch.equal(torch.compile(codec.decode, fullgraph=True, dynamic=False)(rows), codec.decode(rows))


@pytest.mark.parametrize(
    "name, num_classes, message",
    [
        ("int4", 1000, "codec is 'int4'; it must be one of int8, fp32, fp16, compact, topK"),
        ("top0", 5000, "must be one of"),
        ("top20", 1000, "topK needs more than 4096 classes, and more than K; there are 1000. Use int8 or compact"),
        ("top9999", 5000, "and more than K; there are 5000"),
        ("compact", 70_000, "it can number 65536 classes, and there are 70000. Use int8"),
    ],
)
def test_codecs_that_are_none(name, num_classes, message):
    with pytest.raises(UserError, match=message) as error:
        open_codec(name, num_classes)
    assert error.value.argument == "codec"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_a_codec_cannot_store_are_found(name, dtype):
    codec = open_codec(name, 1000)
    logits = mixed_logits(5).to(dtype)
    logits[1, 3], logits[2, 999], logits[3, 0] = torch.nan, torch.inf, -torch.inf
    assert codec.can_encode(logits).tolist() == [True, False, False, False, True]
    if dtype != torch.float16:
        logits[0, 5], logits[4, 5] = -65504, 65505
        assert codec.can_encode(logits).tolist() == [True, False, False, False, name != "fp16"]
