# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and the splits of a data set -> what evaluate_retrieval.py scores: encoded once, by all processes."""

from collections import defaultdict
from pathlib import Path

import torch
from transformers.utils import cached_file

from data.captioned_clips import CaptionedClips, load_split, read_captioned_clips
from data.encode_split import encode_split
from data.errors import UserError
from data.frame_cache import FrameCache
from evaluation.compare_runs import query_key
from modeling_camoe.encode import encode_texts
from modeling_camoe.frames import describe_source
from modeling_camoe.retrieval import similarity

from .scoring_inputs import ScoringInputs
from .start import is_plain, load_checkpoint


class CheckpointInputs:
    """`--checkpoint` and `--dataset_name`.

    Args:
        options: [`EvaluationOptions`]. accelerator: of the run.
    """

    def __init__(self, options, accelerator):
        self.options, self.accelerator = options, accelerator
        self.model, self.processor = load_checkpoint(options.checkpoint)
        self.model = self.model.to(accelerator.device).eval()
        if options.on_damage is not None:
            self.processor.video_processor.on_damage = options.on_damage
        self.decoder = None
        if options.frame_cache is not None:
            self.decoder = FrameCache(options.frame_cache, self.processor.video_processor)
        self.scale = self.model.clip.logit_scale.exp().item()
        self.about = {
            "dataset": Path(options.dataset_name).name,
            "split": options.split,
            "captions": options.captions,
            "checkpoint": options.checkpoint,
        }

    def default_corrections(self) -> list[str]:
        """What is scored if the options do not say: a plain dual encoder has no training captions for a query bank."""
        plain = is_plain(self.options.checkpoint)
        return ["none", "dual_softmax"] if plain else ["none", "dual_softmax", "query_bank"]

    def test(self) -> ScoringInputs:
        """The split that is scored."""
        self.test_clips = self._read(self.options.split, self.options.max_clips)
        encoded = self._encode(self.options.split, self.test_clips)
        self.about["bad_videos"] = [{"source": bad.source, "cause": bad.cause} for bad in encoded.bad]
        self.about["damaged_videos"] = [{"source": each.source, "cause": each.cause} for each in encoded.damaged]
        self.test_captions = encoded.captions
        self.about["equal_captions"] = equal_captions(encoded.captions, encoded.video_of_text.tolist())
        if self.options.shared_columns:
            self.about["best_clip_shares"] = self._shared_values(encoded)
        return self._inputs(encoded, self.test_clips)

    def _shared_values(self, encoded) -> dict[str, float]:
        """Column -> percent of the captions whose best clip, uncorrected, has the right clip's value there."""
        options = self.options
        data = load_split(options.dataset_name, options.split, options.dataset_config, options.max_clips)
        missing = sorted(set(options.shared_columns) - set(data.column_names))
        if missing:
            raise UserError(f"--shared_columns {missing[0]}: the data set has only {data.column_names}")
        chunks = encoded.text_vectors.split(1024)
        best = torch.cat([similarity(chunk, encoded.video_vectors).argmax(dim=1) for chunk in chunks])  # (N,)
        shares = {}
        for column in options.shared_columns:
            column_values = data[column][:]
            values = [column_values[row] for row in encoded.video_rows]
            pairs = zip(best.tolist(), encoded.video_of_text.tolist(), strict=True)
            shares[column] = 100 * sum(values[mine] == values[right] for mine, right in pairs) / len(best)
        return shares

    def validation(self) -> tuple[ScoringInputs, str]:
        """The split that chooses temperatures, and its name."""
        name = self.options.validation_split
        if name is None:
            raise UserError("there is no --validation_split to choose it on")
        clips = self._read(name)
        return self._inputs(self._encode(name, clips), clips), f"split {name!r}"

    def banks(self, test: ScoringInputs) -> dict:
        """Vectors of training captions and, with a `train_split`, of training clips."""
        banks = {"text_bank": self._text_bank()}
        if self.options.train_split is not None:
            clips = self._bank_clips()
            leaked = set(clips.clips) & set(self.test_clips.clips)
            if leaked:
                raise UserError(
                    f"split {self.options.train_split!r} holds {len(leaked)} of the clips that are scored, "
                    f"{describe_source(leaked.pop())} among them: a query bank must be training clips; choose another "
                    "--train_split, or null for none"
                )
            banks["video_bank"] = self._encode(self.options.train_split, clips).video_vectors
        return banks

    def _bank_clips(self) -> CaptionedClips:
        """A random sample of the training clips, untagged: only their videos are encoded."""
        options = self.options
        data = load_split(options.dataset_name, options.train_split, options.dataset_config)
        if len(data) > options.bank:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))
            data = data.select(order[: options.bank].sort().values.tolist())
        columns = (options.video_column, options.caption_column, options.video_root)
        return read_captioned_clips(data, self.processor.experts, None, None, *columns)

    def _text_bank(self):
        """Vectors of the checkpoint's query bank, without the captions that are scored (`--on_leak`)."""
        checkpoint = self.options.checkpoint
        found = cached_file(
            checkpoint,
            "query_bank.txt",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            raise UserError(
                f"{checkpoint}/query_bank.txt is missing: the query bank needs training captions; train with "
                "training/run_retrieval.py, which writes it, or leave query_bank out of --corrections"
            )
        bank = Path(found).read_text(encoding="utf-8").splitlines()
        tested = {_plain(text) for text in self.test_captions}
        leaked = [text for text in bank if _plain(text) in tested]
        if leaked and self.options.on_leak == "raise":
            raise UserError(
                f"{found} holds {len(leaked)} of the captions that are scored, {leaked[0]!r} among them: a query bank "
                "must be training captions; --on_leak drop, the default, drops these from the bank"
            )
        bank = [text for text in bank if _plain(text) not in tested]
        if not bank:
            raise UserError(f"{found} holds no caption that is not scored: leave query_bank out of --corrections")
        self.about["bank_captions_left_out"] = len(leaked)
        size = min(self.options.bank, len(bank))
        chosen = [bank[i * len(bank) // size] for i in range(size)]  # evenly spread over the file
        with self.accelerator.autocast():
            return encode_texts(self.model, self.processor, chosen, progress="query bank: captions")

    def _read(self, split: str, limit: int | None = None) -> CaptionedClips:
        options = self.options
        with self.accelerator.main_process_first():  # the first tags and caches, the others read the cache
            return read_captioned_clips(
                load_split(options.dataset_name, split, options.dataset_config, limit),
                self.processor.experts,
                self.processor.tagger,
                self.processor.streams,
                options.video_column,
                options.caption_column,
                options.video_root,
            )

    def _encode(self, split: str, clips: CaptionedClips):
        options = self.options
        encoded = encode_split(
            self.accelerator,
            self.model,
            self.processor,
            clips,
            options.captions,
            options.batch_size,
            options.num_workers,
            options.on_bad_video,
            progress=f"{split} split",
            decoder=self.decoder,
        )
        if not encoded.video_rows:
            raise UserError(f"no clip of split {split!r} could be decoded; the first: {encoded.bad[0].cause}")
        return encoded

    @staticmethod
    def _inputs(encoded, clips: CaptionedClips) -> ScoringInputs:
        names = [clips.video_ids[row] for row in encoded.video_rows]
        keys = [
            query_key(names[video], text)
            for video, text in zip(encoded.video_of_text.tolist(), encoded.captions, strict=True)
        ]
        return ScoringInputs(encoded.text_vectors, encoded.video_vectors, encoded.video_of_text, keys, names)


def equal_captions(captions: list[str], video_of_text: list[int]) -> int:
    """How many captions are also another video's: such a query has a right answer that counts as wrong."""
    videos = defaultdict(set)
    for text, video in zip(captions, video_of_text, strict=True):
        videos[_plain(text)].add(video)
    return sum(len(videos[_plain(text)]) > 1 for text in captions)


def _plain(text: str) -> str:
    """Captions that differ in case and spaces only are the same query."""
    return " ".join(text.split()).casefold()
