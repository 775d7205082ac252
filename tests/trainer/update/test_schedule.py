"""The EMA's decay, and its warm-up."""

import torch

from conftest import TINY
from support.tiny_runs import ONE, all_equal, build_here, first_batches
from trainer.builder import build
from trainer.config.sections import EmaConfig, parse
from trainer.loop import train
from trainer.update.schedule import ema_decay


def test_the_decay_is_constant_unless_it_warms_up():
    assert {ema_decay(step, EmaConfig()) for step in range(100)} == {0.99996}
    warm = [ema_decay(step, EmaConfig(decay=0.999, warmup=True)) for step in range(10_000)]
    assert warm[:3] == [1 / 10, 2 / 11, 3 / 12] and warm == sorted(warm)
    assert warm[8989] < 0.999 and set(warm[8990:]) == {0.999}  # (1 + t) / (10 + t) = 0.999 at t = 8990


def test_a_warming_average_is_the_plain_recursion(digits, tmp_path):
    run = build_here(digits, tmp_path, "--ema.decay", 0.3, "--ema.warmup", "true")
    student, average = run.state.student.state_dict(), run.state.ema.module.state_dict()
    expected = {name: value.double().clone() for name, value in student.items() if value.is_floating_point()}
    batches = iter(first_batches(run, 5))
    for number, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        run.step(batches, number)
        for name, value in expected.items():
            expected[name] = decay * value + (1 - decay) * student[name].double()
            assert torch.allclose(average[name].double(), expected[name], rtol=1e-5, atol=1e-6), (number, name)


def test_a_warming_average_resumes_bit_equal_and_is_not_called_slow(digits, tmp_path, capsys):
    arguments = [*TINY, "--data.root", str(digits), "--ema.decay", "0.99996", "--ema.warmup", "true"]
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            train(
                build(parse([*arguments, "--run.out", str(tmp_path / name), "--run.stop_after_steps", str(steps)]), ONE)
            )
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000004.pt", weights_only=True)
        for name in ("whole", "stopped")
    )
    assert all_equal(list(a["ema"].values()), list(b["ema"].values()))
    assert "is slow" not in capsys.readouterr().out
