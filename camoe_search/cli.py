# SPDX-License-Identifier: Apache-2.0
"""The command `camoe`: index, search, serve, stats, export, calibrate.

Torch and the models are imported when a command runs, so that `camoe --help` answers at once. A user's mistake is one
line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from . import missing_package
from .errors import SearchError


DESCRIPTION = """Search a folder of videos by describing what happens in them.

  camoe index ~/videos --model runs/demo --index my-index     (again later: only what is new or changed)
  camoe search "a dog catches a frisbee" --index my-index
"""

INDEX_HELP = """Index the videos under folders. Run it again at any time: unchanged files are skipped, changed ones are
encoded again, and an interrupted run continues where it stopped. Files that cannot be read are listed in
INDEX/skipped.jsonl with the cause. Several GPUs: accelerate launch -m camoe_search index …"""

SEARCH_HELP = """Search with a text, or with a video (--like). The score is the similarity, from -1 to 1, minus a
correction for hubs: a video that resembles every query ranks first too often, and the query bank measures how much.

  camoe search "a red star spins" --index my-index -k 5 --grid found.png
  camoe search "someone jumps" --index my-index --expert action=2 --path holiday
  camoe search --like clip.mp4 --index my-index --json"""

SERVE_HELP = """Search on a web page: play results from where they start, see what each expert contributed, switch the
correction, find similar moments. Only files of the index can be read through it. There are no passwords: with
--host 0.0.0.0, anyone who can reach this machine can search and play.

  camoe serve --index my-index      then open http://127.0.0.1:7860"""

SHOWN_CAUSES = 3  # of skipped files; skipped.jsonl has all of them
READ_ONLY = ("search", "serve")  # these commands also open an index that is in Milvus only


def main(argv: list[str] | None = None):
    """Entry point of the console script."""
    options = _parser().parse_args(argv)
    try:
        _disable_progress_bars()
        options.run(options)
    except BrokenPipeError:  # `camoe search … | head` stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
    except (SearchError, ImportError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        from modeling_camoe.frames import VideoDecodingError

        if not isinstance(error, VideoDecodingError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _disable_progress_bars():
    """Of the libraries that load the model and the index: a search should print results only."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("camoe", description=DESCRIPTION, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help, description=None):
        added = commands.add_parser(name, help=help, description=description or help, formatter_class=formatter)
        added.set_defaults(run=run)
        added.add_argument("--index", required=name not in READ_ONLY, metavar="DIR", help="folder of the index")
        if name in READ_ONLY:
            _add_milvus_options(added, "search what is in Milvus at this address, without an index folder")
        added.add_argument("--device", help="where the model runs, for example cuda:1 or cpu (default: a GPU if any)")
        return added

    index = command("index", _index, "index the videos under folders", INDEX_HELP)
    index.add_argument("paths", nargs="+", metavar="PATH", help="folders and files")
    index.add_argument("--model", help="checkpoint folder or Hub id (default: the one that the index was made with)")
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
    index.add_argument("--prune", action="store_true", help="drop files that no longer exist")
    index.add_argument("--rebuild", action="store_true", help="ignore what the index holds and start over")
    index.add_argument(
        "--faiss",
        choices=("flat", "hnsw", "ivf"),
        help="flat is exact; hnsw and ivf pay off from a million moments",
    )
    index.add_argument(
        "--store", choices=("faiss", "milvus"), help="where vectors are searched: in the index folder, or in Milvus"
    )
    _add_milvus_options(index, "of Milvus: http://host:19530, or a file name ending in .db for an embedded database")
    _add_bank_options(index, required=False)
    index.add_argument("--batch-size", type=_count, default=16, help="moments per forward pass (default: 16)")
    index.add_argument("--num-workers", type=_count_or_zero, default=2, help="processes that decode (default: 2)")
    index.add_argument("--json", action="store_true", help="print the report as JSON")

    search = command("search", _search, "find moments by a text or a video", SEARCH_HELP)
    search.add_argument("text", nargs="?", help="what to look for")
    search.add_argument("--like", metavar="VIDEO", help="find moments like this video, instead of a text")
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
    search.add_argument("--path", metavar="TEXT", help="only files whose path contains this")
    search.add_argument("--min-seconds", type=float, metavar="S", help="only moments at least this long")
    search.add_argument("--max-seconds", type=float, metavar="S", help="only moments at most this long")
    search.add_argument("--grid", metavar="PNG", help="also write a picture of the results")
    search.add_argument("--json", action="store_true", help="print JSON instead of a table")

    serve = command("serve", _serve, "search on a web page that plays what it finds", SERVE_HELP)
    serve.add_argument("--model", help="the index's model, if it has moved")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=_count_or_zero, default=7860, help="0 picks a free one (default: 7860)")
    serve.add_argument("--page-size", type=_count, default=12, metavar="K", help="results per page (default: 12)")

    stats = command("stats", _stats, "show what is in an index")
    stats.add_argument("--json", action="store_true", help="print JSON")

    export = command("export", _export, "write an index as .parquet or .jsonl (or .csv, without vectors)")
    export.add_argument("output", metavar="FILE", help="the extension decides the format")

    calibrate = command(
        "calibrate", _calibrate, "replace the query bank, for example with what users asked; no video is encoded again"
    )
    _add_bank_options(calibrate, required=True)
    return parser


def _add_bank_options(parser, required: bool):
    parser.add_argument(
        "--queries", required=required, metavar="FILE",
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


def _read_lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise SearchError(f"{path} is not UTF-8 text: give one query per line") from None


# --- commands --------------------------------------------------------------------------------------------------------


def _index(options):
    import dataclasses

    from .encoder import process_group
    from .index import VideoIndex
    from .update import IndexOptions

    if options.stride is not None and not options.window:
        raise SearchError("--stride needs a --window of more than 0 seconds")
    if options.model is None and not (Path(options.index) / "index.json").exists():
        raise SearchError("--model is missing: a new index needs a checkpoint folder or a Hub id")
    names = [field.name for field in dataclasses.fields(IndexOptions)]
    settings = {name: value for name, value in vars(options).items() if name in names}
    settings |= {"queries": _read_lines(options.queries), "progress": sys.stderr.isatty()}
    index = VideoIndex.build(
        options.paths,
        options.index,
        options.model,
        sampling=options.sampling,
        device=options.device,
        **settings,
    )
    if not process_group().is_main_process:  # only one of several processes prints
        return
    report = index.report
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return
    print(
        f"{report.added} files added, {report.changed} changed, {report.unchanged} unchanged, "
        f"{report.dropped} dropped in {report.seconds:.1f} s; {options.index} has {report.moments} moments"
    )
    if report.written or report.deleted:
        print(f"Milvus: {report.written} moments written, {report.deleted} deleted")
    if report.skipped:
        print(f"skipped {len(report.skipped)}, listed with their causes in {Path(options.index) / 'skipped.jsonl'}")
        for entry in report.skipped[:SHOWN_CAUSES]:
            print(f"  {entry['cause']}")
        if len(report.skipped) > SHOWN_CAUSES:
            print("  …")
    if report.not_videos:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.not_videos.items()))
        print(f"ignored, not videos by their names: {kinds}")


def _open(options):
    """The index to search."""
    if (options.index is None) == (options.uri is None):
        raise SearchError("give either the folder of an index, --index DIR, or --uri of Milvus, one of them")
    from .index import VideoIndex

    if options.uri is not None:
        return VideoIndex.connect(options.uri, options.collection, options.model, options.device)
    if options.collection is not None:
        raise SearchError("--collection needs --uri: the folder of an index names its own collection")
    return VideoIndex.load(options.index, options.model, options.device)


def _search(options):
    if sum(query is not None for query in (options.text, options.like, options.queries)) != 1:
        raise SearchError("give a text, --like VIDEO or --queries FILE, one of them")
    if options.like is not None and options.correction not in (None, "none"):
        raise SearchError(f"--correction {options.correction} is for texts: with --like, leave it out")
    from . import show

    index = _open(options)
    settings = {
        "k": options.k,
        "correction": options.correction,
        "experts": dict(options.expert),
        "path": options.path,
        "min_seconds": options.min_seconds,
        "max_seconds": options.max_seconds,
    }
    if options.queries is not None:
        queries = _read_lines(options.queries)
        for query, hits in zip(queries, index.search_batch(queries, **settings), strict=True):
            print(json.dumps({"query": query, "hits": show.json_rows(hits)}, ensure_ascii=False))
        return
    hits = index.search_like(options.like, **settings) if options.like else index.search(options.text, **settings)
    print(json.dumps(show.json_rows(hits), indent=2, ensure_ascii=False) if options.json else show.format_table(hits))
    if options.grid:
        show.thumbnail_grid(hits).save(options.grid, format="PNG")


def _serve(options):
    from . import serve

    index = _open(options)
    listener = serve.listen(options.host, options.port)
    index.encoder.encode_texts(["ready"])  # loads model and tagger now, not at the first query
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"serving {len(index)} moments at http://{host}:{port} (Ctrl-C to stop)", flush=True)
    serve.serve(index, listener, options.page_size)


def _stats(options):
    from .index import VideoIndex

    stats = VideoIndex.load(options.index).stats()
    if options.json:
        print(json.dumps(stats, indent=2))
        return
    for name, value in stats.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_format_value(part)}" for key, part in value.items())
        print(f"{name.replace('_', ' '):<20} {_format_value(value)}")


def _format_value(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _export(options):
    from .index import VideoIndex

    VideoIndex.load(options.index).export(options.output)
    print(f"wrote {options.output}")


def _calibrate(options):
    from .index import VideoIndex

    index = VideoIndex.load(options.index, device=options.device)
    index.calibrate(_read_lines(options.queries), options.tau)
    bank = index.stats()["query_bank"]
    print(f"the query bank has {bank['queries']} queries, temperature {bank['tau']:g}")
