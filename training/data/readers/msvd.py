# SPDX-License-Identifier: Apache-2.0
"""MSVD (Chen and Dolan, ACL 2011): 1,970 clips with about 40 captions each.

Files, as in CLIP4Clip's release: train_list.txt, val_list.txt, test_list.txt (one video id per line) and
raw-captions.pkl (video id -> captions, each a list of words or a text).
"""

import io
import pickle
from pathlib import Path

from ..errors import UserError
from .common import Splits, add_captions, caption_list, read_bytes, read_lines


PLAIN_CONTAINERS = {("collections", name) for name in ("OrderedDict", "defaultdict")} | {
    (module, name) for module in ("builtins", "__builtin__") for name in ("list", "dict", "set", "frozenset")
}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists and strings; refuses everything that could run code."""

    def find_class(self, module, name):
        if (module, name) in PLAIN_CONTAINERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only lists of words")


def read_msvd(folder: Path, windows: bool = False) -> Splits:
    """train, validation and test, with every caption of every video."""
    path = folder / "raw-captions.pkl"
    described = _unpickle(path)
    if not isinstance(described, dict):
        raise UserError(f"{path} holds a {type(described).__name__}, not the captions by video; download it again")
    captions = {video: caption_list(value, path, video) for video, value in described.items()}
    for video, texts in captions.items():
        if len(texts) > 2 and not any(" " in text for text in texts):
            raise UserError(
                f"{path}: the captions of video {video!r} are single words, {texts[:3]}: give a list of captions, "
                "each a text or a list of words"
            )

    splits = {}
    for name, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed_in = folder / f"{file}_list.txt"
        splits[name] = add_captions(read_lines(listed_in), captions, listed_in, path)
    return splits


def _unpickle(path: Path):
    content = read_bytes(path)
    for encoding in ("utf-8", "cp1252", "latin-1"):  # of the byte strings of Python 2
        try:
            return RestrictedUnpickler(io.BytesIO(content), encoding=encoding).load()
        except UnicodeDecodeError:
            continue
        except Exception as error:  # a damaged pickle raises almost any type
            raise UserError(f"cannot read {path}: {error}; download it again") from error
