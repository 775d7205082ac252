"""The graphs that the DALI pipeline asks for on a GPU are valid by DALI's own description of its operators."""

import pytest

backend = pytest.importorskip("nvidia.dali.backend_impl", reason="needs DALI")

from pipelines.dali import _dali_graph, _Shape  # noqa: E402

DECODER = {"hw_decoder_load": 1.0, "device_memory_padding": 64 << 20, "host_memory_padding": 64 << 20}


@pytest.mark.parametrize("decode", ["roi", "full"])
def test_every_operator_takes_the_arguments_it_is_given(decode):
    operators = graph(decode, DECODER)._ops
    for operator in operators:
        operator.check_args()
    names = {_schema(operator) for operator in operators}
    decoder = "decoders__ImageSlice" if decode == "roi" else "decoders__Image"
    assert {decoder, "Resize", "Slice", "Flip"} <= names
    assert "mixed" in backend.GetSchema(decoder).GetSupportedBackends()


@pytest.mark.parametrize("decode", ["roi", "full"])
def test_the_pixels_are_on_the_gpu_from_the_decoder_on(decode):
    for operator in graph(decode, DECODER)._ops:
        where = {edge.device for edge in operator.outputs}
        assert where == {"cpu" if _schema(operator) == "ExternalSource" else "gpu"}, operator.name


def test_an_argument_that_no_operator_has_is_noticed():
    with pytest.raises(KeyError, match="no_such_argument"):
        graph("roi", {**DECODER, "no_such_argument": 1})


def graph(decode: str, decoder: dict):
    """A graph that is not built, for that takes a device."""
    shape = _Shape(16, 224, "bicubic")
    options = {"batch_size": 16, "prefetch_queue_depth": 2, "num_threads": 2, "device_id": None}
    pipeline = _dali_graph(shape, lambda: (), decode=decode, decoder=decoder, **options)
    pipeline._build_graph()
    return pipeline


def _schema(operator) -> str:
    return getattr(operator._op, "schema_name", "ExternalSource")
