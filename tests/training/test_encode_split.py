# SPDX-License-Identifier: Apache-2.0
"""Validation encodes in the run's number format, and its vectors are float32."""

import contextlib
from types import SimpleNamespace

import torch

from data.captioned_clips import CaptionedClips
from data.encode_split import Part, encode_split
from modeling_camoe.frames import Clip
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


def accelerator(precision: str):
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    return SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, autocast=lambda: autocast)


def test_bf16_gives_nearly_the_vectors_of_float32_in_float32(tmp_path):
    model, processor = tiny_model_and_processor()
    clips = [Clip(str(write_video(tmp_path / f"{n}.mp4", num_frames=3 + n, fps=4, size=(32, 32)))) for n in range(3)]
    captions = [[f"a dog runs {n} times", "a cat"] for n in range(3)]
    streams = [[[text] * 4 for text in texts] for texts in captions]
    split = CaptionedClips(clips, list("abc"), captions, streams)
    plain, bf16 = (
        encode_split(accelerator(precision), model, processor, split, "all", num_workers=0)
        for precision in ("no", "bf16")
    )
    for name in ("text_vectors", "video_vectors", "gate_weights"):
        ours, expected = getattr(bf16, name), getattr(plain, name)
        assert ours.dtype == torch.float32 and not torch.equal(ours, expected)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.05)


def test_a_part_reads_only_the_items_that_are_asked_for():
    read = []

    class Items(list):
        def __getitem__(self, n):
            read.append(n)
            return super().__getitem__(n)

    part = Part(Items("abcdefg"), range(1, 7, 2))
    assert (len(part), part[1], read) == (3, "d", [3])
    assert list(part) == ["b", "d", "f"]
