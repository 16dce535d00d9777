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
