"""Talks with a DeepSeek-MoE chat model in a browser, and shows the experts that it uses.

    python examples/web_chat.py
    python examples/web_chat.py --model deepseek-ai/deepseek-moe-16b-chat --quantization int4

The page is for this machine only: it is served at 127.0.0.1 and asks no other host for anything.
Its address goes to stdout, everything else to stderr. Ctrl-C ends it.
"""

from shared_options import (
    OptionParser,
    add_model_options,
    add_sampling_options,
    add_weight_options,
    ctrl_c_leaves,
)


def main() -> None:
    parser = OptionParser(description="Talks with a DeepSeek-MoE chat model in a browser.")
    add_model_options(parser, bundled="models/tiny-chat")
    add_weight_options(parser)
    says = "of the address; by default the first free one from 7860 on"
    parser.add_argument("--port", type=int, help=says)
    add_sampling_options(parser, max_new_tokens=512)
    args = parser.parse_args()
    with ctrl_c_leaves():  # these imports take seconds
        from web_page import serve

        from deepseek_moe.errors import exit_on_user_error
    with exit_on_user_error():
        serve(args)


if __name__ == "__main__":
    main()
