# SPDX-License-Identifier: Apache-2.0
"""CAMoE: video-text retrieval with a single-gate mixture of experts over CLIP's frame embeddings (arXiv 2109.04290).

B videos, N texts, T frames, E experts, D = width of CLIP's embeddings, L tokens. A clip's frames go through CLIP one
by one, the experts turn them into E vectors, the gate weights these, and the fold makes one vector of E*D entries.
Each expert has its own text, so a caption is E texts, folded the same way. The inner product of the two is the score.
"CLIP" is any of the dual encoders in configuration_camoe.py.

Every `pooler_output` here IS such a folded vector: index the videos' and query with a text's, by inner product.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_camoe import CAMoEConfig
from .experts import IdentityLinear, PositionEmbedding, PriorLinear, ZeroLinear
from .losses import contrastive_loss, expert_contrastive_loss
from .retrieval import CAMoERetrievalHead, expert_scores, fold_text, fold_video, similarity
from .saving import SavesModel
from .text_groups import encode_in_groups, may_group


MAX_LOGIT_SCALE = math.log(100)  # as in CLIP and CLIP4Clip


@dataclass
class CAMoEVideoOutput(BaseModelOutputWithPooling):
    """
    Output of [`CAMoEModel.get_video_features`].

    Args:
        last_hidden_state: (B, T * patches, vision hidden size), CLIP's vision tower.
        pooler_output: (B, E*D), the folded video vector, of length at most 1.
        hidden_states, attentions: CLIP's vision tower, on request, frames as its batch: (B * T, ...).
        video_embeds: (B, E, D), one unit vector per expert.
        gate_weights: (B, E), rows sum to 1.
        frame_embeds: (B, T, D), CLIP's unit vectors of the frames.
        frame_weights: (B, E, T), each frame's share in each expert, rows sum to 1; padding has 0. Only "excitation"
            weights frames: shares of the others are even, and say nothing about what a "transformer" used.
    """

    video_embeds: torch.FloatTensor | None = None
    gate_weights: torch.FloatTensor | None = None
    frame_embeds: torch.FloatTensor | None = None
    frame_weights: torch.FloatTensor | None = None


@dataclass
class CAMoETextOutput(BaseModelOutputWithPooling):
    """
    Output of [`CAMoEModel.get_text_features`].

    Args:
        last_hidden_state: (N, E * L, text hidden size), CLIP's text tower.
        pooler_output: (N, E*D), the folded text vector, of length sqrt(E).
        hidden_states, attentions: CLIP's text tower, on request, a caption's texts as its batch: (N * E, ...).
        text_embeds: (N, E, D), one unit vector per expert.
    """

    text_embeds: torch.FloatTensor | None = None


@dataclass
class CAMoEOutput(ModelOutput):
    """
    Output of [`CAMoEModel`].

    Args:
        loss: scalar, on request.
        logits_per_text: (N, B), exp(logit_scale) times the score.
        logits_per_video: (B, N).
        text_embeds: (N, E, D). video_embeds: (B, E, D). gate_weights: (B, E).
        expert_scores: (N, B, E), on request, what each expert adds to the score: gate times cosine.
        text_model_output: [`CAMoETextOutput`]. video_model_output: [`CAMoEVideoOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    logits_per_video: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    video_embeds: torch.FloatTensor | None = None
    gate_weights: torch.FloatTensor | None = None
    expert_scores: torch.FloatTensor | None = None
    text_model_output: CAMoETextOutput | None = None
    video_model_output: CAMoEVideoOutput | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class GateRows(ConversionOps):
    """Brings the gate's rows from one order of experts into another. An expert that was not there starts at its prior.

    Args:
        written: experts in the order of a checkpoint's rows.
        experts: those of the model, in its order.
        log_prior: (E,) logits at which the model's own rows start.
    """

    def __init__(self, written: list[str], experts: list[str], log_prior: list[float]):
        self.written, self.experts, self.log_prior = written, experts, log_prior

    @torch.no_grad()
    def convert(self, input_dict: dict, **kwargs) -> dict:
        """Weight (E',D) -> (E,D), or bias (E',) -> (E,)."""
        return {name: [self._rows_of(tensor) for tensor in tensors] for name, tensors in input_dict.items()}

    def _rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = dict(zip(self.written, tensor, strict=True))
        starts = [0.0] * len(self.experts) if tensor.ndim > 1 else self.log_prior
        fresh = {name: torch.full_like(tensor[0], start) for name, start in zip(self.experts, starts, strict=True)}
        return torch.stack([rows.get(name, fresh[name]) for name in self.experts])

    @property
    def reverse_op(self) -> "GateRows":
        return GateRows(self.experts, self.experts, self.log_prior)  # the model saves its own order


class CAMoEPreTrainedModel(SavesModel, PreTrainedModel):
    """Weight initialisation, loading and saving. The prefix "clip" lets plain CLIP checkpoints load unchanged."""

    config: CAMoEConfig
    base_model_prefix = "clip"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over pairs, so `Trainer` must divide by its accumulation steps
    # A thousandth of the work; in half precision its sums over frames would move a score by more than both towers do.
    _keep_in_fp32_modules_strict = ["head"]
    _no_split_modules = ["CAMoERetrievalHead"]  # the library adds CLIP's own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` leaves loaded tensors alone, as in the library's own models.

        For custom code the library skips modules without parameters of their own. CLIP's attention and MLP are among
        them, and would start with the wrong scale where a checkpoint lacks their weights.
        """
        return False

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """As in the library, but each row of the gate goes to the expert for which it was trained.

        Rows have no names of their own: config.json, beside the weights, says their order.
        """
        if state_dict is None and model.head.gate is not None:
            written = model.config.written_experts(
                load_config.pretrained_model_name_or_path, **load_config.download_kwargs
            )
            experts = list(model.head.experts)
            if written is not None and written != experts:
                rows = GateRows(written, experts, model.head.gate.projection.start)
                name = "head.gate.projection"  # both its tensors
                load_config.weight_mapping.append(WeightConverter(name, name, [rows]))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, IdentityLinear):
            init.eye_(module.weight)
        elif isinstance(module, PositionEmbedding):
            init.normal_(module.weight, std=module.std)
        elif isinstance(module, PriorLinear):
            init.zeros_(module.weight)
            init.copy_(module.bias, torch.tensor(module.start))
        elif isinstance(module, CAMoEModel):
            # Most dual encoders leave their scale uninitialised when a checkpoint lacks it; SigLIP sets its own.
            start = getattr(self.config.clip_config, "logit_scale_init_value", None)
            if start is not None:
                init.constant_(module.clip.logit_scale, start)


class CAMoEModel(CAMoEPreTrainedModel):
    """
    CAMoE: CLIP, experts over its frame embeddings, a gate, and the contrastive losses.

    Loads its own checkpoints and plain dual encoders (`CAMoEModel.from_pretrained("openai/clip-vit-base-patch32")`).
    With the latter, experts and gate start fresh: every expert gives exactly the mean-pooled embedding of the frames.
    `from_pretrained(path, experts=[...])` takes experts out of a checkpoint, reorders them or adds some: weights and
    gate rows go with an expert's name, and new ones start fresh.
    `CAMoEModel.from_pretrained("google/siglip2-base-patch16-224", zero_shot=True)` has one expert, that mean: its
    score is that model's own cosine. SigLIP's `logit_bias` is kept but takes no part: it would shift all scores alike.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> import modeling_camoe  # registers the Auto classes

    >>> model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    >>> videos = model.get_video_features(**processor(videos=["a.mp4", "b.mp4"], return_tensors="pt")).pooler_output
    >>> captions = ["a dog catches a frisbee"]
    >>> texts = model.get_text_features(**processor(text=captions, return_tensors="pt")).pooler_output
    >>> scores = texts @ videos.T  # (1, 2), in [-1, 1]
    ```
    """

    def __init__(self, config: CAMoEConfig):
        config.follow_experts()  # the list may have been changed since the configuration was made
        super().__init__(config)
        self.clip = AutoModel.from_config(config.clip_config)
        if hasattr(self.clip, "logit_bias"):
            # Kept, but no parameter: it gets no gradient, for which DDP would wait.
            bias = self.clip.logit_bias.detach()
            del self.clip.logit_bias
            self.clip.logit_bias = nn.Buffer(bias)
        self.head = CAMoERetrievalHead(
            dim=config.projection_dim,
            experts={name: config.frame_aggregation[name] for name in config.experts},
            # CODEPATH: "single" is CAMoE; "uniform" is the ablation and baseline recipes (one expert needs no gate)
            gate_log_prior=config.gate_log_prior if config.gate == "single" else None,
            num_layers=config.temporal_num_layers,
            num_heads=config.temporal_num_attention_heads,
            max_frames=config.max_frames,
            reduction=config.excitation_reduction,
        )
        self._built_with = config.input_fields()
        self.post_init()

    def save_pretrained(self, *args, **kwargs):
        """As in the library; with code, processor and more, so that the folder is a release (saving.py).

        Raises:
            ValueError: the configuration's experts are not those with which the model was built.
        """
        self._check_unchanged("experts")
        return super().save_pretrained(*args, **kwargs)

    def _check_unchanged(self, *names: str):
        for name in names:
            built, said = self._built_with[name], getattr(self.config, name)
            if said != built:
                raise ValueError(
                    f"The configuration's `{name}` was changed to {said} after the model was built with {built}. "
                    f"Choose it when loading: `CAMoEModel.from_pretrained(path, {name}=...)`."
                )

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.clip.text_model.set_input_embeddings(value)

    @property
    def embeds_dtype(self) -> torch.dtype:
        """Of embeddings, vectors and scores: float32 at least, whatever the dtype of the towers."""
        return torch.promote_types(self.dtype, torch.float32)

    @torch.no_grad()
    def clamp_logit_scale(self):
        """Keep exp(logit_scale) at most 100. Call after every optimiser step."""
        self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        frame_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CAMoEVideoOutput:
        """
        Clips -> one folded vector each.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised floats, or uint8 RGB that is rescaled and normalised here.
            frame_mask: (B, T), 1 for a real frame, 0 for padding; None if all are real.
            frame_embeds: (B, T, D) from an earlier call, instead of pixels: CLIP does not run again.

        Returns:
            [`CAMoEVideoOutput`], whose `pooler_output` (B, E*D) is the vector to index.
        """
        if (pixel_values_videos is None) == (frame_embeds is None):
            raise ValueError("Give either `pixel_values_videos` or `frame_embeds`.")
        self._check_unchanged("experts", "image_mean", "image_std")
        clip_output, last_hidden_state = BaseModelOutputWithPooling(), None
        if frame_embeds is None:
            clip_output, frame_embeds = self._embed_frames(pixel_values_videos, **kwargs)
            last_hidden_state = clip_output.last_hidden_state.unflatten(0, frame_embeds.shape[:2]).flatten(1, 2)
        else:
            frame_embeds = frame_embeds.to(self.embeds_dtype)
        if frame_mask is None:
            frame_mask = torch.ones(frame_embeds.shape[:2], dtype=torch.bool, device=frame_embeds.device)
        video_embeds, gate_weights, frame_weights = self.head(frame_embeds, frame_mask)
        return CAMoEVideoOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=fold_video(video_embeds, gate_weights),
            hidden_states=clip_output.hidden_states,
            attentions=clip_output.attentions,
            video_embeds=video_embeds,
            gate_weights=gate_weights,
            frame_embeds=frame_embeds,
            frame_weights=frame_weights,
        )

    def _embed_frames(self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        """(B,T,3,H,W) -> CLIP's output for the B*T frames, and their unit vectors (B,T,D)."""
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                f"`pixel_values_videos` must be (videos, frames, 3, H, W), got {tuple(pixel_values_videos.shape)}."
            )
        side = self.clip.vision_model.config.image_size
        expected = (side, side) if isinstance(side, int) else tuple(side)
        if tuple(pixel_values_videos.shape[3:]) != expected and not kwargs.get("interpolate_pos_encoding"):
            raise ValueError(f"Frames are {tuple(pixel_values_videos.shape[3:])} pixels, the model takes {expected}.")
        batch, num_frames = pixel_values_videos.shape[:2]
        pixels = pixel_values_videos.flatten(0, 1)  # (B*T,3,H,W)
        if pixels.dtype == torch.uint8:
            # In float32 whatever the model's dtype, and in the processor's order of operations: the same to the bit.
            statistics = (self.config.image_mean, self.config.image_std)
            mean, std = (255 * torch.tensor(v, dtype=torch.float32, device=pixels.device) for v in statistics)  # (3,)
            pixels = (pixels.float() - mean[:, None, None]) / std[:, None, None]
        clip_output = self.clip.get_image_features(pixels.to(self.dtype), **self._layer_options(kwargs))
        frame_embeds = F.normalize(clip_output.pooler_output.to(self.embeds_dtype), dim=-1)
        frame_embeds = frame_embeds.unflatten(0, (batch, num_frames))  # (B,T,D)
        return clip_output, frame_embeds

    def _layer_options(self, kwargs: dict) -> dict:
        """A call's options; outputs of single layers that this configuration asks for reach both towers."""
        names = ("output_hidden_states", "output_attentions")
        return {name: True for name in names if getattr(self.config, name, False)} | kwargs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CAMoETextOutput:
        """
        Captions, as one text per expert -> one folded vector each.

        Args:
            input_ids: (N, E, L), from the processor, padded to the longest text of the batch (for SigLIP, to its
                tower's length). With one expert also (N, L), as the tokenizer gives them.
            attention_mask: like `input_ids`.
            text_embeds: (N, E, D) from an earlier call, instead of ids: CLIP does not run again.

        Returns:
            [`CAMoETextOutput`], whose `pooler_output` (N, E*D) is the vector to query with.
        """
        if (input_ids is None) == (text_embeds is None):
            raise ValueError("Give either `input_ids` or `text_embeds`.")
        self._check_unchanged("experts")
        if text_embeds is not None:
            text_embeds = text_embeds.to(self.embeds_dtype)
            return CAMoETextOutput(pooler_output=fold_text(text_embeds), text_embeds=text_embeds)
        num_experts = len(self.config.experts)
        if input_ids.ndim == 2 and num_experts == 1:  # as for the dual encoder itself
            input_ids = input_ids[:, None]
            attention_mask = None if attention_mask is None else attention_mask[:, None]
        if input_ids.ndim != 3 or input_ids.shape[1] != num_experts:
            raise ValueError(
                f"`input_ids` must be (texts, {num_experts} experts, tokens), got {tuple(input_ids.shape)}. "
                "Use the processor that was saved with this model: it makes one text per expert."
            )
        is_padded = self.config.text_padding == "max_length"
        if is_padded and input_ids.shape[2] != self.config.max_text_length:
            raise ValueError(
                f"`input_ids` have {input_ids.shape[2]} tokens; a {self.config.clip_config.model_type!r} text tower "
                "reads its last position, so texts must be padded to "
                f"{self.config.max_text_length}, as the processor does."
            )
        kwargs = self._layer_options(kwargs)
        batch = input_ids.shape[0]
        input_ids = input_ids.flatten(0, 1)  # (N*E,L)
        attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        clip_output = None
        if may_group(input_ids, attention_mask) and not _wants_layers(self.clip.config.text_config, kwargs):
            encode = functools.partial(self.clip.get_text_features, **kwargs)
            clip_output = encode_in_groups(encode, input_ids, attention_mask, may_trim=not is_padded)
        if clip_output is None:
            clip_output = self.clip.get_text_features(input_ids, attention_mask=attention_mask, **kwargs)
        text_embeds = F.normalize(clip_output.pooler_output.to(self.embeds_dtype), dim=-1)
        text_embeds = text_embeds.unflatten(0, (batch, num_experts))  # (N,E,D)
        return CAMoETextOutput(
            last_hidden_state=clip_output.last_hidden_state.unflatten(0, (batch, num_experts)).flatten(1, 2),
            pooler_output=fold_text(text_embeds),
            hidden_states=clip_output.hidden_states,
            attentions=clip_output.attentions,
            text_embeds=text_embeds,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        video_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        output_expert_scores: bool = False,
        frame_embeds: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        gather_across_devices: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CAMoEOutput:
        """
        Score N captions against B clips.

        Args:
            input_ids, attention_mask: (N, E, L). pixel_values_videos: (B, T, 3, H, W). frame_mask: (B, T).
            video_ids: (B,) integers, for the loss: pairs of the same video are not each other's negatives.
            return_loss: also compute the contrastive loss (N = B, pair n in row n of both).
            output_expert_scores: also return each expert's contribution to each score.
            frame_embeds: (B, T, D) instead of pixels, text_embeds: (N, E, D) instead of ids, from an earlier call.
            gather_across_devices: the loss is that of the pairs of all processes, which must all ask for it.

        Returns:
            [`CAMoEOutput`].
        """
        # Texts first: grouping them waits for the device, which is still idle here.
        text_output = self.get_text_features(input_ids, attention_mask, text_embeds, **kwargs)
        video_output = self.get_video_features(pixel_values_videos, frame_mask, frame_embeds, **kwargs)

        text_vectors = text_output.pooler_output
        scale = self.clip.logit_scale.exp().to(text_vectors)
        logits_per_text = scale * similarity(text_vectors, video_output.pooler_output.to(text_vectors))
        loss = None
        if return_loss:
            loss = self.retrieval_loss(
                text_output, video_output, video_ids, gather_across_devices=gather_across_devices
            )
        scores_of_experts = None
        if output_expert_scores:
            of_videos = (values.to(text_vectors) for values in (video_output.video_embeds, video_output.gate_weights))
            scores_of_experts = expert_scores(text_output.text_embeds, *of_videos)
        return CAMoEOutput(
            loss=loss,
            logits_per_text=logits_per_text,
            logits_per_video=logits_per_text.T,
            text_embeds=text_output.text_embeds,
            video_embeds=video_output.video_embeds,
            gate_weights=video_output.gate_weights,
            expert_scores=scores_of_experts,
            text_model_output=text_output,
            video_model_output=video_output,
        )

    def retrieval_loss(
        self,
        text_output: CAMoETextOutput,
        video_output: CAMoEVideoOutput,
        video_ids: torch.Tensor | None = None,
        log_scale: torch.Tensor | None = None,
        gather_across_devices: bool = False,
    ) -> torch.Tensor:
        """The loss that the configuration asks for, of N pairs, computed in float32 or better -> scalar.

        `log_scale` replaces the model's own `logit_scale` (gradient caching needs its gradient separately).
        `gather_across_devices` as for `forward`.
        """
        texts, videos = text_output.text_embeds, video_output.video_embeds.to(text_output.text_embeds.device)
        dtype = torch.promote_types(texts.dtype, torch.float32)
        scale = (self.clip.logit_scale if log_scale is None else log_scale).to(texts.device, dtype).exp()
        temp = self.config.dual_softmax_temp
        options = {
            "dual_softmax_prior": self.config.dual_softmax_prior,
            "gather_across_devices": gather_across_devices,
        }
        # In bf16, logits near 100 are multiples of 0.5: no mixed precision here.
        with torch.autocast(texts.device.type, enabled=False):
            loss = contrastive_loss(
                text_output.pooler_output.to(dtype),
                video_output.pooler_output.to(texts.device, dtype),
                scale,
                video_ids,
                temp,
                **options,
            )
            # CODEPATH: above 0 only in recipes that also train each expert on its own; checkpoints look the same
            if self.config.expert_loss_weight > 0:
                embeds = texts.to(dtype), videos.to(dtype)
                expert_loss = expert_contrastive_loss(*embeds, scale, video_ids, temp, **options)
                loss = loss + self.config.expert_loss_weight * expert_loss
        return loss


def _wants_layers(config, kwargs) -> bool:
    """Whether a call asks for the outputs of single layers, which text groups cannot give."""
    return any(
        kwargs.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")
    )


__all__ = ["CAMoEModel", "CAMoEOutput", "CAMoEPreTrainedModel", "CAMoETextOutput", "CAMoEVideoOutput"]
