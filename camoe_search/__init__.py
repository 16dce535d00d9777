# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Index a folder of videos and search it: `camoe index`, `camoe search`, `camoe serve`, and [`VideoIndex`] in Python.

`VideoIndex` is loaded on first use, so that `camoe --help` does not wait for torch.
"""


def __getattr__(name: str):
    if name == "VideoIndex":
        from .index import VideoIndex

        return VideoIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["VideoIndex"]
