# SPDX-License-Identifier: Apache-2.0
"""Cards show what the run measured, and nothing else."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from card import CORRECTIONS, DIRECTION_TITLES, CardError, Run, read_source, render_card
from huggingface_hub import ModelCard


SOURCES = sorted((Path(__file__).parents[2] / "hub_cards").glob("camoe-*.md"))
MOTION = next(path for path in SOURCES if path.stem == "camoe-motion")


@pytest.fixture
def run(run_dir):
    return Run.read(run_dir)


def test_every_metric_is_in_the_model_index_with_all_digits(run):
    card = ModelCard(render_card(MOTION, run, "org/camoe-motion"))
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    expected = {
        f"{DIRECTION_TITLES[direction]} {metric}, {CORRECTIONS[correction][0]}": value
        for correction, by_direction in run.results["results"].items()
        for direction, by_metric in by_direction.items()
        for metric, value in by_metric.items()
        if not isinstance(value, list)  # intervals stay in eval_results.json
    }
    assert found == expected and len(found) >= 5 * 5  # five rankings: the bank has no videos
    assert "text to video R@1, query bank" in found and "video to text R@1, query bank" not in found
    assert {result.metric_type for result in card.data.eval_results} >= {"recall_at_1", "median_rank"}
    assert card.data.eval_results[0].dataset_split == "test"


def test_the_metadata_uses_values_the_hub_knows(run):
    data = ModelCard(render_card(MOTION, run, "org/camoe-motion")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert {"video-text-retrieval", "sentence-transformers", "custom_code"} <= set(data.tags)
    assert data.license == "apache-2.0"
    assert data.base_model == "openai/clip-vit-base-patch32" and data.model_name == "camoe-motion"


def test_a_local_base_model_is_not_named(run):
    run = replace(run, recipe={**run.recipe, "model_name_or_path": "/home/me/clip"})
    assert ModelCard(render_card(MOTION, run, "org/camoe-motion")).data.base_model is None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_without_results_a_card_says_not_measured_and_has_no_numbers(source, run):
    text = render_card(source, replace(run, results=None), f"org/{source.stem}")
    card = ModelCard(text)
    assert card.data.eval_results is None
    rows = [line for line in card.text.splitlines() if line.startswith(("| uncorrected", "| query bank"))]
    assert len(rows) == 4
    for row in rows:
        assert row.count("not measured") == 6 and not re.search(r"\d", row)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_benchmark_has_its_own_card(source, run):
    header, _ = read_source(source)
    run = replace(run, results={**run.results, "dataset": f"{header['benchmark']}_1k"})
    card = ModelCard(render_card(source, run, f"org/{source.stem}"))
    assert card.data.eval_results[0].dataset_name == header["dataset_name"]
    for section in ("## Use", "## Results", "## Training", "## The data", "## Intended use and limits", "## Citation"):
        assert section in card.text
    assert "transductive" in card.text and run.results["protocol"] in card.text


def test_results_on_another_benchmark_are_refused(run):
    with pytest.raises(CardError, match="'msrvtt', but eval_results.json holds results on 'motion_demo'"):
        render_card(MOTION.with_name("camoe-msrvtt.md"), run, "org/camoe-msrvtt")


def test_a_source_without_header_is_an_error(run, tmp_path):
    (tmp_path / "card.md").write_text("# nothing\n")
    with pytest.raises(CardError, match="does not begin with a YAML header"):
        render_card(tmp_path / "card.md", run, "org/camoe-motion")


def test_the_query_bank_example_uses_the_temperature_of_the_run(run):
    text = render_card(MOTION, run, "org/camoe-motion")
    assert f"tau = {json.dumps(run.results['settings']['tau'])}  # chosen on validation data" in text
    assert "query_bank.txt" not in render_card(MOTION, replace(run, files=frozenset()), "org/camoe-motion")
