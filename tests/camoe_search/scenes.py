# SPDX-License-Identifier: Apache-2.0
"""Films of numbered scenes, and a model that reads the numbers: every search has a known answer.

A window's vector has an entry per scene: the share of its frames that show it. So the score of "scene 3" is the share
of scene 3.
"""

import re

import numpy as np
from PIL import Image

from camoe_search.database import Description, create
from camoe_search.encoder import ClipBatch
from camoe_search.index import VideoIndex
from camoe_search.writer import IndexWriter, StoredWindow
from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames
from tests.video_files import index_of, index_picture, write_video


SCENES = 32
SIZE = (64, 48)


class SceneEncoder:
    """An `Encoder` that reads scene numbers."""

    weights, experts, dim, num_frames, sampling = "scenes", ["all"], SCENES, 12, "uniform"

    def __init__(self, name: str):
        self.name = name  # a folder without a query bank

    def encode_clips(self, clips, batch_size=16, num_workers=0, thumbnails=False):
        for first in range(0, len(clips), batch_size):
            vectors, indices, bad = [], [], {}
            for index in range(first, min(first + batch_size, len(clips))):
                try:
                    vectors.append(scene_vector(map(index_of, sample_frames(clips[index], 12, size=32).frames)))
                    indices.append(index)
                except VideoDecodingError as error:
                    bad[index] = str(error)
            pictures = [None] * len(indices) if thumbnails else []
            yield ClipBatch(indices, np.array(vectors, np.float32).reshape(-1, SCENES), bad, thumbnails=pictures)

    def encode_texts(self, texts):
        return np.stack([scene_vector(map(int, re.findall(r"\d+", text))) for text in texts])

    def encode_clip(self, clip):
        if isinstance(clip, Clip):
            return scene_vector(map(index_of, sample_frames(clip, 12, size=32).frames))[None]
        picture = np.asarray(Image.open(clip))  # (H,W,3)
        return scene_vector([index_of(picture.transpose(2, 0, 1))])[None]


def scene_vector(scenes) -> np.ndarray:
    vector = np.bincount([scene for scene in scenes if scene < SCENES], minlength=SCENES).astype(np.float32)
    return vector / max(vector.sum(), 1.0)


def write_film(path, scenes: list[tuple[int, int]], fps: int = 2):
    """A film of (number, seconds) scenes."""
    pictures = [index_picture(number, *SIZE) for number, seconds in scenes for _ in range(seconds * fps)]
    return write_video(path, len(pictures), fps, SIZE, pictures=pictures)


def build(videos, folder, encoder, **options) -> VideoIndex:
    return VideoIndex.create_or_update(
        [] if videos is None else [str(videos)], folder, encoder, text_encoder=False, num_workers=0, **options
    )


def vector_index(folder, films: dict[str, list[tuple[float, float, np.ndarray]]], encoder=None) -> VideoIndex:
    """An index without video files: path -> windows (start, end, vector)."""
    folder.mkdir()
    create(folder, Description("nowhere", "scenes", ["all"], SCENES, 12, "uniform"))
    with IndexWriter(folder) as writer:
        moments, vectors = [], []
        for n, (path, windows) in enumerate(films.items()):
            for start, end, vector in windows:
                moments.append(StoredWindow(path, start, end, n, n, f"{n:032x}"))
                vectors.append(vector)
        writer.add_moments("/films", moments, np.array(vectors, np.float32))
    return VideoIndex(folder, encoder)


def overlaps(hits) -> int:
    """Pairs of results that overlap in the same file."""
    return sum(
        a.path == b.path and a.start < b.end - 1e-6 and b.start < a.end - 1e-6
        for n, a in enumerate(hits)
        for b in hits[:n]
    )
