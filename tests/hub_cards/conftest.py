# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by several test files. Tests import modules of hub_cards/ by plain name, as its programs do."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "hub_cards" / "space"))
sys.path.insert(0, str(Path(__file__).parents[2] / "hub_cards"))

from fresh_environment import make_environment
from tiny_run import write_run

from tests.video_files import write_video


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run, of a model of 16 dimensions."""
    return write_run(tmp_path_factory.mktemp("run"), seed=1)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A video file of two seconds."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """The interpreter of a virtual environment in which this project is not installed."""
    return make_environment(tmp_path_factory.mktemp("fresh"))
