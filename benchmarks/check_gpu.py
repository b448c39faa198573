"""Checks on a GPU that every fast path equals its plain oracle, as the tests do without one.

    python benchmarks/check_gpu.py                              kernels, and the bundled model
    python benchmarks/check_gpu.py --model /tmp/random-16b      another model's logits too
    python benchmarks/check_gpu.py --only "kernel linear"       checks with this text in their name

Prints a line a check. Exit code 1: one failed; 2: there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from check_kernels import kernel_checks
from check_models import bundled_checks, model_checks

from deepseek_moe.cli import one_line_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="also compare this model's logits: a folder or a hub id")
    parser.add_argument("--only", default="", help="checks with this text in their name")
    parser.add_argument("--new_tokens", type=int, default=200, help="of each generation")
    parser.add_argument(
        "--device",
        default="cuda",
        help="cpu, with TRITON_INTERPRET=1 set, tries the checks themselves on small sizes",
    )
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU was found; this checks what runs on one", file=sys.stderr)
        sys.exit(2)
    device = torch.device(args.device)
    checks = chain(
        kernel_checks(device),
        bundled_checks(device, args.new_tokens),
        model_checks(args.model, device) if args.model else (),
    )
    sys.exit(run((name, check) for name, check in checks if args.only in name))


def run(checks: Iterator[tuple[str, Callable[[], str]]]) -> int:
    """Calls each check, which returns a remark or raises, whatever the one before did. The exit
    code."""
    count = failed = 0
    for name, check in checks:
        count += 1
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            said = f"{type(error).__name__}: {error}"
            print(f"FAILED  {name}: {' '.join(said.split())[:600]}", flush=True)
    print(f"{count} checks, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    with one_line_errors():
        main()
