# SPDX-License-Identifier: Apache-2.0
"""CAMoE video-text retrieval: importing this package registers its classes with the Auto classes of transformers.

`AutoModel.from_pretrained(path)` then works on CAMoE checkpoints. Checkpoints also carry this code, so that
`AutoModel.from_pretrained(path, trust_remote_code=True)` works where the package is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_camoe import CAMoEConfig
from .modeling_camoe import CAMoEModel, CAMoEOutput, CAMoETextOutput, CAMoEVideoOutput
from .pipeline_camoe import CAMoEPipeline
from .processing_camoe import CAMoEProcessor
from .video_processing_camoe import CAMoEVideoProcessor


AutoConfig.register("camoe", CAMoEConfig, exist_ok=True)
AutoModel.register(CAMoEConfig, CAMoEModel, exist_ok=True)
AutoVideoProcessor.register(CAMoEConfig, CAMoEVideoProcessor, exist_ok=True)
AutoProcessor.register(CAMoEConfig, CAMoEProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("video-text-retrieval", pipeline_class=CAMoEPipeline, pt_model=AutoModel)

# What save_pretrained copies beside the weights.
CAMoEConfig.register_for_auto_class("AutoConfig")
CAMoEModel.register_for_auto_class("AutoModel")
CAMoEVideoProcessor.register_for_auto_class("AutoVideoProcessor")
CAMoEProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "CAMoEConfig",
    "CAMoEModel",
    "CAMoEOutput",
    "CAMoEPipeline",
    "CAMoEProcessor",
    "CAMoETextOutput",
    "CAMoEVideoOutput",
    "CAMoEVideoProcessor",
]
