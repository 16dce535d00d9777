# SPDX-License-Identifier: Apache-2.0
"""The command `camoe`: index, search, serve, remove, calibrate, optimize, info, export, encode, load, push.

Torch and the models are imported when a command needs them: `camoe --help` answers at once, and so do commands that
load no model. A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import contextlib
import json
import logging
import os
import sqlite3
import sys
from pathlib import Path

from . import missing_package
from .cli_parser import make_parser
from .errors import SearchError
from .files import read_lines


SHOWN_CAUSES = 3  # of skipped files; `camoe info --skipped` has all of them


def main(argv: list[str] | None = None):
    """Entry point of the console script."""
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")  # our own notes go to stderr as they are
    # Libraries that load models and data sets show bars: a search should print results only.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        run = COMMANDS[options.command] if options.command in COMMANDS else options.run  # cli_encode.py has its own
        run(options)
    except BrokenPipeError:  # `camoe search … | head` stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        _fail(missing_package(error))
    except (SearchError, ImportError, OSError, sqlite3.Error) as error:
        _fail(error)
    except ValueError as error:
        from modeling_camoe.frames import VideoDecodingError

        if not isinstance(error, VideoDecodingError):
            raise
        _fail(error)


def _fail(error: Exception | str):
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


# --- commands --------------------------------------------------------------------------------------------------------


def _index(options):
    from .database import exists

    if options.stride is not None and not options.window:
        raise SearchError("--stride needs a --window of more than 0 seconds")
    if options.model is None and not exists(options.index):
        if (Path(options.index) / "index.json").is_file():
            from .database import connect

            connect(options.index)  # an index of an earlier version: says what to do
        raise SearchError("--model is missing: a new index needs a checkpoint folder or a Hub id")
    paths = [*options.paths, *(read_lines(options.files_from) or ())]
    if options.files_from and not paths:
        raise SearchError(f"{options.files_from} names no file")
    milvus = _milvus_settings(options)
    index = _build(options, paths, milvus)
    from .encoder import process_group

    if not process_group().is_main_process:  # only one of several processes prints
        return
    _print_report(index.report, options)
    if options.watch:
        from .watch import changes

        print("watching; Ctrl-C ends it", file=sys.stderr)
        roots = [root for (root,) in index.store.select("SELECT path FROM roots")]
        for _ in changes(paths or roots, options.index):
            index.report = index.add(paths, **_settings(options, milvus) | {"rebuild": False})
            report = index.report
            if report.added or report.changed or report.moved or report.dropped:
                _print_report(report, options)


def _build(options, paths: list[str], milvus: dict | None):
    from .index import VideoIndex

    return VideoIndex.create_or_update(
        paths,
        options.index,
        options.model,
        sampling=options.sampling,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        **_settings(options, milvus),
    )


def _settings(options, milvus: dict | None) -> dict:
    """The fields of `update.IndexOptions`."""
    names = "windows window stride dtype on_damage exclude tau batch_size num_workers prune retry rebuild".split()
    return {name: getattr(options, name) for name in names} | {
        "queries": read_lines(options.bank),
        "milvus": milvus,
        "thumbnails": options.thumbnails,
        "text_encoder": not options.no_text_tower,
        "progress": sys.stderr.isatty(),
    }


def _milvus_settings(options) -> dict | None:
    """What --store milvus and its options say; None without it."""
    if options.store is None:
        for name in ("uri", "collection", "source", "milvus_index", "milvus_params", "milvus_dtype", "milvus_bias"):
            if getattr(options, name) is not None:
                raise SearchError(f"--{name.replace('_', '-')} is for Milvus: give --store milvus with it")
        return None
    from .milvus_collection import settings

    return settings(
        options.uri,
        options.collection,
        options.source,
        options.index,
        options.milvus_index,
        options.milvus_params,
        options.milvus_dtype,
        options.milvus_bias,
    )


def _print_report(report, options):
    import dataclasses

    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2), flush=True)
        return
    print(
        f"{report.added} files added, {report.changed} changed, {report.moved} moved, {report.unchanged} unchanged, "
        f"{report.dropped} dropped in {report.seconds:.1f} s; {options.index} has {report.moments} moments"
    )
    if report.written or report.deleted:
        print(f"Milvus: {report.written} moments written, {report.deleted} deleted")
    if report.damaged:
        print(f"frames of {report.damaged} moments were taken around damage")
    if report.skipped:
        print(f"skipped {len(report.skipped)}; all causes: camoe info --skipped --index {options.index}")
        for entry in report.skipped[:SHOWN_CAUSES]:
            print(f"  {entry['cause']}")
        if len(report.skipped) > SHOWN_CAUSES:
            print("  …")
    if report.not_videos:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.not_videos.items()))
        print(f"ignored, not videos by their names: {kinds}")
    if report.text_encoder:
        print(f"the text tower could not be exported, so a search loads the whole model: {report.text_encoder}")
    sys.stdout.flush()


def _open(options, folder: str | None):
    """The index to search."""
    if (folder is None) == (options.uri is None):
        raise SearchError("give either the folder of an index, --index DIR, or --uri of Milvus, one of them")
    from .index import VideoIndex

    model = {"model": options.model, "device": options.device, "trust_remote_code": options.trust_remote_code}
    if options.uri is not None:
        return VideoIndex.connect(options.uri, options.collection, **model)
    if options.collection is not None:
        raise SearchError("--collection needs --uri")
    return VideoIndex.load(folder, **model)


def _search(options):
    texts = ([] if options.text is None else [(options.text, 1.0)]) + options.texts
    parts = [options.like, options.then, *options.negative, *texts, *(["words"] if options.words else ())]
    if options.queries is not None and any(part is not None for part in parts):
        raise SearchError("--queries FILE has the texts: give it alone, or a text, --like and so on")
    if options.queries is None and not texts and options.like is None:
        raise SearchError("give a text, --like FILE or --queries FILE")
    if options.like is not None and not texts and options.correction not in (None, "none"):
        raise SearchError(f"--correction {options.correction} is for texts: with --like, leave it out")
    from . import show
    from .results import FILTER_NAMES

    index = _open(options, options.index)
    settings = {name: getattr(options, name) for name in FILTER_NAMES} | {
        "k": options.k,
        "correction": options.correction,
        "experts": dict(options.expert),
        "merge": not options.no_merge,
        "group_by": options.group_by,
        "min_score": options.min_score,
    }
    if options.queries is not None:
        queries = read_lines(options.queries)
        for query, hits in zip(queries, index.search_batch(queries, **settings), strict=True):
            print(json.dumps({"query": query, "hits": show.json_rows(hits)}, ensure_ascii=False))
        return
    query = {"like": options.like, "negative": options.negative, "then": options.then, "words": options.words}
    hits = index.search(texts or None, **query, **settings)
    print(json.dumps(show.json_rows(hits), indent=2, ensure_ascii=False) if options.json else show.format_table(hits))
    if options.grid:
        show.thumbnail_grid(hits).save(options.grid, format="PNG")


def _serve(options):
    from . import serve

    folders = options.index or [None]
    if options.model is not None and len(folders) > 1:
        raise SearchError("--model is for one index: leave it out, each index knows its own")
    token = None if options.token_file is None else serve.read_token(options.token_file)
    listener = serve.listen(options.host, options.port, token)
    indexes = {}
    for folder in folders:
        name = os.path.basename(os.path.abspath(folder)) if folder else options.collection or "camoe"
        if name in indexes:
            raise SearchError(f"two indexes have the name {name}: rename one of the folders")
        indexes[name] = index = _open(options, folder)
        index.encode_texts(["ready"])  # loads model and tagger now, not at the first query
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    count = sum(len(index) for index in indexes.values())
    print(f"serving {count} moments at http://{host}:{port} (Ctrl-C to stop)", flush=True)
    serve.serve(indexes, listener, options.page_size, token, options.access_log)


def _remove(options):
    if options.source is not None:
        if options.patterns or options.index or options.uri is None:
            raise SearchError("--source goes with --uri alone: it removes rows from Milvus, not from an index folder")
        from .milvus_store import DEFAULT_COLLECTION, MilvusStore

        with contextlib.closing(MilvusStore(options.uri, options.collection or DEFAULT_COLLECTION)) as store:
            count = store.remove_source(options.source)
        print(json.dumps({"moments": count}) if options.json else f"removed {count} moments of {options.source}")
        return
    if options.index is None or not options.patterns:
        raise SearchError("give --index DIR and what to remove: files, folders or patterns")
    from .remove import remove_files

    files, moments = remove_files(options.index, options.patterns)
    if options.json:
        print(json.dumps({"files": files, "moments": moments}))
    else:
        print(f"removed {files} files with {moments} moments from {options.index}; the files stay where they are")


def _calibrate(options):
    from .index import VideoIndex

    index = VideoIndex.load(options.index, device=options.device, trust_remote_code=options.trust_remote_code)
    index.calibrate(read_lines(options.bank), options.tau)
    bank = index.info()["query_bank"]
    print(f"the query bank has {bank['queries']} queries, temperature {bank['tau']:g}")


def _optimize(options):
    from .index import VideoIndex

    recall = VideoIndex.load(options.index).optimize(None if options.kind == "none" else options.kind)
    if options.json:
        print(json.dumps({"kind": options.kind, "recall": recall}))
    elif recall is None:
        print("searches are exact again")
    else:
        print(f"{options.kind}: finds {100 * recall:.1f} % of the first ten of exact search")


def _info(options):
    from .index import VideoIndex

    index = VideoIndex.load(options.index)
    if options.skipped:
        entries = index.skipped()
        if options.json:
            print(json.dumps(entries, indent=2, ensure_ascii=False))
        for entry in entries if not options.json else ():
            print(entry["cause"])
        return
    info = index.info()
    if options.json:
        print(json.dumps(info, indent=2, ensure_ascii=False))
        return
    for name, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_format_value(part)}" for key, part in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        print(f"{name.replace('_', ' '):<20} {_format_value(value)}".rstrip())


def _format_value(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _export(options):
    from .index import VideoIndex

    VideoIndex.load(options.index).export(options.output)
    print(f"wrote {options.output}")


COMMANDS = {
    "index": _index,
    "search": _search,
    "serve": _serve,
    "remove": _remove,
    "calibrate": _calibrate,
    "optimize": _optimize,
    "info": _info,
    "export": _export,
}
