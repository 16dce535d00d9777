# SPDX-License-Identifier: Apache-2.0
"""Damages video files of 20 kinds at random, and holds `sample_frames` to a plain full decode of each.

    python tests/decode_fuzz.py                     1,000 files, about half an hour on two cores
    python tests/decode_fuzz.py --files 60          what the tests run
    python tests/decode_fuzz.py --only 17           one file again, in this process

Files are written by the tests' own writer, then bits are flipped, blocks zeroed, the end cut off, two files joined, or
header fields overwritten. Each is decoded in a process of its own. Wanted: no crash, nothing that takes over 30 s, no
exception but VideoDecodingError, and where a plain decode reports no damage, no frame that differs from it by more
than 2 levels on average.
"""

import argparse
import collections
import json
import multiprocessing
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import av
import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_camoe.frames import VideoDecodingError, sample_frames
from modeling_camoe.pictures import PictureMaker
from tests.video_files import KINDS, write_video


MORE_KINDS = {"h263.3gp": {"codec": "h263", "size": (128, 96), "fps": 25, "options": {"g": "12", "b": "2000000"}}}
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


def plain_decode(path: Path) -> tuple[list, bool]:
    """([(pts or None, image)], whether damage was reported), by PyAV alone, with one thread."""
    frames, is_damaged = [], False
    with av.open(str(path), metadata_errors="replace") as container:
        streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        stream = container.streams.best("video") if len(streams) > 1 else streams[0]
        stream.thread_type = "NONE"
        make_picture = PictureMaker(SIZE, float(stream.sample_aspect_ratio or 1))
        packets = container.demux(stream)
        for packet in packets:
            if not packet.size and packet.pts is not None:
                continue
            try:
                decoded = packet.decode()
            except av.EOFError:
                continue
            except av.FFmpegError:
                is_damaged = True
                continue
            is_damaged |= packet.is_corrupt or any(frame.is_corrupt for frame in decoded)
            frames += [(frame.pts, make_picture(frame)) for frame in decoded]
    return frames, is_damaged


def judge(path: Path) -> dict:
    """What is wrong with the frames of a file, if anything."""
    begin = time.monotonic()
    try:
        sampled = sample_frames(path, NUM_FRAMES, size=SIZE)
    except VideoDecodingError as error:
        return {"outcome": "refused", "cause": str(error).replace(str(path), "FILE")}
    except Exception as error:
        return {"outcome": "exception", "cause": repr(error), "trace": traceback.format_exc()[-500:]}
    finally:
        seconds = time.monotonic() - begin
    for _ in range(3):  # FFmpeg does not decode every damaged file alike each time
        try:
            frames, is_damaged = plain_decode(path)
        except Exception as error:
            return {"outcome": "only ours decodes it", "cause": repr(error), "seconds": seconds}
        difference = largest_difference(sampled.frames.numpy(), [image for _, image in frames])
        if is_damaged or difference <= 2:
            break
    outcome = "damaged but taken" if is_damaged else "wrong frames" if difference > 2 else "right"
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
        for number in range(options.files):
            kind, mutation, content = mutate(contents, number)
            paths.append(folder / f"{number}_{mutation}_{kinds[kind].name}")
            paths[-1].write_bytes(content)
        for number, outcome in run(paths, options.jobs):
            counts[outcome["outcome"]] += 1
            if outcome["outcome"] not in ("right", "refused", "damaged but taken", "only ours decodes it"):
                print(paths[number].name, json.dumps(outcome), flush=True)
    print(json.dumps(counts))
    if any(counts[bad] for bad in ("crash", "hang", "exception", "wrong frames")):
        sys.exit(1)


if __name__ == "__main__":
    main()
