# SPDX-License-Identifier: Apache-2.0
"""MSVD (Chen and Dolan, ACL 2011): 1,970 clips with about 40 captions each.

Files, as in CLIP4Clip's release: train_list.txt, val_list.txt, test_list.txt (one video id per line) and
raw-captions.pkl (video id -> captions, each a list of words).
"""

import pickle
from pathlib import Path

from ..errors import UserError
from .common import Splits, add_captions, read_lines


class RestrictedUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists and strings; refuses everything that could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only lists of words")


def read_msvd(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test, with every caption of every video."""
    path = folder / "raw-captions.pkl"
    try:
        with path.open("rb") as file:
            tokens = RestrictedUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    captions = {video: [" ".join(words) for words in sentences if words] for video, sentences in tokens.items()}

    splits = {}
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed_in = folder / f"{file}_list.txt"
        splits[name] = add_captions(read_lines(listed_in), captions, listed_in, path)
    return splits
