# SPDX-License-Identifier: Apache-2.0
"""What a run tells about its speed: rates since the last line of the log, memory, and the time that is left.

MFU, model FLOPs utilisation, is the share of the device's peak that the model's own operations take: forward and
backward pass of the frames and of the tokens that were really read, as a formula of the shapes. What a gradient cache
or checkpointing computes twice does not count.
"""

import resource
import sys
from dataclasses import dataclass

import torch


# Dense bfloat16 operations per second, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


def peak_rate(device: torch.device) -> float | None:
    """Operations per second of a device at best; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAKS.items() if card in name), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU, or that this process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class PairCost:
    """Operations of one pair, forward and backward."""

    fixed: float = 0.0  # of the frames, the head and the loss
    token: float = 0.0  # of each token of text


class Telemetry:
    """Counts steps between the lines of a log.

    Args:
        device: of this process. processes: of the run. pairs: of a step, over all processes. cost: of a pair.
    """

    def __init__(self, device: torch.device, processes: int, pairs: int, cost: PairCost | None):
        self.device, self.processes, self.pairs, self.cost = device, processes, pairs, cost
        self.peak = peak_rate(device)
        self.validation_seconds = 0.0  # of the last validation
        self._start()

    def _start(self):
        self.steps, self.seconds, self.waited, self.tokens = 0, 0.0, 0.0, 0

    def add(self, seconds: float, waited: float, tokens: int):
        """A step: its seconds, those of them spent waiting for data, and this process's tokens."""
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        self.tokens += tokens

    def values(self, steps_left: int, validations_left: int) -> dict[str, float]:
        """What happened since the last call."""
        seconds = max(self.seconds, 1e-9)
        rate = self.steps * self.pairs / seconds
        values = {
            "samples_per_second": rate,
            "samples_per_second_per_device": rate / self.processes,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
            "hours_left": (
                steps_left * seconds / max(1, self.steps) + validations_left * self.validation_seconds
            ) / 3600,
        }  # fmt: skip
        if self.cost is not None and self.peak is not None:
            own_pairs = self.steps * self.pairs / self.processes
            values["mfu"] = (own_pairs * self.cost.fixed + self.tokens * self.cost.token) / seconds / self.peak
        self._start()
        return values
