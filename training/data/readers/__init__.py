# SPDX-License-Identifier: Apache-2.0
"""Public annotation files of the five benchmarks -> splits of `AnnotatedClip`. One module per benchmark."""

from pathlib import Path

from ..errors import UserError
from .activitynet import read_activitynet
from .common import AnnotatedClip, Splits
from .didemo import read_didemo
from .hub import read_hub
from .lsmdc import read_lsmdc
from .msrvtt import read_msrvtt
from .msvd import read_msvd


# Benchmark -> the file by which its annotations are recognised, and their reader.
BENCHMARKS = {
    "msrvtt": ("MSRVTT_data.json", read_msrvtt),
    "msvd": ("raw-captions.pkl", read_msvd),
    "lsmdc": ("LSMDC16_challenge_1000_publictect.csv", read_lsmdc),
    "didemo": ("test_data.json", read_didemo),
    "activitynet": ("val_1.json", read_activitynet),
}


def read_annotations(benchmark: str, annotations: str, windows: bool = False) -> Splits:
    """Read a benchmark's annotations in any of their public layouts.

    Args:
        benchmark: a key of `BENCHMARKS`. annotations: folder of the published files, clone of a Hub repository, or Hub
            id. windows: one clip per timed sentence instead of one paragraph per video (didemo, activitynet).

    Raises:
        UserError: they are missing, are another benchmark's, or a file is malformed.
    """
    folder = Path(annotations)
    if not folder.is_dir():
        if annotations.startswith((".", "/", "~")) or annotations.count("/") != 1:
            raise UserError(f"the annotation folder {annotations} does not exist")
        return read_hub(benchmark, annotations, windows)
    marker, reader = BENCHMARKS[benchmark]
    if (folder / marker).is_file():
        return reader(folder, windows)
    for other, (other_marker, _) in BENCHMARKS.items():
        if (folder / other_marker).is_file():
            raise UserError(
                f"{folder} has {other_marker}: these are the annotations of {other}, not of {benchmark}; "
                f"run prepare_benchmark.py {other}, or give the folder that has {marker}"
            )
    if (folder / "README.md").is_file() or any(folder.rglob("*.parquet")):
        return read_hub(benchmark, annotations, windows)
    raise UserError(
        f"{folder} has neither {marker} nor the README.md of a Hub data set: give the folder that holds {marker}"
    )


__all__ = ["BENCHMARKS", "AnnotatedClip", "Splits", "read_annotations"]
