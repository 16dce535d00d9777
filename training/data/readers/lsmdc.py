# SPDX-License-Identifier: Apache-2.0
"""LSMDC (Rohrbach et al., IJCV 2017): movie clips with one or a few captions each.

Files: LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv. No header; six
tab-separated columns: clip_id, start_aligned, end_aligned, start_extracted, end_extracted, sentence. The times are
those of the movie, not of the clip, so they give no windows.
"""

import re
from pathlib import Path

from ..errors import UserError
from .common import AnnotatedClip, Splits, check_unique, clean, numbered_lines


FILES = {
    "train": "LSMDC16_annos_training.csv",
    "validation": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}

# Of copies that pandas wrote. As a row, it would be a clip whose video is missing.
HEADER = re.compile(r"\W*(clip|video)_?id\b", re.IGNORECASE)


def read_lsmdc(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test; the sentences of one clip are its captions."""
    splits = {}
    for name, file in FILES.items():
        path = folder / file
        lines = [(number, line) for number, line in numbered_lines(path) if not HEADER.match(line)]
        pairs = [_clip_and_sentence(line, number, path) for number, line in lines]
        if name == "test":  # the 1,000 clips have one sentence each; in the other splits a clip may have several
            check_unique((clip_id for clip_id, _ in pairs), path)
        captions: dict[str, list[str]] = {}
        for clip_id, sentence in pairs:
            captions.setdefault(clip_id, []).append(sentence)
        splits[name] = [AnnotatedClip(clip_id, clip_id, texts) for clip_id, texts in captions.items()]
    return splits


def _clip_and_sentence(line: str, number: int, path: Path) -> tuple[str, str]:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) != 6:
        raise UserError(
            f"{path}, line {number}, has {len(columns)} tab-separated columns, not the 6 of LSMDC "
            "(clip_id, four times, sentence); download it again"
        )
    clip_id, sentence = columns[0], columns[5]
    if clip_id.startswith('"') and not clip_id.endswith('"') and not sentence.startswith('"'):
        sentence = sentence.removesuffix('"')  # the whole line is quoted
    if len(sentence) > 1 and sentence[0] == sentence[-1] == '"':
        sentence = sentence[1:-1].replace('""', '"')
    clip_id, sentence = clip_id.strip('" '), clean(sentence)
    if not clip_id or not sentence:
        raise UserError(f"{path}, line {number}, has no {'sentence' if clip_id else 'clip id'}: correct or remove it")
    return clip_id, sentence
