# SPDX-License-Identifier: Apache-2.0
"""`camoe encode`: a manifest of any size -> parts, by this process or by Ray. See parts.py for what a part is."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm.auto import tqdm

from .bank import QueryBank
from .database import Description
from .encode_parts import EncodeReport, device_of, encode_parts
from .encoder import load_encoder
from .errors import SearchError
from .manifest import read_manifest
from .parts import FILES_PER_PART, Part, PartFolder, plan_parts, remove_unfinished, without_repeated
from .prepare import IndexOptions, choose_bank, describe_index


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode a manifest."""

    model: str  # checkpoint folder or Hub id
    out: str  # folder of the parts, or its address
    names: dict[str, str | None] = dataclasses.field(default_factory=dict)  # of the columns, see `read_manifest`
    index: IndexOptions = dataclasses.field(default_factory=IndexOptions)  # windows, dtype, damage, query bank
    sampling: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    engine: str = "local"  # or "ray"
    shard: tuple[int, int] = (0, 1)
    files_per_part: int = FILES_PER_PART
    retry: bool = False  # encode rows again that have errors
    progress: bool = False
    # Of the engine "ray":
    concurrency: tuple[int, int] = (1, 1)  # workers, at least and at most
    num_gpus: float = 0.0  # of each worker
    num_cpus: float = 1.0


@dataclass
class Job:
    """What a worker needs besides its rows."""

    options: EncodeOptions
    description: Description
    bank: QueryBank | None
    out: PartFolder

    def load(self):
        """The model, checked to be the one that the run began with."""
        options = self.options
        encoder = load_encoder(self.description.model, options.device, options.sampling, options.trust_remote_code)
        if encoder.weights != self.description.weights:
            raise SearchError(f"{options.model} has other weights on this machine: put the same files everywhere")
        return encoder

    def encode(self, parts, encoder) -> Iterator[EncodeReport]:
        """See `encode_parts`."""
        index = self.options.index
        return encode_parts(
            parts, self.out, encoder, self.description,
            bank=self.bank, batch_size=index.batch_size, num_workers=index.num_workers,
        )  # fmt: skip


def encode_library(source: str, options: EncodeOptions) -> tuple[EncodeReport, int]:
    """Encode what a manifest names and the folder of parts does not have yet.

    Args:
        source: see `manifest.read_manifest`.

    Returns:
        what was encoded, and the number of rows of the manifest that were there.

    Raises:
        SearchError: saying what is wrong and what to do. What is finished stays.
    """
    manifest = read_manifest(source, options.names, options.index.exclude or ())
    if not len(manifest):
        raise SearchError(f"{source} names no file")
    rows, manifest = len(manifest), without_repeated(manifest)
    out = PartFolder(options.out)
    encoder = load_encoder(options.model, options.device, options.sampling, options.trust_remote_code)
    description = describe_index(encoder, None, options.index)
    bank = choose_bank(encoder, None, options.index.queries, options.index.tau)
    description = dataclasses.replace(description, tau=bank and bank.tau, bank=bank.hash if bank else "")
    parts, present = plan_parts(manifest, description, out, options.files_per_part, options.shard, options.retry)
    remove_unfinished(out, parts)
    job = Job(options, description, bank, out)
    if options.engine == "ray":
        from .ray_engine import encode_with_ray

        reports = encode_with_ray(job, parts)
    else:
        reports = job.encode(parts, encoder)
    total, begin = EncodeReport(device=device_of(encoder), repeated=rows - len(manifest)), time.perf_counter()
    with tqdm(total=sum(len(part.rows) for part in parts), unit="file", disable=not options.progress) as bar:
        for report in reports if parts else ():
            total += report
            bar.update(report.files)
            bar.set_postfix_str(f"{total.moments} moments, {total.failed} failed")
    total.seconds = total.seconds if options.engine == "ray" else time.perf_counter() - begin
    return total, present


__all__ = ["EncodeOptions", "Job", "Part", "encode_library"]
