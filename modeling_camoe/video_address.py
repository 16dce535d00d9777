# SPDX-License-Identifier: Apache-2.0
"""
Videos at addresses (`s3://`, `gs://`, `hf://`, `https://`, `zip://a.mp4::clips.zip`, ...), opened by fsspec and read
by ranges: what a decoder does not ask for is not transferred.

Credentials are fsspec's: environment variables, its configuration files, those of the clouds' own tools. Each kind of
address needs a package (`s3://`: s3fs), which fsspec names if it is missing.
"""

import contextlib
import io
import os

from .video_source import VideoDecodingError, without_secrets


# Bytes of a request. A frame in the middle of ten minutes needs about half a group of pictures, some 300 KB: smaller
# blocks would be many requests in turn, larger ones would transfer much that no frame needs.
BLOCK_BYTES = 2**17
MAX_BLOCKS = 128  # kept of a file while it is open: 16 MB


class RemoteFile:
    """
    A file at an address, open for as long as it is decoded. Its readers share what was transferred.

    Not for several threads at once, nor across a fork. An error of the network is kept, because FFmpeg would take the
    place where it happened for the end of the file.

    Raises:
        VideoDecodingError: there is no such file, it may not be read, or the package for such addresses is not
            installed; the message names it and the cause.
    """

    def __init__(self, address: str):
        self.name = without_secrets(address)
        self._has_secrets = self.name != address
        self.error: Exception | None = None
        with self._named_errors():
            import fsspec  # comes with torch and the client of the Hub

            self._system, self._path = fsspec.core.url_to_fs(address)
            self._file = self._system.open(
                self._path, "rb", block_size=BLOCK_BYTES, cache_type="blockcache",
                cache_options={"maxblocks": MAX_BLOCKS},
            )  # fmt: skip
            try:
                self.size = self._file.seek(0, os.SEEK_END)
            except ValueError:  # a server that does not say the size: it comes as a stream
                self._read_whole()
                self.size = self._file.seek(0, os.SEEK_END)

    def close(self):
        self._file.close()

    def read_at(self, position: int, count: int) -> bytes:
        """At most `count` bytes from a position on."""
        if self.error is not None:
            raise self.error
        with self._named_errors():
            self._file.seek(position)
            try:
                return self._file.read(count)
            except ValueError:  # a server without ranges
                self._read_whole()
                self._file.seek(position)
                return self._file.read(count)

    def reader(self) -> "RemoteReader":
        """A file object with a position of its own."""
        return RemoteReader(self)

    def _read_whole(self):
        self._file = io.BytesIO(self._system.cat_file(self._path))

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except VideoDecodingError:
            raise
        except Exception as error:  # each kind of storage has errors of its own, and some are no OSError
            self.error = VideoDecodingError(f"{self.name}: {self._cause(error)}")
            # The traceback of an HTTP error has the whole address, where a query may hold a secret.
            raise self.error from (None if self._has_secrets else error)

    def _cause(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            return f"cannot be read ({error})"  # names the package
        if self.name.lower().startswith("http"):  # "no such file" stands for whatever went wrong there
            error = error.__cause__ or error
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            return "no such file"
        if isinstance(error, PermissionError) or status in (401, 403):
            return "cannot be read (access is refused: check the credentials)"
        message = str(status or "") if self._has_secrets else " ".join(str(error).split())[:200]
        return f"cannot be read ({type(error).__name__}{': ' * bool(message)}{message})"


class RemoteReader(io.RawIOBase):
    """What FFmpeg reads from: a position in a [`RemoteFile`]."""

    def __init__(self, file: RemoteFile):
        self._file, self._position = file, 0
        self.name = file.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, count: int = -1) -> bytes:
        count = self._file.size - self._position if count is None or count < 0 else count
        content = self._file.read_at(self._position, count) if count > 0 else b""
        self._position += len(content)
        return content

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


__all__ = ["RemoteFile"]
