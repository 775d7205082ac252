"""Whether outputs are in another order than the dataset's classes is seen in which class each class is taken for."""

import numpy as np
import pytest

from pipelines.shards.manifest import sorted_classes
from trainer.models.order_warning import num_images_needed, order_warning, taken_for


def looked_at(num_classes: int, accuracy: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the guesses of a model that knows each image with some probability and else guesses any class."""
    generator = np.random.default_rng(seed)
    labels, any_class = generator.integers(0, num_classes, (2, num_images_needed(num_classes)))
    return labels, np.where(generator.random(len(labels)) < accuracy, labels, any_class)


def numeric_in_text_order(num_classes: int) -> np.ndarray:
    """For each output in numeric order, the label that the same class name has in text order."""
    text = sorted_classes([str(i) for i in range(num_classes)], "text")
    return np.argsort([int(name) for name in text])


def rolled(num_classes: int, moved: int, by: int = 1) -> np.ndarray:
    order = np.arange(num_classes)
    order[:moved] = np.roll(order[:moved], by)
    return order


ORDERS = {
    "numeric, 12 classes": numeric_in_text_order(12),
    "numeric, 1,000 classes": numeric_in_text_order(1000),
    "half shifted by one": rolled(1000, 500),
    "half of ten shifted": rolled(10, 5),
    "all shifted by seven": rolled(100, 100, 7),
    "reversed": np.arange(20)[::-1],
    "two swapped": rolled(2, 2),
}


@pytest.mark.parametrize("accuracy", [0.6, 0.9])
@pytest.mark.parametrize("name", ORDERS)
def test_another_order_is_found_and_its_pairs_are_named(name, accuracy):
    order = ORDERS[name]
    labels, guesses = looked_at(len(order), accuracy)
    found = taken_for(labels, order[guesses], len(order))
    assert len(found) >= 0.5 * (order != np.arange(len(order))).sum()
    assert np.mean([order[one] == other for one, other in found]) > 0.99


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_a_mediocre_a_random_and_a_collapsed_model_are_left_alone(num_classes, seed):
    for accuracy in (0.0, 0.1, 0.3, 0.6, 1.0):
        assert not taken_for(*looked_at(num_classes, accuracy, seed), num_classes)
    labels, _ = looked_at(num_classes, 0, seed)
    assert not taken_for(labels, np.full_like(labels, seed % num_classes), num_classes)
    halves = labels // 2 * 2  # every second class is taken for its neighbour, which is found as well
    assert not taken_for(labels, halves, num_classes)
    few = np.random.default_rng(seed).choice([0, num_classes - 1], len(labels))
    assert not taken_for(labels, few, num_classes)


def test_few_images_of_an_evaluation_are_enough():
    order = numeric_in_text_order(12)
    labels = np.arange(12).repeat(2)
    assert len(taken_for(labels, order[labels], 12)) == 10
    assert not taken_for(labels, labels, 12)


def test_a_dataset_of_21000_classes_takes_little_memory():
    labels, guesses = looked_at(21_000, 0.7)
    assert len(taken_for(labels, np.roll(np.arange(21_000), 1)[guesses], 21_000)) > 10_000


def test_the_warning_names_examples_and_what_to_do():
    names = sorted_classes([str(i) for i in range(12)], "text")
    labels, guesses = looked_at(12, 0.9)
    said = order_warning(labels, numeric_in_text_order(12)[guesses], 12, names, "the teacher", "--teacher.classes")
    assert said.startswith("the teacher consistently takes 10 of 12 classes for one other each ('10' for '2'")
    assert "Name them with --teacher.classes FILE, or build the dataset with" in said and "--class-order" in said
    assert len(said) < 330
    assert order_warning(labels, guesses, 12, None, "the teacher", "--teacher.classes") == ""
