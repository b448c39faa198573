"""Makes the model known to every Python process that imports transformers.

Python runs a file of this name at its start if its folder is on PYTHONPATH, where
`python -m deepseek_moe` puts it. So the processes that a program starts know the model too.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class _RegisterAfterImport(Loader):
    """Loads transformers as `loader` does, and then registers the model."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module("deepseek_moe")


class _WaitForTransformers(MetaPathFinder):
    """Notices the import of transformers. Importing it here would slow every process."""

    def find_spec(self, name: str, *where: Any) -> ModuleSpec | None:
        if name != "transformers":
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, *where) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisterAfterImport(spec.loader)
                return spec
        return None


sys.meta_path.insert(0, _WaitForTransformers())

# Another file of this name would have run if this one were not there.
_here = str(Path(__file__).parent)
_others = [path for path in sys.path if path != _here]
_hidden = PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(ModuleType("sitecustomize"))
