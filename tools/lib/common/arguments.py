"""Types of command-line arguments that several commands share."""

import argparse
from pathlib import Path

from pipelines.common.errors import UserError
from pipelines.common.machine import expanded


def path_argument(text: str) -> Path:
    """A path, with the home folder in place of ~."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


positive.__name__ = "positive number"  # argparse shows this name.


def model_argument(text: str) -> str:
    """Timm's name of a model, or a path, as text."""
    return str(path_argument(text)) if text.startswith("~") else text
