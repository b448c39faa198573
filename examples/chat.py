"""Talks with a DeepSeek-MoE chat model.

    python examples/chat.py --model deepseek-ai/deepseek-moe-16b-chat
    python examples/chat.py --prompt "Who are you?"          one answer
    python examples/chat.py < questions.txt                  a conversation, a line a turn

Answers go to stdout, everything else to stderr. Ctrl-C stops an answer, Ctrl-D leaves. An error
ends a conversation that is piped.
"""

from shared_options import (
    OptionParser,
    add_model_options,
    add_sampling_options,
    add_weight_options,
    ctrl_c_leaves,
)


def main() -> None:
    parser = OptionParser(description="Talks with a DeepSeek-MoE chat model.")
    add_model_options(parser, bundled="models/tiny-chat")
    add_weight_options(parser)
    parser.add_argument("--prompt", help="ask this, print the answer, leave")
    add_sampling_options(parser, max_new_tokens=512)
    args = parser.parse_args()
    with ctrl_c_leaves():  # these imports take seconds
        from conversation import talk

        from deepseek_moe.errors import exit_on_user_error
    with exit_on_user_error():
        talk(args)


if __name__ == "__main__":
    main()
