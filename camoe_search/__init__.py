# SPDX-License-Identifier: Apache-2.0
"""Index a folder of videos and search it: `camoe index`, `camoe search`, `camoe serve`, and [`VideoIndex`] in Python.

`VideoIndex` is imported on first use, so that `camoe --help` does not wait for torch.
"""


def __getattr__(name: str):
    if name == "VideoIndex":
        try:
            from .index import VideoIndex
        except ModuleNotFoundError as error:
            raise ImportError(missing_package(error)) from error
        return VideoIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def missing_package(error: ModuleNotFoundError) -> str:
    """What to say where a package of the extra `search` is not installed."""
    return f"{error.name or error} is not installed: camoe_search needs `pip install 'camoe[search]'`"


__all__ = ["VideoIndex"]
