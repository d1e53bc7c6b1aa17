"""Lightning's two namespaces: a Trainer and a LightningCLI each know only the Callback of their own."""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
else:

    def _callback_bases() -> tuple[type, ...]:
        bases = []
        for namespace in ("lightning.pytorch", "pytorch_lightning"):
            try:
                bases.append(importlib.import_module(namespace).Callback)
            except ImportError:
                continue
        return tuple(dict.fromkeys(bases))

    CallbackBase = type("CallbackBase", _callback_bases(), {})

# Lightning's own logger, which is shown.
LOG = logging.getLogger(CallbackBase.__mro__[1].__module__.partition(".callbacks")[0])
