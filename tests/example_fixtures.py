"""What the tests of the example scripts share."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from text_fixtures import ROOT

EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),  # so that the scripts find the package without an installation too
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "",  # as for most people: output may be written as late as at the exit
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LONG = "word " * 2000  # more than the context of the bundled models


@dataclass
class Run:
    code: int
    out: str
    err: str


Runner = Callable[..., Run]


def assert_error(done: Run, *said: str, code: int = 2) -> None:
    """One line of error, at the end of stderr, that says all of `said`."""
    *before, last = done.err.splitlines()
    assert done.code == code, done.err
    assert "error: " in last
    assert not [words for words in said if words not in last], last
    assert not any(line.startswith("error:") for line in before)
    assert "Traceback" not in done.err
