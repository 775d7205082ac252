"""Checks, on the first images of a session, that the teacher knows the dataset's classes."""

import torch

from trainer.cluster.world import World
from trainer.models.teacher import num_images_needed, teacher_warning


class TeacherWatch:
    """Compares labels with the teacher's best classes, once, as soon as there are enough images.

    Args:
      num_classes: of the dataset.
      global_batch: images an update, over all ranks.
      world: the ranks.
    """

    def __init__(self, num_classes: int, global_batch: int, world: World):
        self._num_classes = num_classes
        self._global_batch = global_batch
        self._world = world
        self._num_needed = num_images_needed(num_classes)  # over all ranks
        self._pairs: list[torch.Tensor] = []
        self._is_done = False

    def add(self, pairs: torch.Tensor) -> None:
        """Add an update's StepMetrics.teacher_pairs; they are ignored once there are enough."""
        if not self._is_done and not self._has_enough():
            self._pairs.append(pairs)

    def warning(self) -> str:
        """The warning, the first time that there are enough images; "" otherwise. Every rank must call it."""
        if self._is_done or not self._has_enough():
            return ""
        pairs = self._world.all_gather([torch.cat(self._pairs, 1).cpu().numpy()])
        self._pairs, self._is_done = [], True
        return teacher_warning(pairs, self._num_classes)

    def _has_enough(self) -> bool:
        return len(self._pairs) * self._global_batch >= self._num_needed
