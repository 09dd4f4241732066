"""Lets torchvision's wheel, a CUDA build, be imported beside a torch that has no CUDA.

There its import dies with "operator torchvision::nms does not exist", and open_clip, timm and every
transformers model die with it. Declaring the two schemas that it registers fake kernels for is enough: we
call none of them. Call `ensure_torchvision()` before importing torchvision, open_clip, timm or a
transformers class; where torchvision works, or is absent, it changes nothing.
"""

import importlib
import logging
import sys
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # the library object must live as long as its schemas

log = logging.getLogger(__name__)


def ensure_torchvision() -> bool:
    """True if `import torchvision` works now, False where it is not installed; other import errors are raised."""
    try:
        importlib.import_module("torchvision")
        return True
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            return False
        raise
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    log.debug("torchvision was built for CUDA and torch was not: declaring its detection operators without kernels")
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _kept.append(library)
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    importlib.import_module("torchvision")
    return True
