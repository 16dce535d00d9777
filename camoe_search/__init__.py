# SPDX-License-Identifier: Apache-2.0
"""Index a folder of videos and search it: `camoe index`, `camoe search`, `camoe serve`, and [`VideoIndex`] in Python.

`VideoIndex` is imported on first use, so that `camoe --help` does not wait for torch.
"""


def __getattr__(name: str):
    if name == "VideoIndex":
        from .index import VideoIndex

        return VideoIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["VideoIndex"]
