# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, validation, checkpoints, guards and telemetry of one run.

The whole state of a run is in `Progress`, the model, the optimiser, the schedule and the random state, and what a step
sees depends on (seed, epoch, position) alone. So a run that was killed and resumed ends in the same bytes as one that
was not.
"""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data.batches import RunBatchSampler
from data.encode_split import EncodedSplit
from data.errors import UserError
from data.streaming import StreamBatches
from evaluation.scoring import score_retrieval

from .checkpoints import CheckpointFolder, Progress, StepLog, save_model
from .distributed import full_model
from .gradient_cache import accumulated_backward, cached_backward
from .lora import unwrap_peft
from .optimizer import Average
from .recipe import save_recipe
from .telemetry import PairCost, Telemetry


class Terminated(Exception):
    """SIGTERM arrived; the run has been saved."""


class Trainer:
    """One run.

    Args:
        options: [`TrainOptions`]. accelerator: of the run. model, optimizer: prepared. scheduler: of the optimizer.
        processor: of the model. loader: over [`RunBatchSampler`].
        scored_splits: name -> a function: model -> the encoded split. "validation" chooses the best model; without it,
            the last one is kept. "test" is only reported.
        extra: file name -> text, published with the model. cost: of a pair, for the MFU.
    """

    def __init__(
        self,
        options,
        accelerator,
        model,
        optimizer,
        scheduler,
        processor,
        loader: DataLoader,
        scored_splits: dict[str, Callable[..., EncodedSplit]],
        extra: dict[str, str],
        cost: PairCost | None = None,
    ):
        self.options = options
        self.accelerator = accelerator
        self.model = model
        self.published = accelerator.unwrap_model(model, keep_torch_compile=False)  # with LoRA, a peft model
        self.core = unwrap_peft(self.published)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.processor = processor
        self.loader = loader
        # A stream knows its steps and where its readers are.
        self.batches: RunBatchSampler | StreamBatches = getattr(loader.dataset, "batches", loader.batch_sampler)
        self.scored_splits = scored_splits
        self.extra = extra
        self.output_dir = Path(options.output_dir)
        self.total_steps = options.total_steps(len(self.batches))
        self.checkpoints = CheckpointFolder(self.output_dir, options.save_total_limit)
        self.progress = Progress(order=self.batches.order | options.fixed())
        accelerator.register_for_checkpointing(scheduler, self.progress)
        if isinstance(self.batches, StreamBatches):
            accelerator.register_for_checkpointing(self.batches)
        self.average = None
        if options.ema_decay is not None:
            self.average = Average(self.published, options.ema_decay)
            accelerator.register_for_checkpointing(self.average)
        self.telemetry = Telemetry(accelerator.device, accelerator.num_processes, self.batches.pairs_per_step, cost)
        self.same_captions = torch.zeros((), dtype=torch.long, device=accelerator.device)  # since the last log line
        self.terminate = False

    def run(self):
        """Train to the end, from the beginning or from a checkpoint."""
        progress = self.progress
        resumed = None
        if self.options.resume_from_checkpoint is not None:
            resumed = self.checkpoints.load(self.accelerator, self.options.resume_from_checkpoint)
        if self.accelerator.is_main_process:  # not of a resume that was refused
            save_recipe(self.options, self.output_dir / "recipe.yaml")
        self._open_logs()
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        self.bar = tqdm(
            total=self.total_steps,
            initial=progress.step,
            desc=f"training (from {resumed})" if resumed else "training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        try:
            if progress.batch == len(self.batches):  # SIGTERM came after an epoch's last step
                self._end_epoch()
            self.model.train()
            self._run_steps()
            if self.total_steps == 0:  # a zero-shot baseline is only scored and saved
                self._validate_and_keep_best(last=True)
        finally:
            self.bar.close()
            signal.signal(signal.SIGTERM, previous)
        self._write_results()

    def _open_logs(self):
        main, step = self.accelerator.is_main_process, self.progress.step
        self.log = StepLog(self.output_dir / "training_log.jsonl", step, main)
        self.bad_log = StepLog(self.output_dir / "bad_videos.jsonl", step, main)
        self.accelerator.wait_for_everyone()
        self.known_bad = {line["video_id"] for line in self.bad_log.lines()}

    # --- steps -------------------------------------------------------------------------------------------------------

    def _run_steps(self):
        progress = self.progress
        self.batches.start_from(progress.epoch, progress.batch, self.total_steps - progress.step)
        started = time.perf_counter()
        for batch in self.loader:
            waited = time.perf_counter() - started
            tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else 0
            reader = batch.pop("reader", None)
            self._step(batch)
            if reader is not None:
                self.batches.advance(*reader)
            progress.step += 1
            progress.batch += 1
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            progress.waited += waited
            self.telemetry.add(seconds, waited, tokens)
            self.bar.update()
            self._after_step()
            started = time.perf_counter()

    def _step(self, batch: dict):
        """One optimiser step; none if the gradient is not finite and the policy is to skip."""
        options = self.options
        split = getattr(self.loader.dataset, "split", None)  # a stream's clips have no numbers
        self._report_bad_videos([(split.video_ids[b.index] if split else b.source, b) for b in batch.pop("bad")])
        if error := batch.pop("error", None):
            raise UserError(error)
        if "pair_ids" not in batch:
            raise UserError("no clip of the training split can be decoded; see bad_videos.jsonl")
        video_ids = batch.pop("pair_ids")  # (n,2): the video and a hash of the caption
        names = batch.pop("names", None) or video_ids[:, 0].tolist()
        if options.mask_same_captions:
            self._count_same_captions(video_ids)
        else:
            video_ids = video_ids[:, 0]

        if options.gradient_cache_chunk:
            chunk = options.gradient_cache_chunk
            loss, gate_weights = cached_backward(self.accelerator, self.model, batch, video_ids, chunk)
        else:
            steps = options.gradient_accumulation_steps
            loss, gate_weights = accumulated_backward(self.accelerator, self.model, batch, video_ids, steps)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
        checked = loss if grad_norm is None else grad_norm  # DeepSpeed may not report its norm
        if math.isfinite(checked) or self._is_overflow(loss):
            self.optimizer.step()
        else:
            self._on_not_finite(loss, names)
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.core.clamp_logit_scale()
        if self.average is not None:
            self.average.update()
        grad_norm = math.nan if grad_norm is None else float(grad_norm)
        self.last = {"loss": loss, "grad_norm": grad_norm, "gate": gate_weights.float().mean(dim=0)}

    def _count_same_captions(self, pair_ids: torch.Tensor):
        """Pairs of different videos with the same caption, in the contrastive batches of this step."""
        ids = self.accelerator.gather(pair_ids.to(self.accelerator.device))
        same = ids[:, None] == ids  # (N,N,2)
        if not self.options.gradient_cache_chunk:  # then only those within each accumulated batch
            accumulated, world = self.options.gradient_accumulation_steps, self.accelerator.num_processes
            number = torch.arange(accumulated, device=ids.device).repeat_interleave(len(ids) // world // accumulated)
            number = number.repeat(world)
            same = same & (number[:, None] == number)[..., None]
        self.same_captions += (same[..., 1] & ~same[..., 0]).sum() // 2

    def _after_step(self):
        """What is due after a step: a log line, a checkpoint, the end of an epoch, a requested end."""
        progress, options = self.progress, self.options
        done, epoch_done = progress.step == self.total_steps, progress.batch == len(self.batches)
        if progress.step % options.logging_steps == 0 or done:
            self._log_step()
        if self._agreed_to_terminate():
            self.checkpoints.save(self.accelerator, progress.step)
            raise Terminated(f"SIGTERM: saved step {progress.step}; go on with --resume_from_checkpoint latest")
        if done or epoch_done:
            self._end_epoch()
        elif options.checkpointing_steps and progress.step % options.checkpointing_steps == 0:
            self.checkpoints.save(self.accelerator, progress.step)

    def _end_epoch(self):
        self.progress.epoch += 1
        self.progress.batch = 0
        self._validate_and_keep_best(last=self.progress.step == self.total_steps)
        self.checkpoints.save(self.accelerator, self.progress.step)

    # --- guards ------------------------------------------------------------------------------------------------------

    def _on_sigterm(self, signum, frame):
        self.terminate = True

    def _agreed_to_terminate(self) -> bool:
        """Whether any process received SIGTERM; all must agree, or one would wait for the others forever."""
        if self.accelerator.num_processes == 1:
            return self.terminate
        flag = torch.tensor([int(self.terminate)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _is_overflow(self, loss: torch.Tensor) -> bool:
        """Whether fp16's loss scaling explains an infinite gradient: the optimiser then skips, and the scale halves.

        The scale starts at 65536. If a gradient still overflows at a scale below 1, the scale is not the cause.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1 and bool(self.accelerator.gather(loss).isfinite().all())

    def _on_not_finite(self, loss, names: list[str] | list[int]):
        """Stop, or count a skipped step. All processes come here together, because they share one gradient.

        Args:
            names: of the videos of this process's batch, or their numbers in the split.
        """
        progress = self.progress
        every = gather_object(names)
        names = ", ".join(n if isinstance(n, str) else self.loader.dataset.split.video_ids[n] for n in every)
        what = f"loss {loss.item():.4g}, gradient not finite, at step {progress.step + 1}; the batch's videos: {names}"
        if self.options.on_nan == "skip" and progress.num_skipped < self.options.max_nan_skips:
            progress.num_skipped += 1
            self.bar.write(f"skipped a step ({progress.num_skipped}): {what}", file=sys.stderr)
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # the scaler skips it, and resets itself for the next gradient
            return
        finished = self.checkpoints.finished()
        kept = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint was written yet"
        raise UserError(f"{what}; {kept}; --on_nan skip continues without such steps")

    def _report_bad_videos(self, bad: list):
        """Stop at the first clip that could not be decoded, or list each once. `bad`: (video id, BadVideo) pairs."""
        for name, video in bad:
            if self.options.on_bad_video == "raise" and not video.is_used:
                raise UserError(f"{video.cause} (--on_bad_video skip continues without such clips)")
            if name not in self.known_bad:
                self.known_bad.add(name)
                step = self.progress.step + 1
                used = {"is_used": True} if video.is_used else {}  # with frames from around its damage
                self.bad_log.write(step=step, video_id=name, source=video.source, cause=video.cause, **used)

    # --- validation and telemetry ------------------------------------------------------------------------------------

    def _validate_and_keep_best(self, last: bool):
        progress = self.progress
        if not last and (not self.scored_splits or progress.epoch % self.options.validation_epochs != 0):
            return
        started = time.perf_counter()
        with contextlib.nullcontext() if self.average is None else self.average.applied():
            model = full_model(self.published)
            model.eval()
            metrics = {name: self._score(model, name) for name in self.scored_splits}.get("validation")
            better = metrics and (progress.best is None or metrics["Rsum"] > progress.best["Rsum"])
            if better:
                progress.best = {"step": progress.step, "epoch": progress.epoch, **metrics}
            if better or (metrics is None and last):
                self._publish(model)
        self.model.train()
        self.telemetry.validation_seconds = time.perf_counter() - started

    def _score(self, model, name: str) -> dict[str, float]:
        """Uncorrected metrics of a split, which go to the log, the trackers and the terminal."""
        progress = self.progress
        encoded = self.scored_splits[name](model=unwrap_peft(model))
        if not encoded.video_rows:
            raise UserError(f"no clip of the {name} split can be decoded; the first: {encoded.bad[0].cause}")
        note = "" if name == "validation" else " (not used for selection)"
        metrics = validation_metrics(encoded, self.core.config.experts)
        if self.accelerator.is_main_process:
            self._report_bad_videos([(video.source, video) for video in [*encoded.bad, *encoded.damaged]])
            line = {f"{name}_{metric}": value for metric, value in metrics.items()}
            self.log.write(step=progress.step, epoch=progress.epoch, **line)
        self.accelerator.log({f"{name}/{metric}": value for metric, value in metrics.items()}, step=progress.step)
        self.bar.write(
            f"epoch {progress.epoch}: {name} R@1 {metrics['text_to_video_R@1']:.1f} text to video, "
            f"{metrics['video_to_text_R@1']:.1f} video to text, Rsum {metrics['Rsum']:.1f}{note}"
        )
        return metrics

    def _publish(self, model):
        if self.accelerator.is_main_process:
            save_model(model, self.processor, self.output_dir, self.extra)

    def _log_step(self):
        progress = self.progress
        loss = self.accelerator.reduce(self.last["loss"], "mean").item()
        gate = self.accelerator.reduce(self.last["gate"], "mean").tolist()
        same_captions = int(self.same_captions)
        progress.same_captions += same_captions
        self.same_captions.zero_()
        values = {
            "loss": loss,
            "grad_norm": self.last["grad_norm"],
            "learning_rate": max(self.scheduler.get_last_lr()),
            "logit_scale": self.core.clip.logit_scale.exp().item(),
            "same_captions": same_captions,
            **self.telemetry.values(self.total_steps - progress.step, self._validations_left()),
            **{f"gate_{expert}": weight for expert, weight in zip(self.core.config.experts, gate, strict=True)},
        }
        self.bar.set_postfix(loss=f"{loss:.3f}", samples=f"{values['samples_per_second']:.0f}/s")
        if self.accelerator.is_main_process:
            self.log.write(step=progress.step, epoch=progress.epoch, **values)
        self.accelerator.log(values, step=progress.step)

    def _validations_left(self) -> int:
        if not self.scored_splits:
            return 0
        epochs = math.ceil(self.total_steps / max(1, len(self.batches)))
        return max(0, math.ceil((epochs - self.progress.epoch) / self.options.validation_epochs))

    def _speed(self) -> dict:
        """Over the whole run and all processes, without validation and checkpoints."""
        seconds = max(self.progress.seconds, math.ulp(1.0))
        return {
            "samples_per_second": self.progress.step * self.batches.pairs_per_step / seconds,
            "data_wait_share": self.progress.waited / seconds,
        }

    def _write_results(self):
        if not self.accelerator.is_main_process:
            return
        progress, bad = self.progress, self.bad_log.lines()
        results = {
            "steps": progress.step,
            "epochs": progress.epoch,
            "train_pairs": self.batches.length,
            "seconds": progress.seconds,
            **self._speed(),
            "bad_videos": len({line["video_id"] for line in bad if not line.get("is_used")}),
            "damaged_videos": len({line["video_id"] for line in bad if line.get("is_used")}),
            "skipped_steps": progress.num_skipped,
            "same_captions": progress.same_captions,
            **{name: sum(p.numel() for p in parameters) for name, parameters in self._parameters().items()},
            "best": progress.best,
        }
        (self.output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    def _parameters(self) -> dict[str, list]:
        """All parameters, the head's, and the trained ones, without peft's copy of the initial head."""
        named = [(name, p) for name, p in self.core.named_parameters() if "original_module" not in name]
        return {
            "parameters": [p for _, p in named],
            "head_parameters": [p for name, p in named if name.startswith("head.")],
            "trained_parameters": [p for _, p in named if p.requires_grad],
        }


def validation_metrics(encoded: EncodedSplit, experts: list[str]) -> dict[str, float]:
    """Uncorrected retrieval on the validation split, as flat metrics. Rsum is the sum of R@K over both directions."""
    results = score_retrieval(
        encoded.text_vectors, encoded.video_vectors, encoded.video_of_text, corrections=("none",), bootstrap=0
    ).results["none"]
    metrics = {
        f"{direction}_{name}": results[direction][name]
        for direction in ("text_to_video", "video_to_text")
        for name in ("R@1", "R@5", "R@10", "MdR")
    }
    metrics["Rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    gate = encoded.gate_weights.mean(dim=0).tolist()
    return metrics | {f"gate_{expert}": weight for expert, weight in zip(experts, gate, strict=True)}
