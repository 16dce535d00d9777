# SPDX-License-Identifier: Apache-2.0
"""The page: type a sentence, and see which moments of the clips fit it and what each expert contributed.

    CAMOE_MODEL=org/camoe-motion python app.py

The clips are the examples of the release, and what a visitor uploads. The model is CAMOE_MODEL, or by default the
first of `models` in the README beside this file; CAMOE_REVISION pins a commit. The page loads nothing from other
hosts: no fonts, no analytics.
"""

import os
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

import gradio as gr
from clip_search import MAX_CHARACTERS, Retrieval
from draw import draw_gallery, draw_hint, draw_ranking
from huggingface_hub import SpaceCard
from untrusted import MAX_BYTES, RequestError


HERE = Path(__file__).parent
MAX_CLIPS = 24  # per visitor
MAX_HITS = 12  # moments shown in a ranking
HOUR = 3600  # seconds; how long uploads are kept
THEME = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
NO_CLIPS = "Upload some clips, or choose examples."
NO_QUERY = "Type a sentence: what happens in the moment that you are looking for?"


def load_model() -> Retrieval:
    """The model of this Space."""
    model = os.environ.get("CAMOE_MODEL") or SpaceCard.load(HERE / "README.md").data.models[0]
    return Retrieval(model, os.environ.get("CAMOE_REVISION"))


def build_page(retrieval: Retrieval) -> gr.Blocks:
    """The page for a model. At the beginning, all examples of its release are chosen."""
    examples = retrieval.examples

    def update(uploads, chosen, query, is_corrected, encoded):
        """Called when anything changes: encodes new clips, then ranks the moments of all."""
        named = [(path, None) for path in uploads or []] + [(examples[label], label) for label in chosen]
        known, problems = {moments[0].path: moments for moments in encoded}, []
        if len(named) > MAX_CLIPS:
            problems.append(f"only the first {MAX_CLIPS} of {len(named)} clips are used")
        clips = []
        for path, name in named[:MAX_CLIPS]:
            try:
                clips.append(known.get(path) or retrieval.moments(path, name))
            except RequestError as error:
                problems.append(str(error))
        return clips, draw_gallery(clips, problems), _ranking(retrieval, clips, query, is_corrected)

    def choose(chosen, selected: gr.SelectData):
        """A click on an example takes it in, or out again."""
        label = list(examples)[selected.index]
        chosen = [other for other in chosen if other != label] + ([] if label in chosen else [label])
        return chosen, tiles(chosen)

    def tiles(chosen):
        return [(thumbnails[label], f"{'✓ ' if label in chosen else ''}{label}") for label in examples]

    thumbnails = {label: retrieval.thumbnail(path) for label, path in examples.items()}
    with gr.Blocks(title="Find clips by a sentence", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        encoded = gr.State([], time_to_live=HOUR)
        chosen = gr.State(list(examples), time_to_live=HOUR)
        gr.Markdown(
            "# Find clips by a sentence\nEach expert of the model reads its own part of the sentence: see which one "
            f"decides. The model is `{retrieval.repo}`.",
            elem_id="head",
        )
        query = gr.Textbox(
            label="What are you looking for?",
            placeholder="a sentence, for example “a red star spins on the beach”",
            max_lines=1,
            max_length=MAX_CHARACTERS,
            submit_btn="Search",
            elem_id="query",
        )
        is_corrected = gr.Checkbox(
            label="Lower the score of moments that match every sentence (query bank)",
            visible=bool(retrieval.captions),
            elem_id="corrected",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                ranking = gr.HTML(draw_hint(NO_QUERY if examples else NO_CLIPS), elem_id="ranking")
            with gr.Column(scale=2, min_width=320):
                uploads = gr.File(label="Your clips", file_count="multiple", file_types=["video"], height=150)
                gallery = gr.HTML(draw_gallery([], []), elem_id="gallery")
                gr.Markdown("Examples: a click takes one out, or in again.", visible=bool(examples))
                shown = gr.Gallery(
                    tiles(examples),
                    label="Examples",
                    show_label=False,
                    visible=bool(examples),
                    columns=3,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
        shown.select(choose, chosen, [chosen, shown], show_progress="hidden", api_visibility="private")
        gr.on(
            [uploads.change, chosen.change, query.submit, is_corrected.change],
            update,
            [uploads, chosen, query, is_corrected, encoded],
            [encoded, gallery, ranking],
            show_progress="minimal",
            show_progress_on=ranking,
            api_visibility="private",
        )
    return page


def _ranking(retrieval: Retrieval, clips: list, query: str | None, is_corrected: bool) -> str:
    if not clips:
        return draw_hint(NO_CLIPS)
    if not query or not query.strip():
        return draw_hint(NO_QUERY)
    texts, embeds = retrieval.encode_query(query)
    hits = retrieval.rank(embeds, [moment for moments in clips for moment in moments], is_corrected)
    return draw_ranking(texts, hits[:MAX_HITS])


def main():
    retrieval = load_model()
    page = build_page(retrieval)
    page.queue(max_size=32)
    page.launch(
        theme=THEME,
        css_paths=HERE / "look.css",
        max_file_size=MAX_BYTES,
        allowed_paths=[str(Path(path).parent) for path in retrieval.examples.values()][:1],  # all in one folder
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
