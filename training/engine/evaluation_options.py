# SPDX-License-Identifier: Apache-2.0
"""The options of an evaluation, and the choice of its temperatures on validation data."""

import difflib
from dataclasses import dataclass

from data.errors import UserError
from evaluation.protocol import CORRECTIONS
from evaluation.scoring import choose_temperature

from .recipe import option


@dataclass
class EvaluationOptions:
    """All options of an evaluation."""

    # What is scored: one of these three
    checkpoint: str | None = option(
        None, "CAMoE checkpoint, or a plain dual encoder, scored as it is; folder or Hub id"
    )
    scores: str | None = option(None, "scores of any system, .npy or .safetensors: rows texts, columns videos")
    results: str | None = option(
        None, "eval_results.json of a finished evaluation, to --compare without scoring again"
    )

    # Data
    dataset_name: str | None = option(None, "folder of clips with metadata.jsonl, folder of tables, or Hub id")
    dataset_config: str | None = option(None, "name of a configuration of the Hub data set")
    split: str = option("test", "split to score")
    validation_split: str | None = option("validation", "split that chooses the corrections' temperatures")
    train_split: str | None = option("train", "split whose clips are the bank of clips, for video to text")
    captions: str = option("first", "queries: the first caption of every clip, or all", choices=("first", "all"))
    video_column: str = option("video", "column of video paths")
    caption_column: str | None = option(None, "column of captions (default: captions or caption)")
    video_root: str | None = option(None, "folder that relative video paths are relative to")
    max_clips: int | None = option(None, "keep only the first clips, for a quick look")

    # Of a matrix (--scores)
    text_to_video_ids: str | None = option(
        None, "file with the video of each text, as a column number or an id, one per line"
    )
    video_ids: str | None = option(None, "file with the ids of the columns, one per line")
    scale: float | None = option(None, "factor that makes logits of the scores, for dual softmax (default: 1)")
    validation_scores: str | None = option(None, "matrix of validation scores that chooses the temperatures")
    validation_text_to_video_ids: str | None = option(
        None, "file with the video of each text of --validation_scores, one per line"
    )
    text_bank_scores: str | None = option(None, "scores of training captions with the test videos, a query bank")
    video_bank_scores: str | None = option(None, "scores of training videos with the test texts, a bank of clips")

    shared_columns: list = option(
        [], "columns of the data set (color, action, ...): report how often the best clip has the right clip's value"
    )

    # Corrections
    corrections: list | None = option(
        None,
        "any of none, dual_softmax, query_bank, dynamic_query_bank and sinkhorn; none is always reported (default: "
        "none, dual_softmax and query_bank for a CAMoE, the first two for a plain model, none for a matrix)",
    )
    dual_softmax_temp: float | None = option(None, "temperature of test-time dual softmax (default: from validation)")
    query_bank_tau: float | None = option(None, "temperature of the query bank (default: from validation)")
    video_bank_tau: float | None = option(
        None, "temperature of the bank of clips (default: --query_bank_tau if given, or from validation)"
    )
    sinkhorn_temp: float | None = option(None, "temperature of sinkhorn (default: from validation)")
    bank: int = option(1000, "size of the banks: captions of query_bank.txt, and training clips, both sampled")
    on_leak: str = option(
        "drop",
        "what to do with a scored caption in the bank: drop it from the bank and say so, or stop",
        choices=("drop", "raise"),
    )

    # Running
    compare: str | None = option(None, "eval_results.json of another run on the same queries: a paired test")
    on_bad_video: str = option(
        "raise", "what to do with a clip that cannot be decoded: stop, or skip and list it", choices=("raise", "skip")
    )
    on_damage: str | None = option(
        None,
        "what to do with a clip of which a wanted frame is damaged: treat it as one that cannot be decoded, or take "
        "frames from around the damage and count it (default: as in training)",
        choices=("error", "around"),
    )
    batch_size: int = option(32, "clips per forward pass")
    num_workers: int = option(2, "processes that decode")
    frame_cache: str | None = option(None, "folder that caches sampled frames, for many evaluations")
    bootstrap: int = option(1000, "bootstrap resamples for the 95 % intervals; 0 for no intervals")
    seed: int = option(0, "seed of the resampling")
    output_dir: str | None = option(
        None, "folder for the results (default: the checkpoint's, or the matrix's name without its suffix)"
    )

    def __post_init__(self):
        if sum(name is not None for name in (self.checkpoint, self.scores, self.results)) != 1:
            raise UserError("say what to score: one of --checkpoint, --scores and --results")
        if self.checkpoint is not None and self.dataset_name is None:
            raise UserError("--checkpoint needs the data to score it on: give --dataset_name")
        if self.results is not None and self.compare is None:
            raise UserError("--results is scored already: give the run to --compare it with")
        for name in ("validation_split", "train_split"):
            if self.checkpoint is not None and getattr(self, name) == self.split:
                raise UserError(f"--{name} is {self.split!r}, the split that is scored: it must be another, or null")
        if self.corrections is None and self.checkpoint is None:
            self.corrections = ["none"]
        for name in self.corrections or []:  # a checkpoint says later what it has by default
            if name not in CORRECTIONS:
                near = difflib.get_close_matches(str(name), CORRECTIONS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(CORRECTIONS)}"
                raise UserError(f"--corrections has {name!r}, {hint}")
        if self.video_bank_tau is None:
            self.video_bank_tau = self.query_bank_tau
        for name in ("dual_softmax_temp", "query_bank_tau", "video_bank_tau", "sinkhorn_temp"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"option {name!r} must be more than 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Temperature:
    """A temperature of `score_retrieval`: the option that gives it, the corrections it is of, what is tried, the bank
    that it is of, and the direction whose R@1 chooses."""

    option: str
    corrections: tuple[str, ...]
    candidates: tuple[float, ...]
    bank: str | None = None
    direction: str = "text_to_video"


QUERY_BANKS, TAUS = ("query_bank", "dynamic_query_bank"), (0.01, 0.015, 0.02, 0.05, 0.1, 0.2, 0.5)
# Dual softmax: units of the logits. The others: units of the score itself, in [-1, 1].
TEMPERATURES = {
    "dual_softmax_temp": Temperature("dual_softmax_temp", ("dual_softmax",), (0.5, 1, 2, 5, 10, 20, 50)),
    "tau": Temperature("query_bank_tau", QUERY_BANKS, TAUS, "text_bank"),
    "video_tau": Temperature("video_bank_tau", QUERY_BANKS, TAUS, "video_bank", "video_to_text"),
    "sinkhorn_temp": Temperature("sinkhorn_temp", ("sinkhorn",), (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)),
}


def choose_temperatures(options: EvaluationOptions, source, banks: dict, how: dict) -> tuple[dict, dict]:
    """Temperatures of the corrections asked for, and where each is from, in words.

    Args:
        source: gives the validation data, if it comes to that. banks: of `score_retrieval`. how: its other options.
    """
    chosen, origin, validation = {}, {}, None
    for name, temperature in TEMPERATURES.items():
        wanted = [correction for correction in temperature.corrections if correction in options.corrections]
        if not wanted or (temperature.bank is not None and banks.get(temperature.bank) is None):
            continue
        given = getattr(options, temperature.option)
        if given is not None:
            chosen[name], origin[name] = given, "given"
            continue
        bank = {} if temperature.bank is None else {temperature.bank: banks[temperature.bank]}
        if options.scores is not None and bank:
            raise UserError(f"{wanted[0]} of a matrix needs its temperature: give --{temperature.option}")
        try:
            validation = validation or source.validation()
        except UserError as error:
            raise UserError(f"{wanted[0]} needs a temperature: give --{temperature.option}; {error}") from error
        inputs, where = validation
        chosen[name] = choose_temperature(
            **inputs.data(),
            candidates=temperature.candidates,
            correction=wanted[0],
            direction=temperature.direction,
            scale=source.scale,
            **bank,
            **how,
        )
        origin[name] = f"best {temperature.direction.replace('_', '-')} R@1 on {where}"
    return chosen, origin
