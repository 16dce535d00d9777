# SPDX-License-Identifier: Apache-2.0
"""Before an index is updated: its options, and the index itself, made or found to fit them."""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling_camoe.frames import ON_DAMAGE

from .bank import QueryBank, load_model_bank, subsample
from .database import Description, connect, create, exists, read_description, transaction, write_description
from .encoder import Encoder
from .errors import SearchError
from .shots import check_shots
from .thumbnails import delete_thumbnails
from .writer import IndexWriter


@dataclass(frozen=True)
class IndexOptions:
    """How to index. None keeps what an existing index has; the comments give the default of a new one."""

    windows: str | None = None  # what cuts a video: "time" (default) or "shots", which needs the extra `shots`
    window: float | None = None  # seconds; 0: whole files; default: depends on the duration, see `files.cut_windows`
    stride: float | None = None  # seconds from one start to the next; default: half a window
    dtype: str | None = None  # of the stored vectors: "float32" (default) or "float16"
    exclude: Sequence[str] | None = None  # patterns of files and folders to leave out; default: none
    on_damage: str | None = None  # "error" (default), or "around": frames of damaged files from around the damage
    queries: list[str] | None = None  # texts of the query bank; default: the training captions saved with the model
    tau: float | None = None  # temperature of the bank; default: the one that the model's evaluation chose
    milvus: dict | None = None  # settings of a collection that holds a copy, see milvus_store.py; default: none
    batch_size: int = 16  # moments per forward pass
    num_workers: int = 2  # processes that decode
    prune: bool = False  # remove files that are no longer there
    retry: bool = False  # read files again that could not be read
    rebuild: bool = False  # empty the index first
    thumbnails: bool = True  # keep a picture of each new moment, for the page
    text_encoder: bool = True  # export the text tower, for searches that need no torch
    progress: bool = False  # show progress bars


def check_model(encoder: Encoder, description: Description):
    """
    Raises:
        SearchError: the model is not the one that made the index.
    """
    if encoder.weights != description.weights:
        raise SearchError(
            f"the index was made with {description.model} (weights {description.weights[:8]}), "
            f"but {encoder.name} has weights {encoder.weights[:8]}: use that model, or index again with --rebuild"
        )


def prepare_index(folder: Path, encoder: Encoder, options: IndexOptions):
    """Make the index if there is none, or check that the settings are its own."""
    if options.milvus is not None:
        from .milvus_store import MilvusStore

        MilvusStore(options.milvus["uri"], options.milvus["collection"]).close()  # it answers
    if exists(folder) and not options.rebuild:
        with contextlib.closing(connect(folder, write=True)) as connection:
            old = read_description(connection)
            description = describe_index(encoder, old, options)
            if description != old:
                with transaction(connection):
                    write_description(connection, description)
                    if old.milvus is not None and description.milvus["id"] != old.milvus["id"]:
                        connection.execute("DELETE FROM sent")  # another collection, or another name in it
            # A run that was killed between making the index and setting its bank has seen no folder yet.
            is_unfinished = old.tau is None and not connection.execute("SELECT 1 FROM roots").fetchone()
        if options.queries is not None or options.tau is not None or is_unfinished:
            with IndexWriter(folder) as writer:
                writer.set_bank(choose_bank(encoder, writer.bank, options.queries, options.tau))
        return
    if not exists(folder) and not options.rebuild and (folder / "index.json").is_file():
        connect(folder)  # of an earlier version: says what to do
    bank = choose_bank(encoder, None, options.queries, options.tau)
    description = describe_index(encoder, None, options)
    if exists(folder):
        with contextlib.closing(connect(folder)) as connection:
            old = read_description(connection)  # its rows in Milvus stay its own
        description = dataclasses.replace(description, milvus=_copy_settings(options, old))
        _empty(folder, description)
    else:
        create(folder, description)
        _delete_earlier_version(folder)
    with IndexWriter(folder) as writer:
        writer.set_bank(bank)


def describe_index(encoder: Encoder, old: Description | None, options: IndexOptions) -> Description:
    """How vectors are made. An existing index keeps its settings, or its rows would not be comparable."""
    wanted = Description(
        model=encoder.name,
        weights=encoder.weights,
        experts=list(encoder.experts),
        dim=encoder.dim,
        num_frames=encoder.num_frames,
        sampling=encoder.sampling,
        windows=options.windows or "time",
        on_damage=options.on_damage or "error",
        window=options.window,
        stride=options.stride,
        dtype=options.dtype or "float32",
        exclude=list(options.exclude or ()),
        milvus=_copy_settings(options, old),
    )
    if wanted.dtype not in ("float32", "float16"):
        raise SearchError(f"dtype is {wanted.dtype!r}: choose float32 or float16")
    if wanted.windows not in ("time", "shots"):
        raise SearchError(f"windows is {wanted.windows!r}: choose time or shots")
    if "shots" in (wanted.windows, old and old.windows):
        check_shots()
    if wanted.on_damage not in ON_DAMAGE:
        raise SearchError(f"on_damage is {wanted.on_damage!r}: choose {' or '.join(ON_DAMAGE)}")
    if old is None:
        return wanted
    check_model(encoder, old)
    for name in ("num_frames", "sampling", "windows", "window", "stride", "dtype"):
        before, now = getattr(old, name), getattr(wanted, name)
        is_default = name in ("windows", "dtype") and getattr(options, name) is None
        if now is not None and now != before and not is_default:
            raise SearchError(
                f"the index was made with {name} {before}, not {now}: leave it out, or index again with --rebuild"
            )
    return dataclasses.replace(
        old,
        model=encoder.name,
        on_damage=options.on_damage or old.on_damage,
        exclude=old.exclude if options.exclude is None else list(options.exclude),
        milvus=wanted.milvus,
    )


def _copy_settings(options: IndexOptions, old: Description | None) -> dict | None:
    """Where Milvus holds a copy, None if nowhere."""
    if options.milvus is None:
        return None if old is None else old.milvus
    from .milvus_collection import with_id

    return with_id(options.milvus, None if old is None else old.milvus)


def _empty(folder: Path, description: Description):
    """Remove everything from an index, and give it new settings. Numbers of segments are not used again."""
    delete_thumbnails(folder)  # numbers of windows mean other times
    with contextlib.closing(connect(folder, write=True)) as connection, transaction(connection):
        # `sent` stays: the next synchronisation deletes in Milvus what the index no longer has.
        for table in ("bias", "bank", "windows", "files", "contents", "roots", "segments"):
            connection.execute(f"DELETE FROM {table}")
        write_description(connection, description)


def _delete_earlier_version(folder: Path):
    for path in [*folder.glob("generation-*"), folder / "shards"]:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("index.json", "skipped.jsonl"):
        (folder / name).unlink(missing_ok=True)


def choose_bank(encoder: Encoder, old: QueryBank | None, queries, tau: float | None) -> QueryBank | None:
    """The requested query bank, or the index's with another temperature, or the model's; None if there is none."""
    if queries is None and old is not None:
        return dataclasses.replace(old, tau=tau or old.tau)
    tau = tau or (None if old is None else old.tau)
    if queries is None or tau is None:  # otherwise there is no need to look beside the model, perhaps on the Hub
        texts, model_tau = load_model_bank(encoder.name)
        tau = tau or model_tau
    if queries is not None:
        texts = subsample([text for text in queries if text.strip()])
        if not texts:
            raise SearchError("the query bank is empty: give one query per line")
    return QueryBank(texts, encoder.encode_texts(texts), tau) if texts else None
