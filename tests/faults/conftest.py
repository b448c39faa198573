"""What the tests of faults start from: the base, rows and command of those of fine-tuning."""

from training.conftest import argv, examples, free_buffers, place, tuner

__all__ = ["argv", "examples", "free_buffers", "place", "tuner"]
