"""The face of the project: the `videomamba` command and the public names, each loaded when first asked for."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

# public name -> the module that defines it; importing `videomamba` imports none of them
_PUBLIC = {
    "create_model": "videomamba.api",
    "load_encoder": "pretrain.encoder",
    "load_model": "pretrain.checkpoint",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'videomamba' has no attribute '{name}'; it offers {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
