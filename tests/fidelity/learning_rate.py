"""The learning rate of every epoch equals the authors' to the last bit."""

from collections.abc import Iterator

import numpy as np

from fidelity.old_timm import theirs
from fidelity.rows import Row, within
from trainer.config.sections import Config
from trainer.update.schedule import learning_rate


def rows() -> Iterator[Row]:
    """All 310 epochs."""
    config = Config()
    ours = [learning_rate(epoch, config.optim, config.schedule) for epoch in range(config.schedule.total_epochs)]
    names = "learning_rate", "create_scheduler"
    yield within("rates of all epochs", names, np.array(ours), theirs("learning_rate")["rates"])
