# SPDX-License-Identifier: Apache-2.0
"""A matrix of scores from any system -> what evaluate_retrieval.py scores, to check what others publish.

The matrix is a .npy file (memory-mapped) or a .safetensors file: rows are texts, columns are videos. Whose text a row
is, it is told in one of four ways, the first that applies:

    --dataset_name (and --split, --captions)     a prepared split: rows and columns in its order
    --text_to_video_ids (and --video_ids)        a file with the video of each text: its column, or its id
    a tensor text_to_video in the .safetensors   the column of each text's video
    none of these                                text n belongs to video n
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data.captioned_clips import load_split, read_captioned_clips
from data.errors import UserError
from evaluation.compare_runs import query_key

from .scoring_inputs import ScoringInputs


class MatrixInputs:
    """`--scores` and what goes with it.

    Args:
        options: [`EvaluationOptions`].
    """

    def __init__(self, options):
        self.options = options
        self.scale = 1.0 if options.scale is None else options.scale
        name = Path(options.dataset_name).name if options.dataset_name else Path(options.scores).stem
        self.about = {"dataset": name, "split": options.split, "captions": options.captions, "scores": options.scores}

    def test(self) -> ScoringInputs:
        """The matrix that is scored."""
        options = self.options
        return self._inputs(options.scores, options.text_to_video_ids, options.video_ids, options.dataset_name)

    def validation(self) -> tuple[ScoringInputs, str]:
        """The matrix that chooses temperatures, and its name."""
        options = self.options
        if options.validation_scores is None:
            raise UserError("there is no --validation_scores to choose it on")
        ids = options.validation_text_to_video_ids
        return self._inputs(options.validation_scores, ids, None, None), options.validation_scores

    def banks(self, test: ScoringInputs) -> dict:
        """Scores of bank queries with every candidate."""
        given = {"text_bank": self.options.text_bank_scores, "video_bank": self.options.video_bank_scores}
        banks = {name: read_matrix(path)[0] for name, path in given.items() if path is not None}
        if not banks:
            raise UserError(
                "a query bank needs scores of training queries: give --text_bank_scores (training captions x test "
                "videos) or --video_bank_scores (training videos x test texts), or leave it out of --corrections"
            )
        return banks

    def _inputs(self, path: str, ids_path: str | None, video_ids_path: str | None, dataset: str | None):
        matrix, text_to_video = read_matrix(path)
        if matrix.ndim != 2:
            raise UserError(f"{path} has the shape {tuple(matrix.shape)}: it must be (texts, videos)")
        num_texts, num_videos = matrix.shape
        video_ids, captions = [str(column) for column in range(num_videos)], None
        if dataset is not None:
            captions, video_of_text, video_ids = self._split()
        elif ids_path is not None:
            if video_ids_path is not None:
                video_ids = [str(name) for name in read_ids(video_ids_path)]
            video_of_text = _columns_of(read_ids(ids_path), video_ids, ids_path, video_ids_path)
        elif text_to_video is not None:
            video_of_text = text_to_video
        elif num_texts == num_videos:
            video_of_text = torch.arange(num_texts)
        else:
            raise UserError(
                f"{path} has {num_texts} texts and {num_videos} videos, which do not pair up by position: give "
                "--text_to_video_ids, a file with the video of each text, or the --dataset_name and --split it is of"
            )
        expected = len(video_of_text), len(video_ids)
        if expected != (num_texts, num_videos):
            turned = "; rows must be texts: transpose it" if expected == (num_videos, num_texts) else ""
            raise UserError(
                f"{path} is {num_texts} x {num_videos}, but there are {expected[0]} texts and {expected[1]} "
                f"videos{turned}"
            )
        return ScoringInputs(matrix, None, video_of_text, _text_keys(video_of_text, video_ids, captions), video_ids)

    def _split(self):
        options = self.options
        clips = read_captioned_clips(
            load_split(options.dataset_name, options.split, options.dataset_config, options.max_clips),
            ["fusion"],
            None,  # nothing is encoded, so nothing is tagged
            None,
            options.video_column,
            options.caption_column,
        )
        captions, _, video_of_text = clips.flat(options.captions)
        return captions, torch.tensor(video_of_text), clips.video_ids


def read_matrix(path: str):
    """A (texts, videos) array or tensor, and the tensor text_to_video of a .safetensors file that has it.

    Raises:
        UserError: naming the file and what is wrong.
    """
    suffix = Path(path).suffix
    try:
        if suffix == ".npy":
            matrix = np.load(path, mmap_mode="r", allow_pickle=False)
            if matrix.dtype.kind not in "fiu":
                raise UserError(f"{path} holds {matrix.dtype}, not numbers: save the scores as float32")
            return matrix, None
        if suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            text_to_video = tensors.pop("text_to_video", None)
            if "scores" not in tensors and len(tensors) != 1:
                raise UserError(f"{path} has the tensors {sorted(tensors)}: name the matrix 'scores'")
            return tensors.get("scores", next(iter(tensors.values()))), text_to_video
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot read the scores {path}: {error}") from error
    raise UserError(f"cannot read {path}: scores are a .npy or a .safetensors file, rows texts, columns videos")


def read_ids(path: str) -> list:
    """A list of ids: a .json list, a .npy array, or a text file with one a line."""
    try:
        if Path(path).suffix == ".npy":
            ids = np.load(path, allow_pickle=False).tolist()
        elif Path(path).suffix == ".json":
            ids = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            ids = Path(path).read_text(encoding="utf-8").split("\n")
            ids = [line.strip() for line in (ids[:-1] if ids[-1] == "" else ids)]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the ids {path}: {error}; one per line, a JSON list, or a .npy array") from error
    if not isinstance(ids, list) or not all(isinstance(entry, str | int) for entry in ids):
        raise UserError(f"{path} must hold a list of ids: one per line, a JSON list, or a .npy array of one dimension")
    return ids


def _columns_of(ids: list, video_ids: list[str], ids_path: str, video_ids_path: str | None) -> torch.Tensor:
    columns = {name: column for column, name in enumerate(video_ids)}
    if len(columns) < len(video_ids):
        twice = next(name for name in video_ids if video_ids.count(name) > 1)
        raise UserError(f"{video_ids_path} names video {twice!r} twice: give one line per column of the scores")
    for row, name in enumerate(ids):
        if str(name) not in columns:
            remedy = (
                f"it is not in {video_ids_path}"
                if video_ids_path is not None
                else f"columns are 0 to {len(video_ids) - 1}; if these are ids, give --video_ids, those of the columns"
            )
            raise UserError(f"{ids_path}, entry {row + 1}: no column for video {name!r}; {remedy}")
    return torch.tensor([columns[str(name)] for name in ids])


def _text_keys(video_of_text, video_ids: list[str], captions: list[str] | None) -> list[int]:
    """By the caption, or where it is not known by its number among those of its video."""
    keys, seen = [], [0] * len(video_ids)
    for row, column in enumerate(video_of_text.tolist()):
        if not 0 <= column < len(video_ids):
            raise UserError(f"text {row} belongs to video {column}, but the columns are 0 to {len(video_ids) - 1}")
        keys.append(query_key(video_ids[column], captions[row] if captions is not None else f"#{seen[column]}"))
        seen[column] += 1
    return keys
