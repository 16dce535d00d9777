# SPDX-License-Identifier: Apache-2.0
"""Damages video files of 20 kinds at random, and holds `sample_frames` to a plain full decode of each.

    python tests/decode_fuzz.py                     1,000 files, some minutes
    python tests/decode_fuzz.py --files 60          what the tests run
    python tests/decode_fuzz.py --first 1000        the next 1,000
    python tests/decode_fuzz.py --only 17           one file again, in this process

Files are written by the tests' own writer, then bits are flipped, blocks zeroed, the end cut off, two files joined, or
header fields overwritten. Each is decoded in a process of its own. Wanted: no crash, nothing that takes over 30 s, no
exception but VideoDecodingError, and where a plain decode reports no damage, no frame that differs from it by more
than 2 levels on average. A file that a plain decode reads whole and in order must not be refused either.

"No damage" means: no error, no picture marked as corrupt, and the same pictures in memory of its own for each as in
memory that is used again. FFmpeg reports neither a lost slice of H.264 nor a row of VP8 that ends too early. It leaves
there what the memory held: such pictures change from run to run, and no decode of them is right.
"""

import argparse
import collections
import itertools
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_camoe.frames import VideoDecodingError, sample_frames
from modeling_camoe.pictures import PictureMaker
from modeling_camoe.video_file import MP4
from tests.video_files import KINDS, write_video


MORE_KINDS = {"h263.3gp": {"codec": "h263", "size": (128, 96), "fps": 25, "options": {"g": "12", "b": "2000000"}}}
BAD = ("crash", "hang", "exception", "wrong frames", "refused in vain")
MUTATIONS = ("flip", "zero", "cut", "join", "header")
SIZE, NUM_FRAMES, LIMIT_SECONDS = 32, 8, 30


def write_kinds(folder: Path) -> list[Path]:
    """One sound file of each kind."""
    paths = []
    for name, arguments in (KINDS | MORE_KINDS).items():
        path = folder / (name if "." in name else f"plain.{name}")
        paths.append(write_video(path, **{"num_frames": 60, **arguments}))
    return paths


def mutate(contents: list[bytes], number: int) -> tuple[int, str, bytes]:
    """(number of the kind, name of the mutation, content) of a damaged file: the same for the same number."""
    generator = random.Random(number)
    kind, mutation = number % len(contents), MUTATIONS[number // len(contents) % len(MUTATIONS)]
    content = bytearray(contents[kind])
    if mutation == "flip":
        for _ in range(generator.choice((1, 3, 10, 100))):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif mutation == "zero":
        for _ in range(generator.choice((1, 3))):
            start = generator.randrange(len(content))
            length = min(generator.choice((4, 64, 1024)), len(content) - start)
            content[start : start + length] = bytes(length)
    elif mutation == "cut":
        content = content[: generator.randrange(1, len(content))]
    elif mutation == "join":
        content += contents[generator.randrange(len(contents))]
    else:  # a field of the header, which is at the end of some files
        start = generator.choice((0, max(0, len(content) - 2048)))
        for _ in range(generator.choice((1, 4))):
            position = min(start + generator.randrange(2048), len(content) - 4)
            content[position : position + 4] = generator.choice((bytes(4), b"\xff" * 4, generator.randbytes(4)))
    return kind, mutation, bytes(content)


@dataclass
class PlainDecode:
    """What PyAV alone decodes of a file, with one thread."""

    frames: list = field(default_factory=list)  # (pts or None, checksum as stored, image or None)
    num_packets: int = 0
    breaks_off: bool = False  # before the last frame of its index
    is_damaged: bool = False  # an error or a corrupt picture was reported

    @property
    def is_complete(self):
        """Nothing is wrong with it: a frame a packet, their times in order."""
        times = [pts for pts, _, _ in self.frames]
        is_ordered = None not in times and all(a < b for a, b in itertools.pairwise(times))
        return not self.is_damaged and not self.breaks_off and is_ordered and 0 < self.num_packets == len(times)


def plain_decode(path: Path, holds_frames: bool = True) -> PlainDecode:
    """
    Decodes a file from its first packet to its last. Where an MP4 breaks off before the last frame of its index (a
    sample lies outside of the file), it goes on at the next key frame of the index that can be read.

    If it holds its frames, the decoder cannot write into the same memory again. Otherwise it can, and no images are
    made: swscale would hold a frame, too.
    """
    found, held = PlainDecode(), []
    with av.open(str(path), metadata_errors="replace") as container:
        streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        stream = container.streams.best("video") if len(streams) > 1 else streams[0]
        stream.thread_type = "NONE"
        make_picture = PictureMaker(SIZE, lambda: float(stream.sample_aspect_ratio or 1))

        def decode(packet):
            try:
                decoded = stream.codec_context.decode(packet)
            except av.EOFError:
                return
            except av.FFmpegError:
                found.is_damaged = True
                return
            found.is_damaged |= any(frame.is_corrupt for frame in decoded)
            for frame in decoded:
                checksum = zlib.crc32(frame.to_ndarray().tobytes())
                found.frames.append((frame.pts, checksum, make_picture(frame) if holds_frames else None))
            held.extend(decoded if holds_frames else [])

        newest, delay = -math.inf, 0
        while True:
            for packet in container.demux(stream):
                if packet.size:
                    found.num_packets += 1
                    found.is_damaged |= packet.is_corrupt
                    if packet.dts is not None:
                        newest = max(newest, packet.dts)
                        delay = (packet.pts or 0) - packet.dts if packet.is_keyframe else delay
                    decode(packet)
            decode(None)
            keys = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
            after = [tick for tick in keys if tick > newest] if container.format.name == MP4 else []
            if not after:
                return found
            found.breaks_off = True
            stream.codec_context.flush_buffers()
            newest = after[0]
            container.seek(newest + delay, stream=stream)


def judge(path: Path) -> dict:
    """What is wrong with the frames of a file, if anything."""
    begin, sampled = time.monotonic(), None
    try:
        sampled = sample_frames(path, NUM_FRAMES, size=SIZE)
    except VideoDecodingError as error:
        cause = str(error).replace(str(path), "FILE")
    except Exception as error:
        return {"outcome": "exception", "cause": repr(error), "trace": traceback.format_exc()[-500:]}
    seconds = time.monotonic() - begin
    try:
        plain, again = plain_decode(path), plain_decode(path, holds_frames=False)
    except Exception as error:
        if sampled is None:
            return {"outcome": "refused", "cause": cause}
        return {"outcome": "only ours decodes it", "cause": repr(error), "seconds": seconds}
    plain.is_damaged |= [frame[:2] for frame in plain.frames] != [frame[:2] for frame in again.frames]
    if sampled is None:
        is_sound = plain.is_complete and "_cut_" not in path.name  # what is cut off, a plain decode does not miss
        return {"outcome": "refused in vain" if is_sound else "refused", "cause": cause}
    difference = largest_difference(sampled.frames.numpy(), [image for _, _, image in plain.frames])
    outcome = "damaged but taken" if plain.is_damaged else "wrong frames" if difference > 2 else "right"
    return {"outcome": outcome, "difference": difference, "seconds": seconds}


def largest_difference(sampled, plain) -> float:
    """Of sampled images to those of a plain decode that are most like them, in the same order: mean levels."""
    largest, newest = 0.0, -1
    for image in sampled.astype(np.int16):
        differences = [float(np.abs(image - other).mean()) for other in plain[newest + 1 :]]
        if not differences:
            return 255.0
        largest = max(largest, min(differences))
        newest += 1 + differences.index(min(differences))
    return largest


def judge_in_process(path: Path, sender):
    sender.send(judge(path))


def run(paths: list[Path], jobs: int = 2):
    """Yields (number, outcome), each from a process of its own."""
    context = multiprocessing.get_context("fork")  # no decoder is open here
    waiting, running = list(enumerate(paths))[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, path = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=judge_in_process, args=(path, sender))
            process.start()
            sender.close()
            running[number] = process, receiver, time.monotonic()
        for number, (process, receiver, begin) in list(running.items()):
            if receiver.poll(0.01):
                try:
                    outcome = receiver.recv()
                except EOFError:
                    process.join()
                    outcome = {"outcome": "crash", "cause": f"exit code {process.exitcode}"}
            elif time.monotonic() - begin > LIMIT_SECONDS:
                process.kill()
                outcome = {"outcome": "hang"}
            else:
                continue
            process.join()
            del running[number]
            yield number, outcome


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--first", type=int, default=0, help="the number of the first file: others than before")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", type=int, help="this number alone, in this process; its file is kept")
    options = options.parse_args()
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        kinds = write_kinds(folder)
        contents = [path.read_bytes() for path in kinds]
        if options.only is not None:
            kind, mutation, content = mutate(contents, options.only)
            path = Path(tempfile.gettempdir()) / f"fuzz_{options.only}_{mutation}_{kinds[kind].name}"
            path.write_bytes(content)
            print(path, judge(path))
            return
        paths = []
        for number in range(options.first, options.first + options.files):
            kind, mutation, content = mutate(contents, number)
            paths.append(folder / f"{number}_{mutation}_{kinds[kind].name}")
            paths[-1].write_bytes(content)
        for number, outcome in run(paths, options.jobs):
            counts[outcome["outcome"]] += 1
            if outcome["outcome"] in BAD:
                print(paths[number].name, json.dumps(outcome), flush=True)
    print(json.dumps(counts))
    if any(counts[bad] for bad in BAD):
        sys.exit(1)


if __name__ == "__main__":
    main()
