# SPDX-License-Identifier: Apache-2.0
"""A released model for mteb, the benchmark of embeddings, which has video-text retrieval tasks.

    import mteb
    from mteb_model import CAMoEForMteb

    model = CAMoEForMteb("org/camoe-motion", trust_remote_code=True)
    mteb.evaluate(model, mteb.get_tasks(["MSRVTTT2V"]))

mteb's own loader of SentenceTransformers would choose the frames itself, or hand over all of a video. Here the model
gets the video, and takes the frames that it was trained with.
"""

import numpy as np
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper


class CAMoEForMteb(SentenceTransformerEncoderWrapper):
    """Arguments as for the base class: a repository, folder or SentenceTransformer, and `trust_remote_code=True`."""

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"modalities": ["text", "image", "video"]})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """Texts, images or videos of a data loader -> their vectors (N,K)."""
        features = inputs.dataset.features
        modality = next((name for name in ("video", "image") if name in features), None)
        if modality is None:
            # Named as texts: one that is an address or a path must not be fetched or opened.
            inputs.collate_fn = lambda rows: {"text": [{"text": row["text"]} for row in rows]}
            about = {"task_metadata": task_metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            return super().encode(inputs, **about, prompt_type=prompt_type, **kwargs)
        inputs.collate_fn = lambda rows: [{modality: row[modality]} for row in rows]  # decoders stay decoders
        kwargs["show_progress_bar"] = False  # of each batch
        return np.concatenate([self.model.encode_document(batch, **kwargs) for batch in inputs])


__all__ = ["CAMoEForMteb"]
