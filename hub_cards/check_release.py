# SPDX-License-Identifier: Apache-2.0
"""Load a release folder where this project is not installed: in a fresh process that cannot import it.

    python -I hub_cards/check_release.py FOLDER

Prints a JSON object: the `fingerprint` of the loaded model, which must equal that of the released one.
"""

import hashlib
import importlib.util
import json
import sys
import tempfile

import torch


PROJECT = ("modeling_camoe", "camoe_search")
CAPTIONS = ("a red star spins on the beach", "two kids are playing basketball in a gym")


class HideProject:
    """Import hook that hides this project, however it is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"No module named {fullname!r} (hidden by check_release.py)", name=fullname)
        return None


def noise_videos() -> list[torch.Tensor]:
    """Two videos of three frames, the same in every call, (T,H,W,3) uint8."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (2, 3, 96, 128, 3), generator=generator, dtype=torch.uint8))


def fingerprint(model, processor) -> dict[str, str]:
    """SHA-256 of the float32 vectors of fixed noise videos and fixed captions. Needs no decoder and no tagger."""
    captions = [{"caption": caption} for caption in CAPTIONS]
    torch.set_num_threads(1)  # rounding depends on the number of threads
    inputs = processor(text=captions, videos=noise_videos(), return_tensors="pt")
    with torch.inference_mode():
        vectors = {
            "videos": model.get_video_features(inputs["pixel_values_videos"], inputs["frame_mask"]).pooler_output,
            "texts": model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        }
    return {name: hashlib.sha256(v.float().numpy().tobytes()).hexdigest() for name, v in vectors.items()}


def load_release(folder: str) -> dict[str, str]:
    """Load every Auto class and the pipeline from the folder alone; returns the model's fingerprint."""
    from transformers import AutoConfig, AutoModel, AutoProcessor, AutoVideoProcessor, pipeline

    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    loaded = fingerprint(model, processor)

    with tempfile.TemporaryDirectory() as copy:  # what was loaded can be saved and loaded again
        model.save_pretrained(copy)
        processor.save_pretrained(copy)
        second = AutoModel.from_pretrained(copy, trust_remote_code=True).eval()
        if fingerprint(second, AutoProcessor.from_pretrained(copy, trust_remote_code=True)) != loaded:
            raise ValueError("after saving and loading again, the model gives other vectors")

    retrieval = pipeline("video-text-retrieval", model=folder, trust_remote_code=True, device="cpu")
    vectors = retrieval(noise_videos())  # (B,K)
    retrieval(noise_videos()[0], candidate_labels=[{"caption": caption} for caption in CAPTIONS])
    if importlib.util.find_spec("sentence_transformers") is not None:
        check_sentence_transformer(folder, vectors)
    return loaded


def check_sentence_transformer(folder: str, vectors: torch.Tensor):
    """SentenceTransformer gives the pipeline's vectors (B,K), within rounding."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    found = torch.as_tensor(model.encode_document(noise_videos()))
    if not torch.allclose(found, vectors, atol=1e-5):
        raise ValueError("SentenceTransformer gives other vectors than the pipeline")


if __name__ == "__main__":
    sys.meta_path.insert(0, HideProject())
    print(json.dumps(load_release(sys.argv[1])))
