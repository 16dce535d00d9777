# Copyright 2026 The CAMoE contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The training loop: steps, validation, checkpoints, guards and telemetry of one run.

Everything that a run remembers is in `Progress`, the model, the optimiser, the schedule and the random state; what a
step sees follows from (seed, epoch, position) alone. So a run that was killed and resumed ends in the same bytes as
one that was not.
"""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from checkpoints import CheckpointFolder, Progress, TrainingLog, save_model
from encode_split import encode_split
from gradient_cache import cached_backward
from recipe import UserError
from retrieval_data import CaptionedClips, EpochSampler
from scoring import score_retrieval
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


class GlobalBatches:
    """Batch sampler: rank r of W takes its W-th part of each global batch; the last incomplete one is dropped."""

    def __init__(self, sampler: EpochSampler, batch_size: int, rank: int, world: int):
        if batch_size % world != 0:
            raise UserError(f"option 'batch_size' {batch_size} must be a multiple of the {world} processes")
        if len(sampler) < batch_size:
            raise UserError(f"option 'batch_size' {batch_size} is more than the {len(sampler)} training pairs")
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.start = 0  # batches of this epoch that are done already

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self):
        keys = list(self.sampler)
        share = self.batch_size // self.world
        for batch in range(self.start, len(self)):
            start = batch * self.batch_size + self.rank * share
            yield keys[start : start + share]


class Terminated(Exception):
    """SIGTERM arrived: the run has been saved and ends."""


class Trainer:
    """One run.

    Args:
        options: [`TrainOptions`]. accelerator: of the run. model, optimizer: prepared. scheduler: of the optimizer.
        processor: of the model. loader: over `batches`. validation: the split that chooses the best model, or None.
        extra: file name -> text, published with the model.
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
        validation: CaptionedClips | None,
        extra: dict[str, str],
    ):
        self.options = options
        self.accelerator = accelerator
        self.model = model
        self.core = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.processor = processor
        self.loader = loader
        self.batches: GlobalBatches = loader.batch_sampler
        self.validation = validation
        self.extra = extra
        self.output_dir = Path(options.output_dir)
        self.total_steps = options.total_steps(len(self.batches))
        self.checkpoints = CheckpointFolder(self.output_dir, options.save_total_limit)
        self.progress = Progress()
        accelerator.register_for_checkpointing(scheduler, self.progress)
        self.terminate = False

    def run(self):
        """Train to the end, from the beginning or a checkpoint."""
        options, progress = self.options, self.progress
        resumed = None
        if options.resume_from_checkpoint is not None:
            resumed = self.checkpoints.load(self.accelerator, options.resume_from_checkpoint)
        self.log = TrainingLog(self.output_dir / "training_log.jsonl", self.accelerator.is_main_process, progress.step)
        self.bad_log = self.output_dir / "bad_videos.jsonl"
        if self.accelerator.is_main_process and not resumed:
            self.bad_log.unlink(missing_ok=True)
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        self.bar = tqdm(
            total=self.total_steps,
            initial=progress.step,
            desc=f"training (from {resumed})" if resumed else "training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        try:
            self.model.train()
            while progress.step < self.total_steps:
                self._run_epoch()
            if self.total_steps == 0:  # a zero-shot baseline: only scored and saved
                self._validate_and_keep_best(last=True)
        finally:
            self.bar.close()
            signal.signal(signal.SIGTERM, previous)
        self._write_results()

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _run_epoch(self):
        progress = self.progress
        self.batches.sampler.epoch = progress.epoch
        self.batches.start = progress.batch
        asked = time.perf_counter()
        for batch in self.loader:
            waited = time.perf_counter() - asked
            self._step(batch, waited)
            progress.step += 1
            progress.batch += 1
            progress.seconds += time.perf_counter() - asked
            progress.waited += waited
            self.bar.update()
            done = progress.step == self.total_steps
            if progress.step % self.options.logging_steps == 0 or done:
                self._log_step()
            if self._agreed_to_terminate():
                self.checkpoints.save(self.accelerator, progress.step)
                raise Terminated(f"SIGTERM: saved step {progress.step}; go on with --resume_from_checkpoint latest")
            every = self.options.checkpointing_steps
            if every and progress.step % every == 0 and progress.batch < len(self.batches) and not done:
                self.checkpoints.save(self.accelerator, progress.step)
            if done:
                break
            asked = time.perf_counter()
        progress.epoch += 1
        progress.batch = 0
        self._validate_and_keep_best(last=progress.step == self.total_steps)
        self.checkpoints.save(self.accelerator, progress.step)

    def _step(self, batch: dict, waited: float):
        options = self.options
        bad = batch.pop("bad")
        if bad:
            self._report_bad(bad)
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        video_ids = batch.pop("video_ids")

        if options.gradient_cache_chunk:
            loss, gate_weights = cached_backward(
                self.accelerator, self.model, batch, video_ids, options.gradient_cache_chunk
            )
        else:
            with self.accelerator.autocast():
                output = self.model(**batch, video_ids=video_ids, return_loss=True)
            self.accelerator.backward(output.loss)
            loss, gate_weights = output.loss.detach(), output.gate_weights.detach()
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
        if not torch.isfinite(torch.as_tensor(grad_norm)) and self.accelerator.scaler is None:
            self._on_not_finite(loss, video_ids)
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.core.clamp_logit_scale()
        self.last = {"loss": loss, "grad_norm": grad_norm, "gate": gate_weights.float().mean(dim=0)}

    # --- guards ------------------------------------------------------------------------------------------------------

    def _on_sigterm(self, signum, frame):
        self.terminate = True

    def _agreed_to_terminate(self) -> bool:
        """Whether any process was told to end; all must decide alike, or one waits for the others for ever."""
        if self.accelerator.num_processes == 1:
            return self.terminate
        flag = torch.tensor([int(self.terminate)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _on_not_finite(self, loss, video_ids):
        progress = self.progress
        names = [self.loader.dataset.split.video_ids[i] for i in video_ids.tolist()]
        what = f"loss {loss.item():.4g}, gradient not finite, at step {progress.step + 1}; the batch's videos: "
        if self.options.on_nan == "skip" and progress.num_skipped < self.options.max_nan_skips:
            progress.num_skipped += 1
            self.bar.write(f"skipped a step ({progress.num_skipped}): {what}{', '.join(names)}", file=sys.stderr)
            return
        finished = self.checkpoints.finished()
        kept = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint was written yet"
        raise UserError(f"{what}{', '.join(names)}; {kept}; --on_nan skip goes on without such steps")

    def _report_bad(self, bad: list):
        """Stop at the first clip that could not be decoded, or write all of them down and go on."""
        if self.options.on_bad_video == "raise":
            raise UserError(f"{bad[0].cause} (--on_bad_video skip goes on without such clips)")
        self.progress.num_bad += len(bad)
        with self.bad_log.open("a", encoding="utf-8") as file:
            for video in bad:
                name = self.loader.dataset.split.video_ids[video.index]
                file.write(json.dumps({"video_id": name, "source": video.source, "cause": video.cause}) + "\n")

    # --- validation and telemetry ------------------------------------------------------------------------------------

    def _validate_and_keep_best(self, last: bool):
        progress, options = self.progress, self.options
        if self.validation is None:
            if last and self.accelerator.is_main_process:
                save_model(self.core, self.processor, self.output_dir, self.extra)
            return
        if not last and progress.epoch % options.validation_epochs != 0:
            return
        metrics = self._validate()
        self.log.write(
            step=progress.step, epoch=progress.epoch, **{f"validation_{name}": m for name, m in metrics.items()}
        )
        self.accelerator.log({f"validation/{name}": m for name, m in metrics.items()}, step=progress.step)
        self.bar.write(
            f"epoch {progress.epoch}: validation R@1 {metrics['text_to_video_R@1']:.1f} text to video, "
            f"{metrics['video_to_text_R@1']:.1f} video to text, Rsum {metrics['Rsum']:.1f}"
        )
        if progress.best is None or metrics["Rsum"] > progress.best["Rsum"]:
            progress.best = {"step": progress.step, "epoch": progress.epoch, **metrics}
            if self.accelerator.is_main_process:
                save_model(self.core, self.processor, self.output_dir, self.extra)

    def _validate(self) -> dict:
        """Uncorrected retrieval on the validation split -> flat metrics. Rsum is over both directions."""
        options = self.options
        self.model.eval()
        encoded = encode_split(
            self.accelerator,
            self.core,
            self.processor,
            self.validation,
            options.validation_captions,
            options.eval_batch_size,
            options.num_workers,
            options.on_bad_video,
        )
        self.model.train()
        results = score_retrieval(
            encoded.text_vectors, encoded.video_vectors, encoded.video_of_text, corrections=("none",), bootstrap=0
        ).results["none"]
        metrics = {
            f"{direction}_{name}": results[direction][name]
            for direction in ("text_to_video", "video_to_text")
            for name in ("R@1", "R@5", "R@10", "MdR")
        }
        metrics["Rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
        for expert, weight in zip(self.core.config.experts, encoded.gate_weights.mean(dim=0).tolist(), strict=True):
            metrics[f"gate_{expert}"] = weight
        return metrics

    def _log_step(self):
        progress = self.progress
        loss = self.last["loss"].item()
        rate = progress.step * self.options.batch_size / progress.seconds
        values = {
            "loss": loss,
            "grad_norm": float(self.last["grad_norm"]),
            "learning_rate": max(self.scheduler.get_last_lr()),
            "logit_scale": self.core.clip.logit_scale.exp().item(),
            "samples_per_second": rate,
            "data_wait_share": progress.waited / progress.seconds,
            **{
                f"gate_{expert}": weight
                for expert, weight in zip(self.core.config.experts, self.last["gate"].tolist(), strict=True)
            },
        }
        self.bar.set_postfix(loss=f"{loss:.3f}", samples=f"{rate:.0f}/s")
        self.log.write(step=progress.step, epoch=progress.epoch, **values)
        self.accelerator.log(values, step=progress.step)

    def _write_results(self):
        if not self.accelerator.is_main_process:
            return
        progress = self.progress
        results = {
            "steps": progress.step,
            "epochs": progress.epoch,
            "train_pairs": len(self.loader.dataset),
            "seconds": progress.seconds,
            "samples_per_second": progress.step * self.options.batch_size / max(progress.seconds, math.ulp(1.0)),
            "data_wait_share": progress.waited / max(progress.seconds, math.ulp(1.0)),
            "bad_videos": progress.num_bad,
            "skipped_steps": progress.num_skipped,
            "parameters": self.core.num_parameters(),
            "head_parameters": sum(p.numel() for p in self.core.head.parameters()),
            "best": progress.best,
        }
        (self.output_dir / "all_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
