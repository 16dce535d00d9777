# SPDX-License-Identifier: Apache-2.0
"""A page: upload or pick clips, type a sentence, and see the ranking and each expert's part in it.

    CAMOE_MODEL=org/camoe-motion python app.py

The model is CAMOE_MODEL, or else the first of `models` in the README beside this file; CAMOE_REVISION pins a commit.
Nothing is fetched from elsewhere: no fonts, no analytics.
"""

import os
from html import escape
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
from clip_search import MAX_CHARACTERS, Retrieval
from draw import draw_hint, draw_ranking, draw_wall
from huggingface_hub import SpaceCard
from untrusted import MAX_BYTES, RequestError


HERE = Path(__file__).parent
MAX_CLIPS = 24  # of a visitor
SHOWN = 12  # clips of a ranking
HOUR = 3600  # seconds that uploads are kept
THEME = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def load() -> Retrieval:
    """The model that this Space shows."""
    model = os.environ.get("CAMOE_MODEL") or SpaceCard.load(HERE / "README.md").data.models[0]
    return Retrieval(model, os.environ.get("CAMOE_REVISION"))


def build(retrieval: Retrieval, examples: dict[str, str]) -> gr.Blocks:
    """The page of a model; `examples` {what a clip shows: path} are offered to visitors without clips."""

    def look(uploads, picked, query, is_corrected, seen):
        """Whatever changed: clips that are new are encoded, then all are ranked."""
        named = [(path, None) for path in uploads or []] + [(examples[label], label) for label in picked or []]
        known, problems = {clip.path: clip for clip in seen}, []
        if len(named) > MAX_CLIPS:
            problems.append(f"only the first {MAX_CLIPS} of {len(named)} clips are used")
        clips = []
        for path, name in named[:MAX_CLIPS]:
            try:
                clips.append(known.get(path) or retrieval.see(path, name))
            except RequestError as error:
                problems.append(str(error))
        return clips, draw_wall(clips, problems), _ranking(retrieval, clips, query, is_corrected)

    with gr.Blocks(title="Find clips by a sentence", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        seen = gr.State([], time_to_live=HOUR)
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
                wall = gr.HTML(draw_wall([], []), elem_id="wall")
            with gr.Column(scale=3, min_width=420):
                query = gr.Textbox(
                    label="What do you look for?",
                    placeholder="a sentence, as “a red star spins on the beach”",
                    max_lines=1,
                    max_length=MAX_CHARACTERS,
                    submit_btn="Search",
                    elem_id="query",
                )
                is_corrected = gr.Checkbox(
                    label="Take down clips that come near to every sentence (query bank)",
                    visible=retrieval.bank is not None,
                    elem_id="corrected",
                )
                ranking = gr.HTML(draw_hint("Upload or pick some clips, then type a sentence."), elem_id="ranking")
        gr.on(
            [uploads.change, picked.change, query.submit, is_corrected.change],
            look,
            [uploads, picked, query, is_corrected, seen],
            [seen, wall, ranking],
            show_progress="minimal",
            api_visibility="private",
        )
    return page


def _ranking(retrieval: Retrieval, clips: list, query: str | None, is_corrected: bool) -> str:
    if not clips:
        return draw_hint("Upload or pick some clips, then type a sentence.")
    if not query or not query.strip():
        return draw_hint("Type a sentence: what happens in the clip that you look for?")
    texts, embeds = retrieval.read(query)
    return draw_ranking(texts, retrieval.rank(embeds, clips, is_corrected)[:SHOWN], is_corrected)


def main():
    retrieval = load()
    examples = retrieval.example_clips()
    page = build(retrieval, examples)
    page.queue(max_size=32)
    page.launch(
        theme=THEME,
        css_paths=HERE / "look.css",
        max_file_size=MAX_BYTES,
        allowed_paths=[str(Path(path).parent) for path in examples.values()][:1],  # they lie together
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
