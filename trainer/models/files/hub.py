"""Hugging Face's hub, as far as this machine reaches it."""

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants, get_session

from pipelines.common.errors import reason_of

_PATIENCE_S = 20  # A slow network answers one short request in this time; what is downloaded may take any time.


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Inside, only files that are on this machine already are used if the hub cannot be reached.

    One request finds out. Without it the hub's client tries again for half a minute, for each name that a file of
    weights may have.

    Raises:
      ConnectionError: the hub cannot be reached, and a file of it is not on this machine.
    """
    reason = _why_unreachable()
    if not reason:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except FileNotFoundError as error:
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _why_unreachable() -> str:
    """Why the hub does not answer, "" if it does, or if the user has chosen to be offline."""
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception as error:  # The network's libraries have errors of their own.
        return reason_of(error, 60)
    return ""
