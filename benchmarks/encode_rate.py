# SPDX-License-Identifier: Apache-2.0
"""What `camoe encode` adds to decoding and the model: headers, hashes, windows, tables and Parquet files.

    python benchmarks/encode_rate.py                    a model of 2 layers, some minutes
    python benchmarks/encode_rate.py --layers 12        of ViT-B/32 shapes

The limit is the bare loop, `encode_videos` over the same clips. Both run in this process, in turns, without workers,
and their own time (CPU) is compared, so that what else the machine does matters little.
"""

import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch
from clips import write_clip
from harness import compare, finish, in_turns, parser
from startup import save_models

from camoe_search.encode_parts import encode_parts
from camoe_search.encoder import CAMoEEncoder
from camoe_search.parts import PartFolder, plan_parts
from camoe_search.prepare import IndexOptions, describe_index
from modeling_camoe.encode import encode_videos


GOAL = 0.9  # of the bare loop's rate


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--clips", type=int, default=24)
    arguments.add_argument("--seconds", type=float, default=10.0, help="of a clip")
    arguments.add_argument("--layers", type=int, default=2, help="of the model's towers")
    arguments.add_argument("--batch-size", type=int, default=8)
    options = arguments.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other would count
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name, _ = save_models(folder, options.layers)
        encoder = CAMoEEncoder.from_pretrained(str(name), device="cpu")
        first = write_clip(folder / "clip_0.mp4", options.seconds, (426, 240), gop=250)
        paths = [str(first)]
        for n in range(1, options.clips):
            paths.append(str(folder / f"clip_{n}.mp4"))
            Path(paths[-1]).write_bytes(first.read_bytes() + n * b"\0")  # another content, the same pictures
        description = describe_index(encoder, None, IndexOptions())
        manifest = pa.table({"path": paths})

        def engine():
            with tempfile.TemporaryDirectory() as out:
                target = PartFolder(out)
                parts, _ = plan_parts(manifest, description, target)
                reports = encode_parts(
                    parts, target, encoder, description, batch_size=options.batch_size, num_workers=0
                )
                moments = sum(report.moments for report in reports)
            if moments != options.clips:
                raise SystemExit(f"{moments} moments of {options.clips} clips")

        calls = {
            "engine": engine,
            "bare": lambda: encode_videos(encoder.model, encoder.processor, paths, batch_size=options.batch_size),
        }
        seconds = in_turns(calls, options.repeats, clock=time.process_time)
    line = compare(
        f"local engine, {options.clips} clips of {options.seconds:g} s", seconds["engine"], seconds["bare"],
        "decoding and model alone", goal=GOAL,
    )  # fmt: skip
    finish("encode_rate", [line], options)


if __name__ == "__main__":
    main()
