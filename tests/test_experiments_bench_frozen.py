"""Unit costs of trainings on kept features."""

import pytest

from experiments.bench_frozen import UnitCosts, training_hours, unit_costs
from resnet import ImageEncoder


def test_a_step_from_kept_features_neither_runs_nor_trains_the_image_encoder(monkeypatch):
    ran, trunk = [], ImageEncoder.trunk

    def count(encoder, image):
        ran.append(encoder.conv1.weight.requires_grad)
        return trunk(encoder, image)

    monkeypatch.setattr(ImageEncoder, "trunk", count)
    costs = unit_costs("small", "small", image_size=64, audio_seconds=0.8, batch=8, rounds=1, dim=16)
    assert ran == [True] * 5  # once for the features' shape, and twice each for their time and that of the whole step
    assert all(cost > 0 for cost in costs)


def test_hours_are_the_sum_of_features_and_steps():
    costs = UnitCosts(features=0.36, frozen_step=0.036, whole_step=0.072)
    assert training_hours(costs, 1000, 100, None) == pytest.approx(2.0)
    assert training_hours(costs, 1000, 100, views=5) == pytest.approx(1.5)
    assert training_hours(costs, 1000, 100, views=0) == pytest.approx(1.0)
