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
"""MSVD (Chen and Dolan, ACL 2011): 1,970 clips, some 40 captions each.

Files, as CLIP4Clip's release has them: train_list.txt, val_list.txt, test_list.txt (a video id a line) and
raw-captions.pkl (video id -> captions, each a list of words).
"""

import pickle
from pathlib import Path

from recipe import UserError

from .common import Splits, captioned, read_lines


class PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists and strings, and refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only lists of words")


def read_msvd(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test, every caption of every video."""
    path = folder / "raw-captions.pkl"
    try:
        with path.open("rb") as file:
            tokens = PlainUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    captions = {video: [" ".join(words) for words in sentences if words] for video, sentences in tokens.items()}

    splits = {}
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed_in = folder / f"{file}_list.txt"
        splits[name] = captioned(read_lines(listed_in), captions, listed_in, path)
    return splits
