# SPDX-License-Identifier: Apache-2.0
"""Render model cards: a source in this folder (camoe-*.md) and a run's own JSON files -> README.md.

A source is a YAML header, which names the benchmark, and blocks of text for card_template.md. Every number in a card
comes from the run: results from eval_results.json, training from recipe.yaml and all_results.json. Results that the
run does not have render as "not measured".
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from results_table import DIRECTION_TITLES

from modeling_camoe import CAMoEConfig


HERE = Path(__file__).parent

TAGS = [
    "video-text-retrieval",
    "text-to-video-retrieval",
    "video-retrieval",
    "clip",
    "mixture-of-experts",
    "sentence-transformers",
    "custom_code",
]

# Correction -> its name in a card, and what a reader must know about it.
CORRECTIONS = {
    "none": ("uncorrected", "each query is ranked on its own"),
    "dual_softmax": (
        "test-time dual softmax",
        "transductive: needs all test queries at once, which a live search does not have",
    ),
    "query_bank": ("query bank", "each query is ranked on its own; the biases come from training data"),
    "dynamic_query_bank": ("dynamic query bank", "like the query bank, but only where the best candidate is a hub"),
    "sinkhorn": ("Sinkhorn", "transductive: needs all test queries and candidates at once"),
}
ALWAYS_SHOWN = ("none", "dual_softmax", "query_bank")  # measured or not
METRIC_TYPES = {
    "R@1": "recall_at_1",
    "R@5": "recall_at_5",
    "R@10": "recall_at_10",
    "MdR": "median_rank",
    "MnR": "mean_rank",
    "Rsum": "recall_sum",
}
NOT_MEASURED = "not measured"


class CardError(Exception):
    """A card that must not be published; the message says why."""


@dataclass(frozen=True)
class Run:
    """The files of a run; None where a file is missing."""

    results: dict | None  # eval_results.json
    training: dict | None  # all_results.json
    recipe: dict | None  # recipe.yaml
    config: dict  # config.json
    processor: dict  # processor_config.json
    examples: list[dict]  # examples.json
    files: frozenset[str]  # names of the files beside the card

    @classmethod
    def read(cls, folder: Path) -> "Run":
        def load(name, parse):
            path = folder / name
            return parse(path.read_text(encoding="utf-8")) if path.is_file() else None

        return cls(
            results=load("eval_results.json", json.loads),
            training=load("all_results.json", json.loads),
            recipe=load("recipe.yaml", yaml.safe_load),
            config=load("config.json", json.loads),
            processor=load("processor_config.json", json.loads) or {},
            examples=load("examples.json", json.loads) or [],
            files=frozenset(path.name for path in folder.iterdir()),
        )


def render_card(source: Path, run: Run, repo_id: str) -> str:
    """The README of `repo_id`.

    Raises:
        CardError: the results are from another benchmark than the card's.
    """
    header, body = read_source(source)
    benchmark = _normalize(header["benchmark"])
    if run.results is not None and not _normalize(run.results["dataset"]).startswith(benchmark):
        raise CardError(
            f"the card {source.name} is about {header['benchmark']!r}, but eval_results.json holds results on "
            f"{run.results['dataset']!r}: choose another --card, or evaluate the run on the benchmark of the card"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.from_string(body).render(
        repo_id=repo_id,
        header=header,
        run=run,
        model_table=model_table(run),
        measured=results_table(run.results),
        training_table=training_table(run),
        corrections={name: CORRECTIONS[name] for name in _corrections(run.results)},
        tau=(run.results or {}).get("settings", {}).get("tau"),
    )
    return str(ModelCard(f"---\n{card_data(header, run, repo_id).to_yaml()}\n---\n\n{text.strip()}\n"))


def read_source(source: Path) -> tuple[dict, str]:
    """The header and the text of a card's source."""
    try:
        _, header, body = source.read_text(encoding="utf-8").split("---\n", 2)
    except ValueError as error:
        raise CardError(f"the card {source} does not begin with a YAML header between lines of ---") from error
    return yaml.safe_load(header), body


def card_data(header: dict, run: Run, repo_id: str) -> ModelCardData:
    """The metadata of the card. A base model is named only if it is a repository on the Hub."""
    base_model = (run.recipe or {}).get("model_name_or_path")
    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        base_model = None
    results = eval_results(header, run.results)
    is_other = header["license"] == "other"  # the Hub then requires a name and a link
    return ModelCardData(
        language=header["language"],
        license=header["license"],
        license_name="apache-2.0-and-data-terms" if is_other else None,
        license_link=f"https://huggingface.co/{repo_id}#the-data" if is_other else None,
        library_name="transformers",
        # The Hub has no tag for video-text retrieval. For this one, its snippets, widget and clients work as they are.
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS, header["benchmark"]],
        datasets=header["datasets"] or None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        widget=widget(run.examples, repo_id) or None,
    )


def widget(examples: list[dict], repo_id: str) -> list[dict]:
    """Widget entries for the metadata, as zero-shot image classification has them: an image of the release, labels,
    and the model's answer for the image.
    """
    return [
        {
            "example_title": example["caption"] or example["frame"],
            "src": f"https://huggingface.co/{repo_id}/resolve/main/{example['frame']}",
            "candidate_labels": ", ".join(sorted(answer["label"] for answer in example["frame_labels"])),
            "output": example["frame_labels"],
        }
        for example in examples
    ]


def eval_results(header: dict, results: dict | None) -> list[EvalResult]:
    """Every metric of eval_results.json with all its digits; the name gives direction and correction."""
    if results is None:
        return []
    return [
        EvalResult(
            task_type="video-text-retrieval",
            task_name="Video-text retrieval",
            dataset_type=(header["datasets"] or [header["benchmark"]])[0],
            dataset_name=header["dataset_name"],
            dataset_split=results["split"],
            metric_type=METRIC_TYPES[metric],
            metric_value=by_metric[metric],
            metric_name=f"{DIRECTION_TITLES[direction]} {metric}, {CORRECTIONS[correction][0]}",
        )
        for correction, by_direction in results["results"].items()
        for direction, by_metric in by_direction.items()
        for metric in METRIC_TYPES
        if metric in by_metric
    ]


def results_table(results: dict | None) -> str:
    """Markdown, one row per correction and direction, one decimal; R@1 with its interval if the run has one."""
    heads, rule = " | ".join(METRIC_TYPES), "---:|" * len(METRIC_TYPES)
    lines = [f"| correction | direction | {heads} |", f"|---|---|{rule}"]
    measured = (results or {}).get("results", {})
    for correction in _corrections(results):
        directions = [
            d for d in DIRECTION_TITLES if d in measured.get(correction, {}) or d != "video_to_text_caption_max"
        ]
        for direction in directions:
            by_metric = measured.get(correction, {}).get(direction, {})
            cells = [f"{by_metric[metric]:.1f}" if metric in by_metric else NOT_MEASURED for metric in METRIC_TYPES]
            if "R@1_ci95" in by_metric:
                low, high = by_metric["R@1_ci95"]
                cells[0] += f" [{low:.1f}, {high:.1f}]"
            lines.append(f"| {CORRECTIONS[correction][0]} | {DIRECTION_TITLES[direction]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(run: Run) -> str:
    """Markdown: what a user must know about the model's shapes."""
    config, video = CAMoEConfig.from_dict(run.config), run.processor.get("video_processor", {})
    vision = config.clip_config.vision_config
    dim, experts = config.projection_dim, config.frame_aggregation
    tagger, side = run.processor.get("tagger"), vision.image_size
    rows = {
        "experts (frame aggregation)": ", ".join(f"{name} ({how})" for name, how in experts.items()),
        "gate": "from the video alone" if config.gate == "single" else "equal weights",
        "vector": f"{len(experts)} x {dim} = {len(experts) * dim} float32, metric inner product",
        "frames": f"{video.get('num_frames')} per clip, {video.get('sampling')}, {side} x {side} pixels",
        "vision tower": f"{vision.num_hidden_layers} layers of {vision.hidden_size}, patches of {vision.patch_size}",
        "text": f"{run.processor.get('max_length')} tokens per expert; "
        + ("every expert reads the whole caption" if tagger == "none" else f"caption split with spaCy's `{tagger}`"),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def training_table(run: Run) -> str:
    """Markdown: the settings of the recipe and what the run did."""
    recipe, training = run.recipe or {}, run.training or {}
    rows = {
        "started from": recipe.get("model_name_or_path") or ("scratch" if recipe else None),
        "training pairs": training.get("train_pairs"),
        "steps": training.get("steps"),
        "epochs": training.get("epochs"),
        "contrastive batch": recipe.get("batch_size"),
        "frames per clip": recipe.get("num_frames"),
        "learning rate, new layers": recipe.get("learning_rate"),
        "learning rate, CLIP": recipe.get("clip_learning_rate"),
        "dual softmax temperature of the loss": run.config.get("dual_softmax_temp") or "plain contrastive loss",
        "seed": recipe.get("seed"),
        "parameters": training.get("parameters"),
        "of which new": training.get("head_parameters"),
        "seconds": training.get("seconds") and round(training["seconds"]),
    }
    lines = [f"| {name} | {'not recorded' if value is None else value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _corrections(results: dict | None) -> list[str]:
    measured = (results or {}).get("results", {})
    return [name for name in CORRECTIONS if name in ALWAYS_SHOWN or name in measured]


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
