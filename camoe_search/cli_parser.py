# SPDX-License-Identifier: Apache-2.0
"""The command line of `camoe`: its commands and their options."""

import argparse
import json

from .cli_encode import add_commands
from .cli_search import SEARCH_HELP, add_query_options, add_result_options


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

READ_ONLY = ("search", "serve")  # these commands also open an index that is in Milvus only


def make_parser() -> argparse.ArgumentParser:
    """Parses to options with `command`, the name of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("camoe", description=DESCRIPTION, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name, help, description=None, model=False):
        added = commands.add_parser(name, help=help, description=description or help, formatter_class=formatter)
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

    _add_index_options(command("index", "index the videos under folders, or update an index", INDEX_HELP, model=True))

    search = command("search", "find moments by a text or a video", SEARCH_HELP, model=True)
    add_query_options(search)
    search.add_argument(
        "--queries", metavar="FILE", help="search for every line of a file; prints one line of JSON for each"
    )
    search.add_argument("--model", help="the index's model, if it has moved")
    search.add_argument("-k", type=_count, default=10, help="how many results (default: 10)")
    search.add_argument(
        "--correction", choices=("none", "query_bank", "dynamic"),
        help="lowers hubs; dynamic: only where the best result is one (default: query_bank if the index has one)",
    )  # fmt: skip
    search.add_argument(
        "--expert", type=_expert, action="append", default=[], metavar="NAME=WEIGHT",
        help="weight of one expert of the model, for example action=2.0; may be repeated",
    )  # fmt: skip
    add_result_options(search)
    search.add_argument("--grid", metavar="PNG", help="also write a picture of the results")
    search.add_argument("--json", action="store_true", help="print JSON instead of a table")

    serve = command("serve", "search on a web page that plays what it finds", SERVE_HELP, model=True)
    serve.add_argument("--model", help="the index's model, if it has moved")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    serve.add_argument("--port", type=_count_or_zero, default=7860, help="0 picks a free one (default: 7860)")
    serve.add_argument("--page-size", type=_count, default=12, metavar="K", help="results per page (default: 12)")
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with a token that every request must carry; needed to let other machines in",
    )
    serve.add_argument("--access-log", action="store_true", help="print a line for every request")

    remove = command("remove", "take files out of an index", REMOVE_HELP)
    remove.add_argument("patterns", nargs="*", metavar="PATTERN", help="a file, a folder, or a pattern of whole paths")
    remove.add_argument("--source", metavar="NAME", help="instead of PATTERN: all rows of this source in Milvus")
    _add_milvus_options(remove, "address of Milvus, with --source")
    remove.add_argument("--json", action="store_true", help="print the numbers as JSON")

    calibrate = command(
        "calibrate", "replace the query bank, for example with what users asked; encodes no video",
        model=True,
    )  # fmt: skip
    _add_bank_options(calibrate, required=True)

    optimize = command("optimize", "make an approximate index, for millions of moments", OPTIMIZE_HELP)
    optimize.add_argument(
        "--kind", required=True, choices=("ivf", "hnsw", "none"), help="kind of the approximate index; none removes it"
    )
    optimize.add_argument("--json", action="store_true", help="print JSON")

    info = command("info", "show what is in an index")
    info.add_argument("--skipped", action="store_true", help="only the files that could not be read, with the causes")
    info.add_argument("--json", action="store_true", help="print JSON")

    export = command("export", "write an index as .parquet or .jsonl (or .csv, without vectors)")
    export.add_argument("output", metavar="FILE", help="the extension decides the format")
    add_commands(commands)
    return parser


def _add_index_options(index):
    index.add_argument(
        "paths", nargs="*", metavar="ROOT", help="folders and files (default: those that the index knows)"
    )
    index.add_argument(
        "--model",
        help="a CAMoE checkpoint, a plain dual encoder (CLIP, SigLIP, …) or a SentenceTransformer that encodes video: "
        "folder or Hub id (default: the one that the index was made with)",
    )
    index.add_argument(
        "--files-from", metavar="FILE", help="also index the paths in this file, one per line; - is stdin"
    )
    index.add_argument(
        "--exclude", action="append", metavar="GLOB",
        help="leave out files and folders whose name or path from ROOT matches; may be repeated; the index remembers",
    )  # fmt: skip
    index.add_argument("--prune", action="store_true", help="forget files that are no longer there, or excluded")
    index.add_argument("--watch", action="store_true", help="keep running: index what appears and changes")
    index.add_argument("--retry", action="store_true", help="try again the files that could not be read")
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
        help="what to do with damaged files: leave them out and say why, or take frames from around the damage and "
        "count such moments; the index remembers it (default: error). With --retry, files left out are read again",
    )  # fmt: skip
    index.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        help="type of the stored vectors; float16 takes half the space (default: float32)",
    )
    _add_bank_options(index, required=False)
    index.add_argument("--store", choices=("milvus",), help="also keep a copy in Milvus, for searches from elsewhere")
    _add_milvus_options(
        index, "address of Milvus: http://host:19530, or a file name ending in .db for an embedded database"
    )
    index.add_argument("--source", metavar="NAME", help="name of this index among those that share a collection")
    index.add_argument(
        "--milvus-index",
        choices=("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "DISKANN"),
        help="index of a new collection (default: FLAT)",
    )
    index.add_argument(
        "--milvus-params",
        type=_json_object,
        metavar="JSON",
        help="""parameters of that index, for example '{"M": 32}'""",
    )
    index.add_argument(
        "--milvus-dtype",
        choices=("float32", "float16"),
        help="type of the vectors in a new collection (default: float32)",
    )
    index.add_argument(
        "--milvus-bias", choices=("folded", "column"),
        help="where the correction is kept: as one more entry of the vector, exact (default), or as a column, for "
        "quantised vectors; a search then fetches the best 10 k and ranks them again",
    )  # fmt: skip
    index.add_argument(
        "--thumbnails", action=argparse.BooleanOptionalAction, default=True,
        help="keep a picture of each new moment for the page, made of a frame that is decoded anyway; without it, the "
        "page makes a picture when it first shows it (default: --thumbnails)",
    )  # fmt: skip
    index.add_argument("--no-text-tower", action="store_true", help="do not export the text tower into the index")
    index.add_argument("--batch-size", type=_count, default=16, help="moments per forward pass (default: 16)")
    index.add_argument("--num-workers", type=_count_or_zero, default=2, help="processes that decode (default: 2)")
    index.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_bank_options(parser, required: bool):
    parser.add_argument(
        "--bank", required=required, metavar="FILE",
        help="texts of the query bank, one per line" + ("" if required else " (default: training captions)"),
    )  # fmt: skip
    parser.add_argument("--tau", type=_positive, help="temperature of the bank, in units of the score")


def _add_milvus_options(parser, help: str):
    parser.add_argument("--uri", help=help + " (a server's token: environment variable MILVUS_TOKEN)")
    parser.add_argument("--collection", metavar="NAME", help="collection in Milvus (default: camoe)")


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
