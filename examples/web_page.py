"""The page of web_chat.py, made with Gradio: a conversation, and beside it the experts."""

import argparse
import os
from collections.abc import Iterator, Sequence
from html import escape
from threading import Event
from typing import Any

from conversation import named_base
from shared_options import load_model, sampling_arguments
from web_talk import Answerer, Talk, one_line

from deepseek_moe import Generator
from deepseek_moe.bundled import BUNDLED_CHAT_MODEL
from deepseek_moe.chat import Message
from deepseek_moe.decode.sampling import Sampling
from deepseek_moe.errors import UserError, as_user_error

HOST = "127.0.0.1"  # nobody else reaches the page
BESIDE = (
    "The experts are measured after an answer is complete, by one plain forward pass over the "
    "conversation, so that answering stays fast."
)
HINT = "by its name this is a base model: it continues texts, and was not taught to chat"
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
.experts iframe { width: 100%; height: calc(100vh - 8rem); min-height: 560px; display: block;
                  border: 1px solid var(--border-color-primary); border-radius: 8px; }
.block.messages { height: 58vh; overflow-y: auto !important; padding: 1rem;
                  border: 1px solid var(--border-color-primary); border-radius: 8px; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; max-width: 92%;
           margin-bottom: .8rem; padding: .5rem .8rem; border-radius: 10px;
           background: var(--background-fill-secondary); }
.message.user { margin-left: auto; background: var(--color-accent-soft); }
.message:empty::after { content: "…"; }
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
    shown += f" with {args.adapter}" if args.adapter else ""
    hint = HINT if named_base(name) and not args.adapter else ""
    page = Page(Answerer(Generator(model), tokenizer, shown, options), args.max_new_tokens, hint)
    with as_user_error(f"the page cannot be served at {HOST}", "give another --port"):
        address = page.serve(args.port)
    print(address, flush=True)
    try:
        Event().wait()
    finally:  # Ctrl-C
        page.answerer.closed = True  # The process waits for an answer that is being made.
        page.blocks.close(verbose=False)


def gradio() -> Any:
    """Gradio, which is told to report nothing to its makers."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio; pip install gradio") from error
    return gradio


class Page:
    """What is on the page, and what happens there. `blocks` is what Gradio serves.

    Texts of the model and of users are never HTML in it. Gradio's own Chatbot is not taken: it puts
    them into the page as HTML, without scripts, also where it renders no Markdown.
    """

    def __init__(self, answerer: Answerer, max_new_tokens: int, hint: str = "") -> None:
        self.answerer, self.hint, self.gr = answerer, hint, gradio()
        title = "Talk to DeepSeek-MoE"
        with self.gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as self.blocks:
            self.talk = self.gr.State(Talk())  # of each tab its own
            with self.gr.Row():
                with self.gr.Column(min_width=360):
                    self._lay_out_chat()
                    with self.gr.Accordion("Settings", open=False):
                        self._lay_out_settings(min(max_new_tokens, answerer.generator.context))
                with self.gr.Column(min_width=360):
                    self.gr.HTML(BESIDE, elem_classes="beside")
                    self.experts = self.gr.HTML(elem_classes="experts")
            self._connect()

    def _lay_out_chat(self) -> None:
        gr = self.gr
        gr.HTML(f"<b>{escape(self.answerer.name)}</b>")
        self.messages = gr.HTML(conversation([]), elem_classes="messages", autoscroll=True)
        self.said = gr.HTML(self.hint, elem_classes="said")
        self.question = gr.Textbox(
            label="Question",
            placeholder="Ask something",
            show_label=False,
            autofocus=True,
            max_lines=6,
        )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", min_width=60)
            self.stop = gr.Button("Stop", min_width=60, interactive=False)
            self.retry = gr.Button("Retry", min_width=60)
            self.clear = gr.Button("Clear", min_width=60)

    def _lay_out_settings(self, max_new_tokens: int) -> None:
        gr, options, context = self.gr, self.answerer.options, self.answerer.generator.context
        says = "0 always takes the likeliest token; then the next two have no effect"
        heat = options["temperature"]
        self.settings = [
            gr.Slider(0, max(2, heat), heat, step=0.05, label="Temperature", info=says),
            gr.Slider(0.01, 1, options["top_p"], step=0.01, label="Top-p"),
            gr.Number(options["top_k"], label="Top-k (0 keeps all)", precision=0, minimum=0),
            gr.Slider(1, context, max_new_tokens, step=1, label="Max new tokens"),
        ]

    def _connect(self) -> None:
        """Shows the question at once, and lets it wait until the model is free."""
        at_once = {"queue": False, "show_progress": "hidden"}
        queued = {"concurrency_limit": 1, "concurrency_id": "model"}
        asked = [self.messages, self.said, self.question, *self._buttons]
        triggers = [self.question.submit, self.send.click]
        for begun in (
            self.gr.on(triggers, self._ask, [self.talk, self.question], asked, **at_once),
            self.retry.click(self._retry, self.talk, asked, **at_once),
        ):
            shown = [self.messages, self.said, self.question]
            answered = begun.then(
                self._answer, [self.talk, *self.settings], shown, show_progress="hidden", **queued
            )
            measured = answered.then(self._measure, self.talk, self.experts, **queued)
            measured.then(self._end, None, [self.question, *self._buttons], **at_once)
        self.stop.click(Talk.stop, self.talk, None, **at_once)
        cleared = [self.messages, self.said, self.experts]
        self.clear.click(self._clear, self.talk, cleared, **at_once)

    @property
    def _buttons(self) -> list[Any]:
        return [self.send, self.stop, self.retry, self.clear]

    def _states(self, answering: bool) -> list[Any]:
        """Of the buttons: while an answer is made, only Stop can be pressed."""
        update = self.gr.update
        return [update(interactive=(one is self.stop) == answering) for one in self._buttons]

    def _ask(self, talk: Talk, question: str) -> list[Any]:
        talk.ask(question)
        return self._begin(talk)

    def _retry(self, talk: Talk) -> list[Any]:
        talk.retry()
        return self._begin(talk)

    def _begin(self, talk: Talk) -> list[Any]:
        empty = self.gr.update(value="", interactive=False)
        return [conversation(talk.shown), "", empty, *self._states(answering=True)]

    def _answer(self, talk: Talk, *settings: float) -> Iterator[tuple[Any, ...]]:
        for messages, said, refused in self.answerer.answer(talk, *settings):
            yield conversation(messages), escape(said), refused

    def _measure(self, talk: Talk) -> str:
        return frame(self.answerer, talk)

    def _end(self) -> list[Any]:
        return [self.gr.update(interactive=True), *self._states(answering=False)]

    def _clear(self, talk: Talk) -> tuple[Any, ...]:
        talk.clear()
        return conversation([]), "", ""

    def serve(self, port: int | None) -> str:
        """Begins to serve the page to this machine, and returns its address."""
        _, address, _ = self.blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=self.gr.themes.Default(**FONTS),
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
        )
        return address


def conversation(messages: Sequence[Message]) -> str:
    """Questions and answers in HTML, each with its text as it is."""
    return "".join(
        f'<div class="message {message["role"]}">{escape(message["content"])}</div>'
        for message in messages
    )


def frame(answerer: Answerer, talk: Talk) -> str:
    """The page of the experts in a frame that reaches nothing around it; or why there is none."""
    if not talk.ids:
        return ""
    try:
        page = answerer.experts_page(talk)
    except Exception as error:  # The conversation goes on.
        return escape(one_line(error))
    return f'<iframe sandbox="allow-scripts" title="The experts" srcdoc="{escape(page)}"></iframe>'
