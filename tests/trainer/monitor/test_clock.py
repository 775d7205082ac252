"""The time that the device waits for input, and the time that a run still takes."""

import time

import pytest
import torch

from trainer.monitor.clock import InputWait, Pace


def test_time_left_is_that_of_this_sessions_pace_after_a_restart_too():
    now = iter([100.0, 102.0, 110.0, 200.0, 203.0])
    pace = Pace(1000, clock=lambda: next(now))
    assert pace.left() == "-:--"
    pace.advance(501)  # the first update waits for the first images
    assert pace.left() == "-:--"
    pace.advance(502)
    assert pace.left() == "16:36"  # 498 steps of 2 s
    pace.advance(506)
    assert pace.left() == "16:28"  # 494 steps of 2 s
    pace.restart()
    pace.advance(301)
    pace.advance(302)
    assert pace.left() == "34:54"  # 698 steps of 3 s


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3_661, "1:01:01"), (180_000, "2 d 2 h")])
def test_time_left_reads_well_at_every_length(seconds, text):
    now = iter([0.0, seconds])
    pace = Pace(3, clock=lambda: next(now))
    pace.advance(1)
    pace.advance(2)
    assert pace.left() == text


def test_waiting_for_input_is_the_time_in_next_and_nothing_else(monkeypatch):
    """Host and device are one here. Each look at the clock sees a time that is given."""
    times = iter([10.0, 10.25, 20.0, 20.5, 30.0, 30.0])
    monkeypatch.setattr("trainer.monitor.clock._HostMark.record", lambda mark: setattr(mark, "_time_s", next(times)))
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
