"""The page itself, by Gradio: one place to drop a picture or a token file, pictures beside each other, sizes, a file to take away."""

from typing import Any

import gradio as gr

from gq_lightning.cli.web.trial import AMPLIFIED
from gq_lightning.cli.web.work import Work, sentence, shown
from gq_lightning.errors import UserError

MOST_BYTES = 20 * 10**6
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
#intro p, #heat-says p { margin: 0; }
#notice { border-left: 4px solid #b2182b; padding: .6rem .9rem; background: #fdf0ed; color: #67001f; border-radius: 4px; }
#notice p { color: inherit; margin: 0; }
#pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
#pictures img, #completed img { width: 100%; max-height: 75vh; object-fit: contain; }
#pictures .image-container, #completed .image-container { padding-top: 2.2rem; }
#completed { max-width: 480px; }
#sizes table { width: 100%; font-variant-numeric: tabular-nums; border-color: #cbd5e1; }
#sizes :is(th, td) { padding: .4rem .5rem; border-color: #cbd5e1; text-align: right; overflow-wrap: normal; word-break: normal; }
#sizes :is(th, td):first-child { text-align: left; }
#sizes td:not(:first-child) { white-space: nowrap; }
@media (max-width: 500px) { #sizes table { font-size: .8rem; } }
"""
SHOWN = {
    "original": "Original",
    "decoded": "Decoded from its tokens",
    "jpeg": "JPEG of as many bytes",
    "difference": f"Difference, times {AMPLIFIED}",
    "heat": "Bits per token",
}


def page(work: Work) -> gr.Blocks:
    """The page; `launch` it."""
    with gr.Blocks(title="gq_lightning: pictures as tokens", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# Pictures as tokens\nDrop a picture to see what its tokens keep, or a token file to decode it.", elem_id="intro")
        with gr.Row():
            upload = gr.File(label="A picture, or a token file", type="filepath", height=150, min_width=300, elem_id="upload")
            with gr.Column(min_width=300):
                name = gr.Dropdown(
                    [(shown(name), name) for name in work.names], value=work.names[0], label="Tokenizer", elem_id="tokenizer"
                )
                bits = gr.Slider(1, 16, step=1, label="Bits of each token", visible=False, elem_id="bits")
        notice = gr.Markdown(visible=False, elem_id="notice")
        with gr.Row(elem_id="pictures"):
            pictures = {
                key: gr.Image(
                    label=label, format="png", interactive=False, min_width=300, buttons=["fullscreen"], visible=False, elem_id=key,
                    alt_text=label,
                )
                for key, label in SHOWN.items()
            }  # fmt: skip
        heat_says = gr.Markdown(elem_id="heat-says")
        sizes = gr.Markdown(elem_id="sizes")
        download = gr.DownloadButton("Download the token file", visible=False, elem_id="download")
        outputs = [notice, *pictures.values(), heat_says, sizes, download]

        def show(upload: str | None, name: str, bits: int) -> list[Any]:
            hidden = gr.update(visible=False, value=None)
            if upload is None:
                return [hidden] * (1 + len(pictures)) + ["", "", hidden]
            try:
                trial = work.show(upload, name, int(bits))
            except Exception as error:
                said = gr.update(visible=True, value=sentence(error, upload))
                return [said] + [hidden] * len(pictures) + ["", "", hidden]
            found = [getattr(trial, key) for key in pictures]
            drawn = [gr.update(visible=picture is not None, value=picture) for picture in found]
            return [
                hidden,
                *drawn,
                trial.heat_says,
                trial.sizes,
                gr.update(visible=trial.original is not None, value=str(trial.token_file)),
            ]

        def rates(name: str) -> Any:
            most = work.rates(name)
            return gr.update(visible=most > 0, maximum=max(most, 2), value=max(most, 2))

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress_on": [pictures["decoded"]]}
        upload.change(show, [upload, name, bits], outputs, **quiet)
        bits.release(show, [upload, name, bits], outputs, **quiet)
        name.input(rates, name, bits, **quiet).then(show, [upload, name, bits], outputs, **quiet)
        blocks.load(rates, name, bits, **quiet)
        if work.prior is not None:
            _completion(work, upload, notice)
    return blocks


def _completion(work: Work, upload: gr.File, notice: gr.Markdown) -> None:
    """Below: what the prior makes of the upper half, another one at each click."""
    assert work.prior is not None
    classes = work.prior[0].classes
    gr.Markdown("## The lower half, as the prior draws it")
    with gr.Row():
        label = gr.Dropdown(list(classes), value=classes[0] if classes else None, label="Class", visible=bool(classes))
        button = gr.Button("Complete from the upper half", elem_id="complete")
    seed = gr.State(0)
    picture: dict[str, Any] = {"format": "png", "interactive": False, "visible": False, "buttons": ["fullscreen", "download"]}
    completed = gr.Image(label="Completed", elem_id="completed", alt_text="Completed", **picture)

    def complete(upload: str | None, seed: int, label: str | None) -> list[Any]:
        try:
            if upload is None:
                raise UserError("there is no picture yet: drop one above")
            return [gr.update(visible=False), gr.update(visible=True, value=work.complete(upload, seed, label)), seed + 1]
        except Exception as error:
            return [gr.update(visible=True, value=sentence(error, upload or "completion")), gr.update(visible=False), seed]

    button.click(complete, [upload, seed, label], [notice, completed, seed], api_visibility="private", show_progress_on=[completed])


def serve(blocks: gr.Blocks, address: str, port: int, block: bool = True) -> str:
    """Serves the page until interrupted, or in the background; returns its address. Nothing is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    _, url, _ = blocks.queue(default_concurrency_limit=1).launch(
        server_name=address,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=not block,
        max_file_size=MOST_BYTES,
        theme=theme,
        css=CSS,
        footer_links=[],
        ssr_mode=False,
        allowed_paths=[],
    )
    return url
