"""The time that the device waits for input."""

import time

import pytest
import torch

from trainer.monitor.clock import InputWait


def test_waiting_for_input_is_the_time_in_next_and_nothing_else(monkeypatch):
    """Host and device are one here. Each look at the clock sees a time that is given."""
    times = iter([10.0, 10.25, 20.0, 20.5, 30.0, 30.0])
    monkeypatch.setattr("trainer.monitor.clock.time.perf_counter", lambda: next(times))
    batches = InputWait(iter("abc"), torch.device("cpu"))
    assert [next(batches), next(batches)] == ["a", "b"]
    assert batches.take_s() == pytest.approx(0.75) and batches.take_s() == 0
    assert next(batches) == "c" and batches.take_s() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [False, True])
def test_a_busy_gpu_does_not_wait_for_input_while_the_host_does(busy):
    """The host waits for 50 ms each time; the device waits with it only if it has nothing to do."""

    def slow_items():
        for item in range(5):
            time.sleep(0.05)
            yield item

    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    batches = InputWait(slow_items(), device)
    if busy:
        torch.cuda._sleep(4_000_000_000)  # cycles: more than a second
    for _ in batches:
        pass
    torch.cuda.synchronize()
    waited_s = batches.take_s()
    assert waited_s < 0.05 if busy else waited_s > 0.2
