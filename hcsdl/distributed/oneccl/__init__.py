"""The `ccl` backend of torch.distributed: collectives over Intel's oneCCL, for CPUs.

In: `import hcsdl.distributed.oneccl`, nothing more. Out: `init_process_group("ccl")` works. Where Intel's own `oneccl_bindings_for_pytorch` can be
imported, that is what is registered, and it sets its own defaults; else our own thin binding over the C API of the `oneccl` package. The library's
settings are then put into the environment now, where the user has set nothing; the library itself is loaded when the first process group is made.
"""

from __future__ import annotations

import importlib
import importlib.util

from hcsdl.distributed import fabric
from hcsdl.distributed import oneccl_library as library
from hcsdl.distributed.oneccl import settings
from hcsdl.distributed.oneccl.api import CclError

OFFICIAL = "oneccl_bindings_for_pytorch"


def missing() -> str:
    """Return a sentence why `ccl` cannot be used here, empty if it can. Cheap: loads no library into this process, makes no communicator."""
    return "" if binding == OFFICIAL else library.missing() or fabric.refusal(library.folder())


def _register() -> str:
    """Register `ccl` with torch; return whose binding it is: Intel's, or `hcsdl`."""
    if importlib.util.find_spec(OFFICIAL):
        try:
            importlib.import_module(OFFICIAL)
            return OFFICIAL
        except (ImportError, OSError):  # built for another torch
            pass
    library.set_defaults(settings.DEFAULTS)
    import torch.distributed as dist

    from hcsdl.distributed.oneccl.process_group import ProcessGroupCCL

    dist.Backend.register_backend("ccl", ProcessGroupCCL, devices=["cpu"])
    return "hcsdl"


binding = _register()
__all__ = ["CclError", "binding", "missing"]
