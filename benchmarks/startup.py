# SPDX-License-Identifier: Apache-2.0
"""How long programs take to start: new processes in turns, the files they read in the system's cache.

    python benchmarks/startup.py

- `import modeling_camoe` against what a user of the library imports for the same purpose, and against torch alone;
- AutoModel.from_pretrained of a ViT-B/32 CAMoE against CLIPModel.from_pretrained of its CLIP;
- `camoe search` in an index of a hundred moments, from the shell to the printed result, with a tagger and a text
  tower of ViT-B/32, against a limit of 1.5 s and against the import of what a program with torch would need.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from harness import Line, compare, finish, in_turns, parser


ROOT = Path(__file__).parents[1]

LIBRARY = "from transformers import AutoModel, CLIPModel, CLIPProcessor"
NOT_FOR_IMPORT = "av spacy datasets faiss gradio pandas matplotlib torchcodec pymilvus onnx".split()


def run(*arguments: str):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{arguments[:3]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def save_models(folder: Path, num_layers: int) -> tuple[Path, Path]:
    """A CAMoE of ViT-B/32 shapes with its processor, and its CLIP."""
    sys.path.insert(0, str(ROOT / "training"))
    from transformers import CLIPConfig, logging

    from modeling_camoe import CAMoEConfig, CAMoEModel, CAMoEProcessor, CAMoEVideoProcessor
    from motion.clip_tokenizer import train_clip_tokenizer

    logging.disable_progress_bar()
    tokenizer = train_clip_tokenizer(["a red star spins on the beach"] * 4, vocab_size=600)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    layers = {"num_hidden_layers": num_layers}
    clip_config = CLIPConfig(text_config={**ends, **layers}, vision_config=layers)
    model = CAMoEModel(CAMoEConfig(clip_config=clip_config))
    model.save_pretrained(folder / "camoe")
    model.clip.save_pretrained(folder / "clip")
    CAMoEProcessor(CAMoEVideoProcessor(), tokenizer, model.config).save_pretrained(folder / "camoe")
    return folder / "camoe", folder / "clip"


def write_index(folder: Path, model: Path, width: int):
    from synthetic_index import write_index as write

    from camoe_search.encoder import CAMoEEncoder
    from camoe_search.text_encoder import export_text_encoder

    encoder = CAMoEEncoder.from_pretrained(str(model), device="cpu")
    write(folder, 100, width, model=str(model), weights=encoder.weights)
    if reason := export_text_encoder(encoder, folder):
        raise SystemExit(f"the text tower cannot be exported: {reason}")


def main():
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=12, help="of both towers (default: %(default)s, as ViT-B/32)")
    options = options.parse_args()
    loaded = run("-c", f"import sys, modeling_camoe; print(*(set({NOT_FOR_IMPORT}) & set(sys.modules)))").split()

    with tempfile.TemporaryDirectory() as temporary:
        camoe, clip = save_models(Path(temporary), options.layers)
        index = Path(temporary) / "index"
        index.mkdir()
        write_index(index, camoe, 2048)
        load = "{0}.from_pretrained({1!r})"
        seconds = in_turns(
            {
                "import": lambda: run("-c", "import modeling_camoe"),
                "import of the library": lambda: run("-c", LIBRARY),
                "torch": lambda: run("-c", "import torch"),
                "load": lambda: run("-c", f"import modeling_camoe; {LIBRARY}; {load.format('AutoModel', str(camoe))}"),
                "load of CLIP": lambda: run("-c", f"{LIBRARY}; {load.format('CLIPModel', str(clip))}"),
                "search": lambda: run("-m", "camoe_search", "search", "a red star", "--index", str(index)),
                "imports for a search": lambda: run("-c", f"{LIBRARY}; import spacy"),
            },
            options.repeats,
        )
    heavy = f"imported beforehand: {', '.join(loaded)}" if loaded else "nothing of " + ", ".join(NOT_FOR_IMPORT)
    torch_alone = {"limit": seconds["torch"], "limit_name": "torch alone"}
    lines = [
        compare(
            "import modeling_camoe", seconds["import"], seconds["import of the library"], "CLIPModel, CLIPProcessor",
            speedup=False, goal=1.1, note=heavy, **torch_alone,
        ),
        compare(
            "AutoModel.from_pretrained, import included", seconds["load"], seconds["load of CLIP"], "CLIPModel",
            speedup=False, goal=1.1, **torch_alone,
        ),
        compare(
            "camoe search, cold", seconds["search"], seconds["imports for a search"], "imports with torch",
            note="text tower and tagger are loaded, too",
        ),
        Line(
            "camoe search, cold: seconds", "s", median(seconds["search"]), ratio=median(seconds["search"]),
            ratio_name="seconds", spread=(min(seconds["search"]), max(seconds["search"])), goal=1.5, at_least=False,
        ),
    ]  # fmt: skip
    finish("startup", lines, options, {"imported by modeling_camoe": loaded})


if __name__ == "__main__":
    main()
