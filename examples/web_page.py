"""The page of web_chat.py, made with Gradio: a conversation, and beside it the experts."""

import argparse
import os
from collections.abc import Iterator
from html import escape
from typing import Any

from conversation import named_base
from shared_options import load_model, sampling_arguments
from web_talk import Answerer, Talk, one_line

from deepseek_moe import Generator
from deepseek_moe.bundled import BUNDLED_CHAT_MODEL
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.errors import UserError, as_user_error

HOST = "127.0.0.1"  # nobody else reaches the page
BESIDE = (
    "The experts are measured after an answer is complete, by one plain forward pass over the "
    "conversation, so that answering stays fast."
)
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
.experts iframe { width: 100%; height: calc(100vh - 8rem); min-height: 560px; display: block;
                  border: 1px solid var(--border-color-primary); border-radius: 8px; }
.icon-button-wrapper { display: none !important; }  /* its Clear would clear only what is seen */
.beside, .said { font-size: .85rem; overflow-wrap: anywhere; }
.said { min-height: 1.3rem; }
"""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def serve(args: argparse.Namespace) -> None:
    """Shows the page until it is stopped.

    Raises:
        UserError: Gradio is missing, an option is wrong, or the port is taken.
    """
    gradio()
    options = sampling_arguments(args)
    Sampling(**options)  # raises, before the model is loaded, what is wrong in them
    name = args.model or str(BUNDLED_CHAT_MODEL)
    model, tokenizer = load_model(args, name)
    shown = name if args.model else f"models/{BUNDLED_CHAT_MODEL.name}"
    answerer = Answerer(Generator(model), tokenizer, shown, options)
    page = make_page(answerer, args.max_new_tokens)
    with as_user_error(f"the page cannot be served at {HOST}", "give another --port"):
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=args.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=gradio().themes.Default(**FONTS),
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
    print(address, flush=True)
    page.block_thread()


def gradio() -> Any:
    """Gradio, which is told to report nothing to its makers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio; pip install gradio") from error
    return gradio


def make_page(answerer: Answerer, max_new_tokens: int) -> Any:
    """The page, a `gradio.Blocks`. Texts of the model and of users are never HTML in it."""
    gr = gradio()
    options, context = answerer.options, answerer.generator.context
    with gr.Blocks(title="DeepSeek-MoE", analytics_enabled=False, fill_width=True) as page:
        talk = gr.State(Talk())  # of each tab its own
        with gr.Row():
            with gr.Column(scale=1, min_width=360):
                gr.HTML(f"<b>{escape(answerer.name)}</b>")
                messages = gr.Chatbot(
                    show_label=False, height="58vh", render_markdown=False, buttons=[]
                )
                hint = "by its name this is a base model, which was not taught to chat"
                said = gr.HTML(hint if named_base(answerer.name) else "", elem_classes="said")
                question = gr.Textbox(
                    placeholder="Ask something", show_label=False, autofocus=True, max_lines=6
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary", min_width=60)
                    stop = gr.Button("Stop", min_width=60, interactive=False)
                    retry = gr.Button("Retry", min_width=60)
                    clear = gr.Button("Clear", min_width=60)
                with gr.Accordion("Settings", open=False):
                    says = "0 always takes the likeliest token; then the two below have no effect"
                    settings = [
                        gr.Slider(0, 2, options["temperature"], label="Temperature", info=says),
                        gr.Slider(0.01, 1, options["top_p"], step=0.01, label="Top-p"),
                        gr.Slider(0, 200, options["top_k"], step=1, label="Top-k (0 keeps all)"),
                        gr.Slider(
                            1, context, min(max_new_tokens, context), step=1, label="Max new tokens"
                        ),
                    ]
            with gr.Column(scale=1, min_width=360):
                gr.HTML(BESIDE, elem_classes="beside")
                experts = gr.HTML(elem_classes="experts")

        buttons = [question, send, stop, retry, clear]

        outputs = [messages, said, *buttons]

        def begin(talk: Talk) -> list[Any]:
            empty = gr.update(value="", interactive=False)
            return [talk.shown, "", empty, *states(answering=True)]

        def states(answering: bool) -> list[Any]:
            """Of the buttons: while an answer is made, only Stop can be pressed."""
            return [gr.update(interactive=(one is stop) == answering) for one in buttons[1:]]

        def end() -> list[Any]:
            return [gr.update(interactive=True), *states(answering=False)]

        def ask(talk: Talk, text: str) -> list[Any]:
            talk.ask(text)
            return begin(talk)

        def ask_again(talk: Talk) -> list[Any]:
            talk.retry()
            return begin(talk)

        def answer(talk: Talk, *values: float) -> Iterator[tuple[Any, ...]]:
            for shown, note, refused in answerer.answer(talk, *values):
                yield shown, escape(note), refused

        def forget(talk: Talk) -> tuple[Any, ...]:
            talk.clear()
            return [], "", ""

        model_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        at_once = {"queue": False, "show_progress": "hidden"}
        for begun in (
            gr.on([question.submit, send.click], ask, [talk, question], outputs, **at_once),
            retry.click(ask_again, talk, outputs, **at_once),
        ):
            answered = begun.then(
                answer,
                [talk, *settings],
                [messages, said, question],
                show_progress="hidden",
                **model_at_a_time,
            )
            measured = answered.then(
                lambda talk: frame(answerer, talk), talk, experts, **model_at_a_time
            )
            measured.then(end, None, buttons, **at_once)
        stop.click(Talk.stop, talk, None, **at_once)
        clear.click(forget, talk, [messages, said, experts], **at_once)
    return page


def frame(answerer: Answerer, talk: Talk) -> str:
    """The page of the experts in a frame that reaches nothing around it; or why there is none."""
    try:
        page = answerer.experts_page(talk) if talk.ids else ""
    except Exception as error:  # The conversation goes on.
        return escape(one_line(error))
    return f'<iframe sandbox="allow-scripts" title="The experts" srcdoc="{escape(page)}"></iframe>'
