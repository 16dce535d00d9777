# SPDX-License-Identifier: Apache-2.0
"""Configuration of CAMoE: a dual encoder plus a single-gate mixture of experts over its frame embeddings.

It is the only place that says which experts there are, in which order, what text each reads, how each aggregates
frames, and with which statistics frames are normalised. A processor is made from it. Another list of experts is a
change of configuration, never of code.
"""

import copy
import math
from dataclasses import field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import logging

from .losses import DUAL_SOFTMAX_PRIORS


logger = logging.get_logger(__name__)

# The dual encoders that may stand underneath, and what their text towers need. "longest": the embedding is read at a
# token of the text (its end, or its first), and padding after it changes nothing. "max_length": SigLIP reads the last
# position of a text that was padded to the tower's full length, and attends to that padding.
BACKBONES = {
    "clip": "longest",
    "siglip": "max_length",
    "metaclip_2": "longest",
    "chinese_clip": "longest",
    "altclip": "longest",
}

# How each default expert aggregates frames: our choice (we had not read the paper's text; see docs/ablations.md).
# An expert of another name takes "excitation" unless `frame_aggregation` says otherwise.
DEFAULT_AGGREGATION = {
    "fusion": "transformer",
    "entity": "excitation",
    "action": "motion",
    "scene": "excitation",
    "mean": "mean",
}
DEFAULT_EXPERTS = ("fusion", "entity", "action", "scene")
# One expert, the mean of the frames: exactly what a dual encoder without any training says about a clip.
ZERO_SHOT = {"experts": ["mean"], "gate": "uniform"}
# What a model's inputs depend on. A model is trained with these, a processor is made for these.
INPUT_FIELDS = ("experts", "streams", "image_mean", "image_std", "image_resample")
FRAME_AGGREGATIONS = ("mean", "excitation", "transformer", "motion")
GATES = ("single", "uniform")


@strict
class CAMoEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CAMoEModel`].

    Args:
        clip_config (`PreTrainedConfig` or `dict`, *optional*):
            The dual encoder underneath: `clip`, `siglip` (which SigLIP 2 at a fixed resolution also is), `metaclip_2`,
            `chinese_clip` or `altclip`. The width of its pooled vectors is D. Defaults to CLIP ViT-B/32.
        experts (`list[str]`, *optional*, defaults to `["fusion", "entity", "action", "scene"]`):
            Names of the E experts, in the order of texts and gates. Any non-empty list of distinct identifiers.
        streams (`dict[str, str]`, *optional*):
            Expert name -> the caption stream that it reads. Experts that are not named read the stream of their own
            name; the configuration then names them all.
        frame_aggregation (`dict[str, str]`, *optional*):
            Expert name -> `"mean"` (no parameters), `"excitation"` (one order-free weight per frame), `"transformer"`
            (temporal, can see the order) or `"motion"` (the same over what changes: each frame minus the one before).
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
            default is CLIP's scale: a prior at the scale learned faster in our ablations, and after longer training
            the plain loss was better video to text (docs/ablations.md).
        dual_softmax_prior (`str`, *optional*, defaults to `"trained"`):
            `"trained"` is the paper's prior; `"detached"` stops its gradient; `"own_axis"` normalises it over the axis
            of the cross entropy. The last two are ours.
        expert_loss_weight (`float`, *optional*, defaults to 0.0):
            Weight of the mean of the experts' own contrastive losses beside the fused one.
        image_mean, image_std (`list[float]` or `float`, *optional*):
            Statistics with which frames are normalised, per channel or one for all; CLIP's by default. A plain
            checkpoint's are read from its own files.
        image_resample (`int`, *optional*, defaults to 3):
            How frames are resized, as PIL numbers it: 2 bilinear, 3 bicubic.
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
    sub_configs_defaults = {"clip_config": SubConfigSpec(AutoConfig, model_type="clip")}
    # `Trainer` concatenates the outputs of a whole evaluation: it keeps `text_embeds`, `video_embeds`, `gate_weights`.
    keys_to_ignore_at_inference = [
        "logits_per_text",
        "logits_per_video",
        "expert_scores",
        "text_model_output",
        "video_model_output",
    ]

    clip_config: dict | PreTrainedConfig | None = None
    experts: list[str] = field(default_factory=lambda: list(DEFAULT_EXPERTS))
    streams: dict[str, str] | None = None
    frame_aggregation: dict[str, str] | None = None
    gate: str = "single"
    gate_prior: dict[str, float | int] | None = None
    temporal_num_layers: int = 1
    temporal_num_attention_heads: int | None = None
    max_frames: int = 64
    excitation_reduction: int = 4
    dual_softmax_temp: float | int | None = 100.0
    dual_softmax_prior: str = "trained"
    expert_loss_weight: float | int = 0.0
    image_mean: list[float] | float = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] | float = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    image_resample: int = 3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.clip_config, dict | PreTrainedConfig):
            check_backbone(self.clip_config)
        for name in ("image_mean", "image_std"):
            if isinstance(getattr(self, name), float):
                setattr(self, name, [getattr(self, name)] * 3)
        super().__post_init__(**kwargs)  # makes a configuration of `clip_config`
        if self.temporal_num_attention_heads is None:
            self.temporal_num_attention_heads = max(1, self.projection_dim // 64)
        # Written out in full, in the order of `experts`: a checkpoint keeps its aggregations if a default changes.
        self.frame_aggregation = self._default_aggregation() | (self.frame_aggregation or {})
        self.streams = dict(zip(self.experts, self.experts, strict=True)) | (self.streams or {})

    def _default_aggregation(self) -> dict[str, str]:
        return {name: DEFAULT_AGGREGATION.get(name, "excitation") for name in self.experts}

    def follow_experts(self):
        """Make the fields that are per expert those of `experts`, after that list was changed, and check them.

        Experts that were there before keep their values, new ones take the defaults. A prior that does not cover all
        experts any more is dropped.
        """
        kept = {name: kind for name, kind in (self.frame_aggregation or {}).items() if name in self.experts}
        self.frame_aggregation = self._default_aggregation() | kept
        self.streams = {name: (self.streams or {}).get(name, name) for name in self.experts}
        if self.gate_prior is not None:
            covered = set(self.experts) <= set(self.gate_prior)
            self.gate_prior = {name: self.gate_prior[name] for name in self.experts} if covered else None
        self._check_experts()

    def input_fields(self) -> dict[str, Any]:
        """The present values of what a model's inputs depend on, as copies."""
        return {name: copy.copy(getattr(self, name)) for name in INPUT_FIELDS}

    def validate_architecture(self):
        """Called by `@strict` after the types are checked: checks what types cannot express."""
        self._check_experts()
        if self.gate not in GATES:
            raise ValueError(f"`gate` is {self.gate!r}; choose from {GATES}.")
        text, vision = self.clip_config.text_config, self.clip_config.vision_config
        if self.clip_config.model_type == "siglip" and (
            not vision.vision_use_head or text.projection_size != vision.hidden_size
        ):
            raise ValueError(
                "`clip_config` is a SigLIP whose towers do not end in one space: `vision_use_head` is "
                f"{vision.vision_use_head}, `projection_size` {text.projection_size}, `hidden_size` "
                f"{vision.hidden_size}."
            )
        dim, heads = self.projection_dim, self.temporal_num_attention_heads
        if heads < 1 or dim % heads != 0:
            raise ValueError(f"`projection_dim` {dim} is not a multiple of `temporal_num_attention_heads` {heads}.")
        for field_name in ("temporal_num_layers", "max_frames", "excitation_reduction"):
            if getattr(self, field_name) < 1:
                raise ValueError(f"`{field_name}` must be at least 1, got {getattr(self, field_name)}.")
        if self.expert_loss_weight < 0:
            raise ValueError(f"`expert_loss_weight` must not be negative, got {self.expert_loss_weight}.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"`image_mean` and `image_std` are three numbers each, the second positive, got {self.image_mean} "
                f"and {self.image_std}."
            )
        if self.dual_softmax_temp is not None and self.dual_softmax_temp <= 0:
            raise ValueError(f"`dual_softmax_temp` must be positive or None, got {self.dual_softmax_temp}.")
        if self.dual_softmax_prior not in DUAL_SOFTMAX_PRIORS:
            raise ValueError(
                f"`dual_softmax_prior` is {self.dual_softmax_prior!r}; choose from {DUAL_SOFTMAX_PRIORS}."
            )

    def _check_experts(self):
        """Names, and the fields that are per expert."""
        if not self.experts or len(set(self.experts)) != len(self.experts):
            raise ValueError(f"`experts` must be a non-empty list of distinct names, got {self.experts}.")
        for name in self.experts:  # each names a module and its weights
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                reason = "a module's own attribute" if name.isidentifier() else "no identifier"
                raise ValueError(f"`experts` has {name!r}, which is {reason}: choose another name.")
        for field_name in ("frame_aggregation", "gate_prior", "streams"):
            unknown = sorted(set(getattr(self, field_name) or {}) - set(self.experts))
            if unknown:
                raise ValueError(f"`{field_name}` names {unknown}, which `experts` {self.experts} does not have.")
        for name, aggregation in self.frame_aggregation.items():
            if aggregation not in FRAME_AGGREGATIONS:
                raise ValueError(
                    f"`frame_aggregation` of expert {name!r} is {aggregation!r}; choose from {FRAME_AGGREGATIONS}."
                )
        if self.gate_prior is not None:
            missing = sorted(set(self.experts) - set(self.gate_prior))
            if missing or min(self.gate_prior.values()) <= 0:
                raise ValueError(f"`gate_prior` needs a positive weight for every expert, got {self.gate_prior}.")

    @property
    def projection_dim(self) -> int:
        """D, the width of the dual encoder's pooled vectors and of every expert's embedding."""
        clip = self.clip_config
        return clip.text_config.projection_size if clip.model_type == "siglip" else clip.projection_dim

    @property
    def text_padding(self) -> str:
        """How the text tower wants texts padded: to the "longest" of a batch, or to "max_length", its positions."""
        return BACKBONES[self.clip_config.model_type]

    @property
    def max_text_length(self) -> int:
        """Tokens that the text tower takes, start and end included."""
        positions = self.clip_config.text_config.max_position_embeddings
        # As in RoBERTa, AltCLIP counts positions from the padding token's id + 1.
        return positions - (self.clip_config.model_type == "altclip") * (self.clip_config.text_config.pad_token_id + 1)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The text tower's configuration: `resize_token_embeddings` writes the new vocabulary size there."""
        return self.clip_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def gate_log_prior(self) -> list[float]:
        """The gate's initial logits, (E,): log of the normalised prior."""
        prior = self.gate_prior or dict.fromkeys(self.experts, 1.0)
        total = sum(prior.values())
        return [math.log(prior[name] / total) for name in self.experts]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path, *, zero_shot: bool = False, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a configuration. That of a plain dual encoder becomes the `clip_config` of a fresh CAMoE around it.

        Args:
            zero_shot: give a plain dual encoder one expert, the mean of its frames, instead of the default experts.
                No effect on a CAMoE checkpoint.
        """
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            check_backbone(config_dict, pretrained_model_name_or_path)
            logger.info(f"{pretrained_model_name_or_path} is a plain dual encoder: experts and gate start fresh.")
            config_dict = {
                "clip_config": config_dict,
                **image_statistics(load_image_processor(pretrained_model_name_or_path, config_dict, **hub)),
                **(ZERO_SHOT if zero_shot else {}),
            }
        return config_dict, kwargs

    @classmethod
    def written_experts(cls, pretrained_model_name_or_path, **hub) -> list[str] | None:
        """The experts of a CAMoE checkpoint in the order of its weights, None if it is none or has no config.json."""
        if pretrained_model_name_or_path is None:
            return None
        try:
            written, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        except OSError:
            return None
        return written.get("experts", list(DEFAULT_EXPERTS)) if written.get("model_type") == cls.model_type else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in the library, but keyword values are merged in before validation instead of set unchecked after it.

        If `experts` is given, what the dictionary says about other experts is dropped.
        """
        own_fields = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)} - {"clip_config"}
        own = {key: kwargs.pop(key) for key in own_fields & set(kwargs)}
        if "experts" in own:
            config_dict = dict(config_dict)
            for name in {"frame_aggregation", "streams", "gate_prior"} & set(config_dict):
                written = config_dict[name] or {}
                config_dict[name] = {expert: written[expert] for expert in written if expert in own["experts"]} or None
            if set(config_dict.get("gate_prior") or {}) != set(own["experts"]):
                config_dict.pop("gate_prior", None)  # it says nothing about the new experts
        return super().from_dict(config_dict | own, **kwargs)


def check_backbone(config: dict | PreTrainedConfig, name: str = "`clip_config`"):
    """Refuse another kind of model by name.

    Raises:
        ValueError: naming the kinds that are supported.
    """
    is_dict = isinstance(config, dict)
    model_type = config.get("model_type", "clip") if is_dict else config.model_type
    if model_type not in BACKBONES:
        detail = " (SigLIP 2 only at a fixed resolution, not NaFlex)" if model_type == "siglip2" else ""
        raise ValueError(f"{name} is a {model_type!r} model; supported are {', '.join(BACKBONES)}{detail}.")


def load_image_processor(pretrained_model_name_or_path, clip_config: dict | PreTrainedConfig, **hub):
    """The image processor of a plain dual encoder, from either of the files in which it may be.

    Args:
        clip_config: of the dual encoder. A folder without such a file has the library's defaults for this kind of
            model at its image size, with a warning.
        **hub: `revision`, `token` and so on.

    Raises:
        ValueError: it scales or normalises pictures in another way than a CAMoE does.
    """
    from transformers import AutoImageProcessor  # loads torchvision, which a CAMoE checkpoint's config does not need
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    try:
        processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
    except OSError:
        if isinstance(clip_config, dict):
            clip_config = AutoConfig.for_model(**clip_config)
        side = clip_config.vision_config.image_size
        square = {"height": side, "width": side}
        is_cropped = clip_config.model_type != "siglip"
        sizes = {"size": {"shortest_edge": side}, "crop_size": square} if is_cropped else {"size": square}
        processor = IMAGE_PROCESSOR_MAPPING[type(clip_config)]["torchvision"](**sizes)
        logger.warning(
            f"{pretrained_model_name_or_path} has no file of an image processor: frames are prepared as is usual for "
            f"a {clip_config.model_type!r} model of {side} pixels, {image_statistics(processor)}."
        )
    scaling = {name: getattr(processor, name) for name in ("do_rescale", "rescale_factor", "do_normalize")}
    if not (processor.do_rescale and processor.do_normalize and is_rescaled_to_one(processor.rescale_factor)):
        raise ValueError(
            f"{pretrained_model_name_or_path} prepares pictures with {scaling}; a CAMoE always rescales them by 1/255 "
            "and normalises them."
        )
    return processor


def is_rescaled_to_one(factor: float) -> bool:
    """Whether bytes times this are from 0 to 1, as the model makes them."""
    return math.isclose(factor, 1 / 255, rel_tol=1e-3)


def image_statistics(image_processor) -> dict[str, Any]:
    """What the configuration knows of an image or video processor."""
    return {
        "image_mean": [float(value) for value in image_processor.image_mean],
        "image_std": [float(value) for value in image_processor.image_std],
        "image_resample": int(image_processor.resample),
    }


# What tells where on the Hub a file is, and which of its versions.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

__all__ = ["CAMoEConfig"]
