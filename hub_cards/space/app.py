# SPDX-License-Identifier: Apache-2.0
"""The page: upload or pick clips, type a sentence, and see the ranking and what each expert contributed.

    CAMOE_MODEL=org/camoe-motion python app.py

The model is CAMOE_MODEL, or by default the first of `models` in the README beside this file; CAMOE_REVISION pins a
commit. The page loads nothing from other hosts: no fonts, no analytics.
"""

import os
from html import escape
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
from clip_search import MAX_CHARACTERS, Retrieval
from draw import draw_gallery, draw_hint, draw_ranking
from huggingface_hub import SpaceCard
from untrusted import MAX_BYTES, RequestError


HERE = Path(__file__).parent
MAX_CLIPS = 24  # per visitor
MAX_HITS = 12  # clips shown in a ranking
HOUR = 3600  # seconds; how long uploads are kept
THEME = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def load_model() -> Retrieval:
    """The model of this Space."""
    model = os.environ.get("CAMOE_MODEL") or SpaceCard.load(HERE / "README.md").data.models[0]
    return Retrieval(model, os.environ.get("CAMOE_REVISION"))


def build_page(retrieval: Retrieval, examples: dict[str, str]) -> gr.Blocks:
    """The page for a model; `examples` {label: path} are clips for visitors who have none."""

    def update(uploads, picked, query, is_corrected, encoded):
        """Called when anything changes: encodes new clips, then ranks all of them."""
        named = [(path, None) for path in uploads or []] + [(examples[label], label) for label in picked or []]
        known, problems = {clip.path: clip for clip in encoded}, []
        if len(named) > MAX_CLIPS:
            problems.append(f"only the first {MAX_CLIPS} of {len(named)} clips are used")
        clips = []
        for path, name in named[:MAX_CLIPS]:
            try:
                clips.append(known.get(path) or retrieval.encode_clip(path, name))
            except RequestError as error:
                problems.append(str(error))
        return clips, draw_gallery(clips, problems), _ranking(retrieval, clips, query, is_corrected)

    with gr.Blocks(title="Find clips by a sentence", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        encoded = gr.State([], time_to_live=HOUR)
        gr.HTML(
            '<header class="head"><h1>Find clips by a sentence</h1><p>Each expert of the model reads its own part of '
            f"the sentence: see which one decides. The model is <code>{escape(retrieval.repo)}</code>.</p></header>"
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                uploads = gr.File(label="Your clips", file_count="multiple", file_types=["video"], height=150)
                picked = gr.CheckboxGroup(
                    list(examples), label="Or some of these", visible=bool(examples), elem_id="examples"
                )
                gallery = gr.HTML(draw_gallery([], []), elem_id="gallery")
            with gr.Column(scale=3, min_width=420):
                query = gr.Textbox(
                    label="What are you looking for?",
                    placeholder="a sentence, for example “a red star spins on the beach”",
                    max_lines=1,
                    max_length=MAX_CHARACTERS,
                    submit_btn="Search",
                    elem_id="query",
                )
                is_corrected = gr.Checkbox(
                    label="Lower the score of clips that match every sentence (query bank)",
                    visible=retrieval.bank is not None,
                    elem_id="corrected",
                )
                ranking = gr.HTML(draw_hint("Upload or pick some clips, then type a sentence."), elem_id="ranking")
        gr.on(
            [uploads.change, picked.change, query.submit, is_corrected.change],
            update,
            [uploads, picked, query, is_corrected, encoded],
            [encoded, gallery, ranking],
            show_progress="minimal",
            api_visibility="private",
        )
    return page


def _ranking(retrieval: Retrieval, clips: list, query: str | None, is_corrected: bool) -> str:
    if not clips:
        return draw_hint("Upload or pick some clips, then type a sentence.")
    if not query or not query.strip():
        return draw_hint("Type a sentence: what happens in the clip that you are looking for?")
    texts, embeds = retrieval.encode_query(query)
    return draw_ranking(texts, retrieval.rank(embeds, clips, is_corrected)[:MAX_HITS], is_corrected)


def main():
    retrieval = load_model()
    examples = retrieval.example_clips()
    page = build_page(retrieval, examples)
    page.queue(max_size=32)
    page.launch(
        theme=THEME,
        css_paths=HERE / "look.css",
        max_file_size=MAX_BYTES,
        allowed_paths=[str(Path(path).parent) for path in examples.values()][:1],  # all in one folder
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
