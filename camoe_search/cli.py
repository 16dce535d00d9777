# SPDX-License-Identifier: Apache-2.0
"""The command `camoe`: index, search, serve, remove, calibrate, optimize, info, export.

Torch and the models are imported when a command needs them: `camoe --help` answers at once, and so do commands that
load no model. A user's mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import contextlib
import json
import logging
import os
import sqlite3
import sys
from pathlib import Path

from . import missing_package
from .cli_encode import add_commands
from .cli_search import FILTERS, SEARCH_HELP, add_query_options, add_result_options
from .errors import SearchError


DESCRIPTION = """Search folders of videos by describing what happens in them.

  camoe index ~/videos --model runs/demo --index my-index     make an index
  camoe index --index my-index --prune                        later: what is new, changed, gone
  camoe search "a dog catches a frisbee" --index my-index
"""

INDEX_HELP = """Index the videos under folders. Run it again at any time, with or without the folders: unchanged files
are skipped, changed ones are encoded again, renamed, moved and copied ones are recognised by their content, and an
interrupted run goes on where it stopped. What is done can be searched at once. Several GPUs:
accelerate launch -m camoe_search index …

  camoe index ~/videos --model runs/demo --index my-index --exclude .trash --exclude "*.part.mp4"
  camoe index --index my-index --prune                 all folders that the index knows; forget files that are gone
  camoe index /new/place --index my-index              a library that moved: nothing is encoded again
  camoe index --index my-index --watch --prune         stay, and follow what happens in the folders
  find . -name "*.mp4" -newer stamp | camoe index --files-from - --index my-index"""

SERVE_HELP = """Search on a web page: play results from where they start, see what each expert contributed, switch the
correction, find similar moments. Only files of the index can be read through it. Only this machine can reach it; to
let others in, give a token, which they must know.

  camoe serve --index my-index                            then open http://127.0.0.1:7860
  camoe serve --index films --index lectures              choose one on the page
  openssl rand -hex 32 > token && camoe serve --index my-index --host 0.0.0.0 --token-file token"""

REMOVE_HELP = """Take files out of an index; the files themselves stay where they are. A PATTERN is a file, a folder,
or a pattern that is compared with whole paths.

  camoe remove ~/videos/old --index my-index
  camoe remove "*/raw/*.mov" --index my-index
  camoe remove --source laptop --uri http://localhost:19530      what a lost index put into Milvus"""

OPTIMIZE_HELP = """Make an approximate index of the vectors (FAISS), a cache beside them: worthwhile from about a
million moments. Prints how many of exact search's first ten it finds. What is added later is searched exactly; run it
again now and then. A filter that leaves few moments is searched exactly, too.

  camoe optimize --kind ivf --index my-index
  camoe optimize --kind none --index my-index          remove it"""

SHOWN_CAUSES = 3  # of skipped files; `camoe info --skipped` has all of them
READ_ONLY = ("search", "serve")  # these commands also open an index that is in Milvus only


def main(argv: list[str] | None = None):
    """Entry point of the console script."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")  # our own notes go to stderr as they are
    # Libraries that load models and data sets show bars: a search should print results only.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        options.run(options)
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


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("camoe", description=DESCRIPTION, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help, description=None, model=False):
        added = commands.add_parser(name, help=help, description=description or help, formatter_class=formatter)
        added.set_defaults(run=run)
        more = {"action": "append", "help": "folder of the index; may be repeated"} if name == "serve" else {}
        added.add_argument(
            "--index",
            required=name not in (*READ_ONLY, "remove"),
            metavar="DIR",
            **{"help": "folder of the index"} | more,
        )
        if name in READ_ONLY:
            _add_milvus_options(added, "search what is in Milvus at this address, without an index folder")
        if model:
            added.add_argument(
                "--device", help="where the model runs, for example cuda:1 or cpu (default: a GPU if any)"
            )
            added.add_argument(
                "--trust-remote-code", action="store_true", help="let a SentenceTransformer run its repository's code"
            )
        return added

    index = command("index", _index, "index the videos under folders, or update an index", INDEX_HELP, model=True)
    index.add_argument(
        "paths", nargs="*", metavar="ROOT", help="folders and files (default: those that the index knows)"
    )
    index.add_argument(
        "--model",
        help="a CAMoE checkpoint, a plain dual encoder (CLIP, SigLIP, …) or a SentenceTransformer that encodes video: "
        "folder or Hub id (default: the one that the index was made with)",
    )
    index.add_argument("--files-from", metavar="FILE", help="also the paths in this file, one per line; - is stdin")
    index.add_argument(
        "--exclude", action="append", metavar="GLOB",
        help="leave out files and folders with such a name or path from ROOT; may be repeated; the index remembers it",
    )  # fmt: skip
    index.add_argument("--prune", action="store_true", help="forget files that are no longer there, or excluded")
    index.add_argument("--watch", action="store_true", help="go on for ever: index what appears and changes")
    index.add_argument("--retry", action="store_true", help="read files again that could not be read")
    index.add_argument("--rebuild", action="store_true", help="empty the index first, for example for another model")
    index.add_argument(
        "--windows", choices=("time", "shots"),
        help="what cuts videos into moments: steps of time (default), or where the camera's shots begin (extra shots)",
    )  # fmt: skip
    index.add_argument(
        "--window", type=_not_negative, metavar="SECONDS",
        help="cut videos into moments of this length; 0: never (default: 10 s for videos over 30 s)",
    )  # fmt: skip
    index.add_argument(
        "--stride", type=_positive, metavar="SECONDS", help="from one moment to the next (default: half a window)"
    )
    index.add_argument(
        "--sampling", choices=("uniform", "keyframe"), help="keyframe is faster and less exact (default: uniform)"
    )
    index.add_argument(
        "--on-damage", "--on_damage", choices=("error", "around"),
        help="what to do about damaged files: leave them out and say why, or take frames around the damage and count "
        "such moments; the index remembers it (default: error). With --retry, files that were left out are read again",
    )  # fmt: skip
    index.add_argument(
        "--dtype", choices=("float32", "float16"), help="of the stored vectors; float16 halves them (default: float32)"
    )
    _add_bank_options(index, required=False)
    index.add_argument("--store", choices=("milvus",), help="also keep a copy in Milvus, for searches from elsewhere")
    _add_milvus_options(index, "of Milvus: http://host:19530, or a file name ending in .db for an embedded database")
    index.add_argument("--source", metavar="NAME", help="of this index among those that share a collection")
    index.add_argument(
        "--milvus-index",
        choices=("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "DISKANN"),
        help="of a new collection (default: FLAT)",
    )
    index.add_argument(
        "--milvus-params", type=_json_object, metavar="JSON", help="""of that index, for example '{"M": 32}'"""
    )
    index.add_argument("--milvus-dtype", choices=("float32", "float16"), help="of a new collection (default: float32)")
    index.add_argument(
        "--milvus-bias", choices=("folded", "column"),
        help="the correction as one more entry of the vector, exact (default), or as a column: for quantised vectors; "
        "then the best 10 k are fetched and ranked",
    )  # fmt: skip
    index.add_argument("--no-text-tower", action="store_true", help="do not export the text tower into the index")
    index.add_argument("--batch-size", type=_count, default=16, help="moments per forward pass (default: 16)")
    index.add_argument("--num-workers", type=_count_or_zero, default=2, help="processes that decode (default: 2)")
    index.add_argument("--json", action="store_true", help="print the report as JSON")

    search = command("search", _search, "find moments by a text or a video", SEARCH_HELP, model=True)
    add_query_options(search)
    search.add_argument(
        "--queries", metavar="FILE", help="search for every line of a file; prints one line of JSON for each"
    )
    search.add_argument("--model", help="the index's model, if it has moved")
    search.add_argument("-k", type=_count, default=10, help="how many results (default: 10)")
    search.add_argument(
        "--correction", choices=("none", "query_bank", "dynamic"),
        help="for hubs; dynamic: only where the best result is one (default: query_bank if the index has one)",
    )  # fmt: skip
    search.add_argument(
        "--expert", type=_expert, action="append", default=[], metavar="NAME=WEIGHT",
        help="weight of one expert of the model, for example action=2.0; may be repeated",
    )  # fmt: skip
    add_result_options(search)
    search.add_argument("--grid", metavar="PNG", help="also write a picture of the results")
    search.add_argument("--json", action="store_true", help="print JSON instead of a table")

    serve = command("serve", _serve, "search on a web page that plays what it finds", SERVE_HELP, model=True)
    serve.add_argument("--model", help="the index's model, if it has moved")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=_count_or_zero, default=7860, help="0 picks a free one (default: 7860)")
    serve.add_argument("--page-size", type=_count, default=12, metavar="K", help="results per page (default: 12)")
    serve.add_argument(
        "--token-file", metavar="FILE", help="a token that every request must bear; needed beyond this machine"
    )
    serve.add_argument("--access-log", action="store_true", help="print a line for every request")

    remove = command("remove", _remove, "take files out of an index", REMOVE_HELP)
    remove.add_argument("patterns", nargs="*", metavar="PATTERN", help="a file, a folder, or a pattern of whole paths")
    remove.add_argument("--source", metavar="NAME", help="instead: all rows of this source in Milvus")
    _add_milvus_options(remove, "of Milvus, with --source")
    remove.add_argument("--json", action="store_true", help="print the numbers as JSON")

    calibrate = command(
        "calibrate", _calibrate, "replace the query bank, for example with what users asked; encodes no video",
        model=True,
    )  # fmt: skip
    _add_bank_options(calibrate, required=True)

    optimize = command("optimize", _optimize, "make an approximate index, for millions of moments", OPTIMIZE_HELP)
    optimize.add_argument("--kind", required=True, choices=("ivf", "hnsw", "none"), help="none removes it")
    optimize.add_argument("--json", action="store_true", help="print JSON")

    info = command("info", _info, "show what is in an index")
    info.add_argument("--skipped", action="store_true", help="only the files that could not be read, with the causes")
    info.add_argument("--json", action="store_true", help="print JSON")

    export = command("export", _export, "write an index as .parquet or .jsonl (or .csv, without vectors)")
    export.add_argument("output", metavar="FILE", help="the extension decides the format")
    add_commands(commands)
    return parser


def _add_bank_options(parser, required: bool):
    parser.add_argument(
        "--bank", required=required, metavar="FILE",
        help="texts of the query bank, one per line" + ("" if required else " (default: training captions)"),
    )  # fmt: skip
    parser.add_argument("--tau", type=_positive, help="temperature of the bank, in units of the score")


def _add_milvus_options(parser, help: str):
    parser.add_argument("--uri", help=help + " (a server's token: environment variable MILVUS_TOKEN)")
    parser.add_argument("--collection", metavar="NAME", help="of Milvus (default: camoe)")


# --- values of options -----------------------------------------------------------------------------------------------


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "above 0")


def _not_negative(text: str) -> float:
    return _number(text, lambda value: value >= 0, "0 or more")


def _number(text: str, is_valid, condition: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_valid(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {condition}")
    return value


def _count(text: str, minimum: int = 1) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
    return int(text)


def _count_or_zero(text: str) -> int:
    return _count(text, minimum=0)


def _expert(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=WEIGHT, such as action=2.0") from None


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _read_lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
        return [line for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise SearchError(f"{path} is not UTF-8 text: give one per line") from None


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
    paths = [*options.paths, *(_read_lines(options.files_from) or ())]
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
        for _ in changes(paths or roots):
            index.report = index.add(paths, **_settings(options, milvus) | {"rebuild": False})
            report = index.report
            if report.added or report.changed or report.moved or report.dropped:
                _print_report(report, options)


def _build(options, paths: list[str], milvus: dict | None):
    from .index import VideoIndex

    return VideoIndex.build(
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
        "queries": _read_lines(options.bank),
        "milvus": milvus,
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
    from .milvus_store import settings

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

    index = _open(options, options.index)
    settings = {name: getattr(options, name) for name in FILTERS} | {
        "k": options.k,
        "correction": options.correction,
        "experts": dict(options.expert),
        "merge": not options.no_merge,
        "group_by": options.group_by,
        "min_score": options.min_score,
    }
    if options.queries is not None:
        queries = _read_lines(options.queries)
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
    index.calibrate(_read_lines(options.bank), options.tau)
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
