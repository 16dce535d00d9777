# SPDX-License-Identifier: Apache-2.0
"""Pictures of moments, kept in the folder of an index: `thumbnails/KEY.jpg`, where a key is by content.

`camoe index` makes them of frames that are decoded for the model anyway; what is missing, the server makes and keeps
when it is asked for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL import Image

    from modeling_camoe.frames import SampledFrames


FOLDER = "thumbnails"
SIZE = 320  # pixels of the long side
QUALITY = 75  # of a JPEG


def as_jpeg(sampled: SampledFrames) -> bytes | None:
    """The preview of a clip, if it was decoded with one."""
    if sampled.preview is None:
        return None
    from PIL import Image

    return encode_jpeg(Image.fromarray(sampled.preview.permute(1, 2, 0).numpy()))


def encode_jpeg(picture: Image.Image) -> bytes:
    """A picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


def thumbnail_path(folder: Path, key: str) -> Path:
    """Where the picture of a moment is, or would be."""
    return folder / FOLDER / f"{key}.jpg"


def keep_thumbnail(folder: Path, key: str, content: bytes):
    """Put a picture beside the index, if that is possible: the folder may be read-only, or the disk full."""
    path = thumbnail_path(folder, key)
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
        partial.write_bytes(content)
        partial.replace(path)


def delete_thumbnails(folder: Path, keep: Container[str] = ()):
    """Delete all pictures but those of these moments."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder / FOLDER) as entries:
        for entry in entries:
            if not (entry.name.endswith(".jpg") and entry.name.removesuffix(".jpg") in keep):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
