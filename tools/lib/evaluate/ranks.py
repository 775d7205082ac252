"""Checks that all ranks evaluate the same thing."""

from pipelines.common.errors import UserError
from trainer.cluster.world import World


def check_ranks_agree(world: World, mine: dict[str, object]) -> None:
    """Raise a UserError, on every rank, if ranks are about to evaluate different things. Every rank must call it.

    Args:
      mine: what must be the same on all ranks, by its name in the message.
    """
    of_ranks = world.all_gather([mine])
    for rank, theirs in enumerate(of_ranks):
        for name, value in theirs.items():
            if value != of_ranks[0][name]:
                raise UserError(
                    f"{name} is not the same on all ranks: {of_ranks[0][name]} on rank 0, {value} on rank {rank}. Give "
                    "all the same command and files, and no folder of a run that is still training"
                )
