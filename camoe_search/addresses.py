# SPDX-License-Identifier: Apache-2.0
"""Files at addresses (`s3://`, `gs://`, `hf://`, `https://`, `zip://a.mp4::clips.zip`), as fsspec knows them.

fsspec is imported on use, and so is the package of a kind of storage, whose credentials are its own.
"""

import datetime
import hashlib
import os
import re

from .errors import SearchError


# At least two letters before the colon: C://clip.mp4 is a file. A `file://` address is a path; see `files.absolute`.
ADDRESS = re.compile(r"(?!file://|local://)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# What storages call the time of a change, and a checksum of the content.
TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "Last-Modified", "created")
CHECKSUMS = ("ETag", "etag", "sha256", "md5Hash", "blob_id", "CRC", "Content-MD5")
HASH_BLOCK = 1 << 16  # bytes of a block where the storage states no checksum
HASH_BLOCKS = 8


def is_address(path: str | os.PathLike) -> bool:
    return ADDRESS.match(os.fspath(path)) is not None


def open_system(address: str) -> tuple:
    """The file system of an address, and the address's path in it.

    Raises:
        SearchError: no package knows such addresses.
        ImportError: the package that knows them is not installed; names it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except ValueError as error:
        raise SearchError(f"{address} cannot be opened: {error}") from error


def exists(address: str) -> bool:
    system, path = open_system(address)
    return _web_type(address) is not None if _is_web(address) else system.exists(path)


def is_folder(address: str) -> bool:
    system, path = open_system(address)
    if _is_web(address) and "html" not in (_web_type(address) or ""):
        return False  # only a page has links
    return system.isdir(path)


def _is_web(address: str) -> bool:
    return address.lower().startswith("http")


def _web_type(address: str) -> str | None:
    """What kind of file a web server says it has there; None: none. (fsspec would ask for all of a video to see.)"""
    try:
        return _info(address).get("mimetype", "")
    except OSError:
        return None


def stat(address: str) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns (where that is not known, what stands for it).

    Raises:
        OSError: it cannot be read.
    """
    info = _info(address)
    return info["size"] or 0, _time_of(info)


def list_files(address: str) -> dict[str, tuple[int, int]]:
    """All files below a folder: address -> size and time as of `stat`.

    Raises:
        SearchError: it cannot be listed.
    """
    system, path = open_system(address)
    if "::" in address:
        raise SearchError(f"{address} is a folder of an archive: give its files, or `camoe encode` a list of them")
    protocol = address[: address.index("://") + 3]
    try:
        system.invalidate_cache()
        found = system.find(path, detail=True)
    except Exception as error:  # each storage has errors of its own
        raise SearchError(f"{address} cannot be listed ({type(error).__name__}: {_one_line(error)})") from error
    return {
        name if is_address(name) else protocol + name.lstrip("/"): (info["size"] or 0, _time_of(info))
        for name, info in found.items()
    }


def content_hash(address: str) -> str:
    """128-bit hash, in hexadecimal: of the size and the checksum that the storage states, so that nothing is read;
    where it states none, of the size and of some blocks.

    Raises:
        OSError: it cannot be read.
    """
    system, path = open_system(address)
    info = _info(address)
    size = info["size"] or 0
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    checksum = next((str(info[name]) for name in CHECKSUMS if info.get(name)), None)
    if checksum is not None:
        digest.update(checksum.strip('"').encode())
        return digest.hexdigest()
    last = max(0, size - HASH_BLOCK)
    try:
        for start in sorted({last * number // (HASH_BLOCKS - 1) for number in range(HASH_BLOCKS)}):
            digest.update(system.cat_file(path, start=start, end=min(start + HASH_BLOCK, size)))
    except Exception as error:
        raise OSError(_one_line(error)) from error
    return digest.hexdigest()


def _info(address: str) -> dict:
    system, path = open_system(address)
    try:
        system.invalidate_cache(system._parent(path))  # a list made earlier would hide a change
        return system.info(path)
    except OSError:
        raise
    except Exception as error:
        raise OSError(_one_line(error)) from error


def _time_of(info: dict) -> int:
    value = next((info[name] for name in (*TIMES, *CHECKSUMS) if info.get(name) is not None), 0)
    if isinstance(value, datetime.datetime):
        return int(value.timestamp() * 1e9)
    if isinstance(value, int | float):
        return int(value * 1e9) if value < 1e11 else int(value)
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=7).digest())  # 56 bits: a date as text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
