# SPDX-License-Identifier: Apache-2.0
"""The commands for libraries beyond one machine: `camoe encode`, `camoe load`, `camoe push`."""

import argparse
import dataclasses
import json
import sys

from .errors import SearchError
from .files import read_lines


ENCODE_HELP = """Encode what a manifest names into Parquet parts. A manifest is a file with a column of paths or
addresses (.parquet, .jsonl, .csv), a folder, or a pattern; perhaps with columns start and end in seconds, and any
others, which stay beside the vectors. Run the same command again after a kill: parts that are there are skipped.

  camoe encode films.csv --model runs/demo --out parts
  camoe encode "s3://films/2024/*.mp4" --model runs/demo --out s3://films/parts
  camoe encode films.parquet --model runs/demo --out /shared/parts --shard $SLURM_ARRAY_TASK_ID/100
  camoe encode films.parquet --model runs/demo --out /shared/parts --engine ray --concurrency 8 --num-gpus 1"""

LOAD_HELP = """Put parts into an index that can be searched. Run it again at any time: rows that are there stay.

  camoe load parts --index my-index
  camoe load user/films --index my-index                              a data set on the Hub: nothing is encoded
  camoe load parts --store milvus --uri http://localhost:19530"""

PUSH_HELP = """Upload parts as a data set to the Hub, where load_dataset("user/films") opens it. Needs `hf auth login`.

  camoe push parts user/films
  camoe push parts user/films --public"""

SHOWN_CAUSES = 10


def add_commands(commands):
    """Add the parsers to those of `camoe`."""
    _add_encode(commands)
    _add_load(commands)
    _add_push(commands)


def _add(commands, name: str, run, help: str, description: str):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=help, description=description, formatter_class=formatter)
    parser.set_defaults(run=run)
    return parser


def _add_encode(commands):
    parser = _add(commands, "encode", _encode, "encode a manifest of any size into Parquet parts", ENCODE_HELP)
    parser.add_argument("manifest", metavar="MANIFEST", help="a file, a folder or a pattern; a path or an address")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the parts, or its address")
    for name in ("path", "start", "end"):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"what the column `{name}` is called")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="of a folder: leave out; may be repeated")
    parser.add_argument("--retry", action="store_true", help="encode rows again that could not be read")
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N",
        help="the I-th of N shares of the manifest, from 0 on: one for each task of an array",
    )  # fmt: skip
    parser.add_argument(
        "--files-per-part", type=_count, default=256, metavar="N", help="rows of the manifest (default: 256)"
    )
    parser.add_argument("--windows", choices=("time", "shots"), help="what cuts videos, as for `camoe index`")
    parser.add_argument("--window", type=float, metavar="SECONDS", help="length of a moment; 0: whole files")
    parser.add_argument("--stride", type=float, metavar="SECONDS", help="from one moment to the next")
    parser.add_argument("--sampling", choices=("uniform", "keyframe"), help="how frames are chosen")
    parser.add_argument("--on-damage", choices=("error", "around"), help="as for `camoe index`")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of the vectors (default: float32)")
    parser.add_argument("--bank", metavar="FILE", help="texts of the query bank, one per line (default: the model's)")
    parser.add_argument("--tau", type=float, help="temperature of the bank")
    parser.add_argument("--batch-size", type=_count, default=16, help="moments per forward pass (default: 16)")
    parser.add_argument(
        "--num-workers", type=_count_or_zero, default=2, help="processes that decode for each model (default: 2)"
    )
    parser.add_argument("--device", help="where the model runs (default: a GPU if any)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a SentenceTransformer run its own code")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="ray: on the cluster of RAY_ADDRESS, or on this machine (extra cluster)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=_bounds, default=(1, 1), metavar="N[-M]",
        help="of Ray: workers, each with a model; N-M: as many as the cluster has room for (default: 1)",
    )  # fmt: skip
    parser.add_argument("--num-gpus", type=float, default=0.0, metavar="G", help="of each worker of Ray (default: 0)")
    parser.add_argument(
        "--num-cpus", type=float, metavar="C",
        help="of each worker of Ray (default: 1 and one for each process that decodes)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_load(commands):
    parser = _add(commands, "load", _load, "put parts into an index, or into Milvus", LOAD_HELP)
    parser.add_argument("parts", metavar="PARTS", help="folder of parts, its address, or a data set on the Hub")
    parser.add_argument(
        "--store", choices=("sqlite", "milvus"), default="sqlite", help="sqlite: an index folder (default)"
    )
    parser.add_argument("--index", metavar="DIR", help="folder of the index, new or loaded before")
    parser.add_argument("--model", help="the model that made the parts, if it has moved")
    parser.add_argument("--device", help="where the model runs")
    parser.add_argument(
        "--bank", metavar="FILE", help="texts of a new query bank, one per line (default: the index's, or the parts')"
    )
    parser.add_argument("--tau", type=float, help="temperature of the bank")
    parser.add_argument("--no-text-tower", action="store_true", help="do not export the text tower into the index")
    parser.add_argument("--uri", help="of Milvus (a server's token: environment variable MILVUS_TOKEN)")
    parser.add_argument("--collection", metavar="NAME", help="of Milvus (default: camoe)")
    parser.add_argument("--source", metavar="NAME", help="of these parts in the collection (default: the folder's)")
    parser.add_argument("--milvus-index", choices=("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "DISKANN"))
    parser.add_argument("--milvus-dtype", choices=("float32", "float16"))
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_push(commands):
    parser = _add(commands, "push", _push, "upload parts as a data set to the Hub", PUSH_HELP)
    parser.add_argument("parts", metavar="PARTS", help="folder of parts")
    parser.add_argument("repo", metavar="REPO", help="user/name of the data set")
    parser.add_argument("--public", action="store_true", help="let everyone see it (default: private)")


# --- values of options -----------------------------------------------------------------------------------------------


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _count_or_zero(text: str) -> int:
    return _count(text, least=0)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, from 0/N to N-1/N")
    return int(number), int(count)


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of workers nor a range such as 2-16")
    return int(low), int(high or low)


# --- commands --------------------------------------------------------------------------------------------------------


def _encode(options):
    from .encode_library import EncodeOptions, encode_library
    from .prepare import IndexOptions

    names = "windows window stride dtype exclude on_damage tau batch_size num_workers".split()
    index = IndexOptions(**{name: getattr(options, name) for name in names}, queries=read_lines(options.bank))
    if options.stride is not None and not options.window:
        raise SearchError("--stride needs a --window of more than 0 seconds")
    if options.window != 0:
        _check_positive(options, "window")
    _check_positive(options, "stride", "tau")
    report, present = encode_library(
        options.manifest,
        EncodeOptions(
            model=options.model,
            out=options.out,
            names={name: getattr(options, f"{name}_column") for name in ("path", "start", "end")},
            index=index,
            sampling=options.sampling,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            engine=options.engine,
            shard=options.shard,
            files_per_part=options.files_per_part,
            retry=options.retry,
            progress=sys.stderr.isatty(),
            concurrency=options.concurrency,
            num_gpus=options.num_gpus,
            num_cpus=options.num_cpus or 1 + options.num_workers,
        ),
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(report) | {"present": present}, indent=2, ensure_ascii=False))
        return
    rate = report.moments / report.seconds if report.seconds else 0.0
    print(
        f"{report.files} files, {report.hours:.3g} hours of video, {report.moments} moments in {report.parts} parts; "
        f"{present} rows were there; {rate:.3g} moments a second on {report.device}"
    )
    if report.repeated:
        print(f"{report.repeated} rows name the same window as an earlier row, and are left out")
    if report.failed:
        print(f"{report.failed} rows have no vector; --retry tries them again")
    for cause, count in list(report.causes.items())[:SHOWN_CAUSES]:
        print(f"  {count} x {cause}, for example: {report.examples[cause][0]}")


def _check_positive(options, *names: str):
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise SearchError(f"--{name} is {value:g}: give a number above 0")


def _load(options):
    from .load import load_into_index, load_into_milvus

    _check_positive(options, "tau")
    queries = read_lines(options.bank)
    common = {"model": options.model, "device": options.device, "queries": queries, "tau": options.tau}
    if options.store == "milvus":
        report = load_into_milvus(
            options.parts, options.uri, options.collection, options.source, options.milvus_index, options.milvus_dtype,
            **common,
        )  # fmt: skip
        place = f"{options.uri}, collection {options.collection or 'camoe'}"
    else:
        if options.index is None:
            raise SearchError("give the folder of the index: --index DIR")
        report = load_into_index(options.parts, options.index, text_tower=not options.no_text_tower, **common)
        place = options.index
    if options.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False))
        return
    print(
        f"{report.added} moments loaded in {report.seconds:.1f} s, {report.present} were there, {report.failed} rows "
        f"have no vector; {place} has {report.moments} moments"
    )
    if report.text_encoder:
        print(f"a search loads the whole model, because the text tower is not there: {report.text_encoder}")


def _push(options):
    from .push import push_parts

    print(push_parts(options.parts, options.repo, private=not options.public))
