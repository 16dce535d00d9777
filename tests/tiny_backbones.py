# SPDX-License-Identifier: Apache-2.0
"""Random dual encoders of every supported kind, as small folders like the Hub's: real tokenizers, both layouts.

    folder = tiny_backbone(tmp_path / "siglip", "siglip", layout="v4")

What a kind has of its own is kept: SigLIP's sentencepiece tokenizer and padding to the tower's length without a mask,
SigLIP 2's byte-fallback pairs and bilinear resize, XLM-R's and BERT's tokenizers, a plain resize to a square without
a crop, statistics that are not CLIP's. The same arguments give the same weights and the same files.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    XLMRobertaTokenizer,
)

from tests.tokenizer_files import CAPTIONS, tiny_tokenizer


KINDS = ("clip", "siglip", "siglip2", "metaclip_2", "chinese_clip", "altclip")
LAYOUTS = ("v4", "v5")
SIZE, DIM = 32, 16  # pixels of a side; D

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = TOWER | {"image_size": SIZE, "patch_size": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
WORDS = sorted({word.strip(",") for caption in CAPTIONS for word in caption.split()})
CROP = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
SQUARE = {"size": {"height": SIZE, "width": SIZE}}


def tiny_backbone(folder, kind: str, layout: str = "v5", seed: int = 0) -> Path:
    """Write weights, tokenizer and image processor of one kind, and return the folder.

    Args:
        folder: is made if it does not exist. kind: of KINDS ("siglip2" is SigLIP 2 at a fixed resolution: the
            library's `siglip` with another tokenizer). layout: "v4" has preprocessor_config.json, "v5"
            processor_config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_class, config, tokenizer, processor = PARTS[kind](folder)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # away from zeros and ones, so that every part matters
            if parameter.ndim < 2 and "logit" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(model, "logit_scale"):  # some classes leave it uninitialised
            model.logit_scale.fill_(2.5)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-9.0)
    model.save_pretrained(folder)
    if layout == "v4":
        tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
    return folder


def _clip(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 24
    config = CLIPConfig(text_config=_text(tokenizer), vision_config=VISION, projection_dim=DIM)
    return CLIPModel, config, tokenizer, CLIPProcessor(CLIPImageProcessor(**CROP), tokenizer)


def _siglip(folder):
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20 + list(LETTERS) * 20),
        model_writer=pieces,
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=-1,
        unk_id=2,
        bos_id=-1,
        eos_id=1,
        num_threads=1,
        minloglevel=2,
        user_defined_symbols=["<unused>"],  # takes 0, as in the Hub's files a plain piece does
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=24, model_input_names=["input_ids"])
    return _siglip_parts(tokenizer, SiglipImageProcessor(**SQUARE))


def _siglip2(folder):
    trained = Tokenizer(BPE())
    words = [f"{word}▁" for word in WORDS]  # the pre-tokenizer leaves the space at the end of a word
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=200, initial_alphabet=[*LETTERS, "▁"]))
    model = json.loads(trained.to_str())["model"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*special, *model["vocab"]]))}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Siglip2Tokenizer(vocab, merges, padding_side="right", model_input_names=["input_ids"])
    # No limit of its own, as in the Hub's files: the tower's length is in the model's config alone.
    return _siglip_parts(tokenizer, SiglipImageProcessor(**SQUARE, resample=2))


def _siglip_parts(tokenizer, image_processor):
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": DIM * 2}
    config = SiglipConfig(text_config=text, vision_config=VISION)
    return SiglipModel, config, tokenizer, SiglipProcessor(image_processor, tokenizer)


def _metaclip_2(folder):
    tokenizer = _xlm_roberta()
    tokenizer.model_max_length = 24
    config = MetaClip2Config(text_config=_text(tokenizer), vision_config=VISION, projection_dim=DIM)
    return MetaClip2Model, config, tokenizer, CLIPProcessor(CLIPImageProcessor(**CROP), tokenizer)


def _chinese_clip(folder):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {
        token: index for index, token in enumerate(dict.fromkeys([*pieces, *WORDS, *"一只狗在海滩上跑红色星旋转"]))
    }
    tokenizer = BertTokenizer(vocab, model_max_length=24)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0}
    config = ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=DIM)
    image_processor = ChineseCLIPImageProcessor(**SQUARE, do_center_crop=False)
    return ChineseCLIPModel, config, tokenizer, ChineseCLIPProcessor(image_processor, tokenizer)


def _altclip(folder):
    tokenizer = _xlm_roberta()
    tokenizer.model_max_length = 24
    text = _text(tokenizer) | {
        "max_position_embeddings": 26,
        "project_dim": 24,
    }  # two positions before the first token
    config = AltCLIPConfig(text_config=text, vision_config=VISION, projection_dim=DIM)
    image_processor = CLIPImageProcessor(**CROP, image_mean=[0.4, 0.45, 0.5], image_std=[0.2, 0.25, 0.3])
    return AltCLIPModel, config, tokenizer, AltCLIPProcessor(image_processor, tokenizer)


def _xlm_roberta() -> XLMRobertaTokenizer:
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces = [(f"▁{word}", -3.0) for word in WORDS] + [("▁", -4.0)] + [(letter, -6.0) for letter in LETTERS]
    known = {piece for piece, _ in special + [("▁a", 0)]}
    pieces = [("▁a", -3.0), *(piece for piece in pieces if piece[0] not in known)]
    return XLMRobertaTokenizer([*special, *pieces, ("<mask>", 0.0)])


def _text(tokenizer) -> dict:
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return TOWER | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}


PARTS = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "metaclip_2": _metaclip_2,
    "chinese_clip": _chinese_clip,
    "altclip": _altclip,
}
