# SPDX-License-Identifier: Apache-2.0
"""Rates are of the window since the last line, not of the whole run."""

import pytest
import torch

from engine.telemetry import PairCost, Telemetry


def test_rates_are_of_the_window_and_time_left_is_of_the_whole_run():
    telemetry = Telemetry(torch.device("cpu"), processes=2, pairs=8, cost=None)
    for _ in range(4):
        telemetry.add(seconds=2.0, waited=0.5, tokens=100)
    telemetry.validation_seconds = 30.0
    values = telemetry.values(steps_left=10, validations_left=2)
    assert values["samples_per_second"] == 4.0 and values["samples_per_second_per_device"] == 2.0
    assert values["data_wait_share"] == 0.25
    assert values["hours_left"] == pytest.approx((10 * 2 + 2 * 30) / 3600)
    assert 0.01 < values["peak_memory_gb"] < 100 and "mfu" not in values
    telemetry.add(seconds=1.0, waited=0.0, tokens=100)
    assert telemetry.values(0, 0)["samples_per_second"] == 8.0


def test_mfu_is_the_models_own_operations_over_the_peak_of_one_device():
    telemetry = Telemetry(torch.device("cpu"), processes=2, pairs=8, cost=PairCost(fixed=50.0, token=2.0))
    telemetry.peak = 1000.0
    telemetry.add(seconds=2.0, waited=0.0, tokens=100)  # of this process's four pairs
    assert telemetry.values(0, 0)["mfu"] == pytest.approx((4 * 50 + 100 * 2) / 2 / 1000)
