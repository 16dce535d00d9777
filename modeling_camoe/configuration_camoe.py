# SPDX-License-Identifier: Apache-2.0
"""Configuration of CAMoE: a CLIP plus a single-gate mixture of experts over its frame embeddings.

Everything beyond CLIP is configured by name: which experts there are, how each aggregates frames, and the prior at
which the gate starts. Another list of experts is a change of configuration, never of code.
"""

import math
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# How each default expert aggregates frames: our choice (we had not read the paper's text; see docs/ablations.md).
# An expert of another name takes "excitation" unless `frame_aggregation` says otherwise.
DEFAULT_AGGREGATION = {
    "fusion": "transformer",
    "entity": "excitation",
    "action": "motion",
    "scene": "excitation",
}
FRAME_AGGREGATIONS = ("mean", "excitation", "transformer", "motion")
GATES = ("single", "uniform")


@strict
class CAMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CAMoEModel`].

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*):
            The CLIP underneath; its `projection_dim` is D, the width of every expert. Defaults to CLIP ViT-B/32.
        experts (`list[str]`, *optional*, defaults to `["fusion", "entity", "action", "scene"]`):
            Names of the E experts, in the order of texts and gates. Any non-empty list of distinct names.
        frame_aggregation (`dict[str, str]`, *optional*):
            Expert name -> `"mean"` (no parameters), `"excitation"` (one order-free weight per frame), `"transformer"`
            (temporal, sees the order) or `"motion"` (the same over what changes: each frame minus the one before).
            Experts that are not named take their default; the configuration then names them all.
        gate (`str`, *optional*, defaults to `"single"`):
            `"single"`: weights from the video alone, so that an index needs no query. `"uniform"`: 1/E, no parameters.
        gate_prior (`dict[str, float]`, *optional*):
            Expert name -> the gate's initial weight; normalised to sum to 1. Defaults to uniform.
        temporal_num_layers (`int`, *optional*, defaults to 1):
            Layers of each temporal transformer.
        temporal_num_attention_heads (`int`, *optional*):
            Attention heads of the temporal transformers. Defaults to one per 64 dimensions, as in CLIP.
        max_frames (`int`, *optional*, defaults to 64):
            Size of the temporal position table: the largest number of frames a clip may have.
        excitation_reduction (`int`, *optional*, defaults to 4):
            The excitation's hidden layer has D / this many units.
        dual_softmax_temp (`float`, *optional*, defaults to 100.0):
            Temperature of the dual softmax loss's prior; `None` trains with plain symmetric cross entropy. The
            default was best over both directions in our ablations (docs/ablations.md).
        expert_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean of the experts' own contrastive losses beside the fused one.
        image_mean, image_std (`list[float]`, *optional*):
            Per-channel statistics with which the model normalises uint8 frames on its own device; CLIP's by default.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of new linear layers and of the position table.

    Example:

    ```python
    >>> from modeling_camoe import CAMoEConfig, CAMoEModel

    >>> config = CAMoEConfig(experts=["fusion", "action"], gate_prior={"fusion": 3.0, "action": 1.0})
    >>> model = CAMoEModel(config)  # random weights, CLIP ViT-B/32 shapes
    ```
    """

    model_type = "camoe"
    sub_configs_defaults = {"clip_config": CLIPConfig}

    clip_config: dict | PreTrainedConfig | None = None
    experts: list[str] = field(default_factory=lambda: list(DEFAULT_AGGREGATION))
    frame_aggregation: dict[str, str] | None = None
    gate: str = "single"
    gate_prior: dict[str, float | int] | None = None
    temporal_num_layers: int = 1
    temporal_num_attention_heads: int | None = None
    max_frames: int = 64
    excitation_reduction: int = 4
    dual_softmax_temp: float | int | None = 100.0
    expert_loss_weight: float | int = 0.0
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.clip_config, dict):
            self.clip_config = CLIPConfig(**self.clip_config)
        elif self.clip_config is None:
            self.clip_config = CLIPConfig()
        if self.temporal_num_attention_heads is None:
            self.temporal_num_attention_heads = max(1, self.clip_config.projection_dim // 64)
        # Written out in full, in the order of `experts`: a checkpoint keeps its aggregations if a default changes.
        defaults = {name: DEFAULT_AGGREGATION.get(name, "excitation") for name in self.experts}
        self.frame_aggregation = defaults | (self.frame_aggregation or {})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Called by `@strict` after the types are checked: checks what types cannot express."""
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(f"`experts` must be a non-empty list of distinct names, got {self.experts}.")
        for field_name in ("frame_aggregation", "gate_prior"):
            unknown = sorted(set(getattr(self, field_name) or {}) - set(self.experts))
            if unknown:
                raise ValueError(f"`{field_name}` names {unknown}, which `experts` {self.experts} does not have.")
        for name, aggregation in self.frame_aggregation.items():
            if aggregation not in FRAME_AGGREGATIONS:
                raise ValueError(
                    f"`frame_aggregation` of expert {name!r} is {aggregation!r}; choose from {FRAME_AGGREGATIONS}."
                )
        if self.gate not in GATES:
            raise ValueError(f"`gate` is {self.gate!r}; choose from {GATES}.")
        if self.gate_prior is not None:
            missing = sorted(set(self.experts) - set(self.gate_prior))
            if missing or min(self.gate_prior.values()) <= 0:
                raise ValueError(f"`gate_prior` needs a positive weight for every expert, got {self.gate_prior}.")
        dim, heads = self.clip_config.projection_dim, self.temporal_num_attention_heads
        if heads < 1 or dim % heads != 0:
            raise ValueError(f"`projection_dim` {dim} is not a multiple of `temporal_num_attention_heads` {heads}.")
        for field_name in ("temporal_num_layers", "max_frames", "excitation_reduction"):
            if getattr(self, field_name) < 1:
                raise ValueError(f"`{field_name}` must be at least 1, got {getattr(self, field_name)}.")
        if self.expert_loss_weight < 0:
            raise ValueError(f"`expert_loss_weight` must not be negative, got {self.expert_loss_weight}.")
        if self.dual_softmax_temp is not None and self.dual_softmax_temp <= 0:
            raise ValueError(f"`dual_softmax_temp` must be positive or None, got {self.dual_softmax_temp}.")

    @property
    def projection_dim(self) -> int:
        """D, the width of every expert's embedding."""
        return self.clip_config.projection_dim

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """CLIP's text configuration: `resize_token_embeddings` writes the new vocabulary size there."""
        return self.clip_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def gate_log_prior(self) -> list[float]:
        """The gate's initial logits, (E,): log of the normalised prior."""
        prior = self.gate_prior or dict.fromkeys(self.experts, 1.0)
        total = sum(prior.values())
        return [math.log(prior[name] / total) for name in self.experts]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration; a plain CLIP's becomes the `clip_config` of a fresh CAMoE around it."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "clip":
            logger.info(f"{pretrained_model_name_or_path} is a plain CLIP: the experts and the gate start fresh.")
            config_dict = {"clip_config": config_dict}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in the library, but keyword values are merged in before validation instead of set unchecked after it.

        If `experts` is given, aggregations that the dictionary has for other experts are dropped.
        """
        own_fields = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)} - {"clip_config"}
        own = {key: kwargs.pop(key) for key in own_fields & set(kwargs)}
        written = config_dict.get("frame_aggregation")
        if written and "experts" in own:
            kept = {name: written[name] for name in written if name in own["experts"]}
            config_dict = config_dict | {"frame_aggregation": kept}
        return super().from_dict(config_dict | own, **kwargs)


__all__ = ["CAMoEConfig"]
