"""Errors whose advice names settings, for functions that do not know how these are typed."""

import contextlib
from collections.abc import Callable, Collection, Iterator

from pipelines.common.errors import UserError

# Spells the name of a setting as its user types it, such as --student.checkpoint; "" where there is no such setting.
Spelling = Callable[[str], str]


class SettingError(UserError):
    """What is wrong, and advice about settings: of a model these are name, checkpoint, weights, kwargs and classes.

    Until `spelling_settings` spells them, the names stand in backquotes, as arguments of functions.

    Args:
      problem: what is wrong, a sentence without its full stop.
      advice: what helps, as a function of the spelling.
    """

    def __init__(self, problem: str, advice: Callable[[Spelling], str]):
        super().__init__(f"{problem}. {advice(lambda name: f'`{name}`')}")
        self.problem = problem
        self.advice = advice

    def __reduce__(self):
        return UserError, self.args  # Functions cannot be sent to another process.


@contextlib.contextmanager
def spelling_settings(prefix: str, *, lacking: Collection[str] = ()) -> Iterator[None]:
    """Inside, a SettingError names its settings as they are typed.

    Args:
      prefix: what stands before each name, such as `--student.`.
      lacking: names of settings that cannot be typed here.
    """
    try:
        yield
    except SettingError as error:
        error.args = (f"{error.problem}. {error.advice(lambda name: '' if name in lacking else prefix + name)}",)
        raise


def prefix_of(section: str) -> str:
    """What stands before the settings of a section as they are typed; those of an item of a list are in files alone."""
    return f"{section}." if "[" in section else f"--{section}."
