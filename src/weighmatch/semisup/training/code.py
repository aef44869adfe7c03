"""What code trains a run: the modules that training imports, and weightings from elsewhere."""

import hashlib
import inspect
import sys
from collections.abc import Iterator

from weighmatch import code

# Training starts from this module.
ENTRY = "weighmatch.semisup.training.schedules"


def training_code() -> str:
    """Identifies the code that trains and the version of torch; 16 hexadecimal digits."""
    digest = hashlib.sha256(code.code_digest(ENTRY).encode())
    for source in _foreign_sources():
        digest.update(code.syntax(source).encode())
    return digest.hexdigest()[:16]


def _foreign_sources() -> Iterator[str]:
    """Modules outside of the package that define a weighting, as far as Python knows them."""
    base = sys.modules.get("weighmatch.semisup.weightings.base")
    if base is None:
        return
    modules = {kind.__module__ for kind in base.Weighting.registry.values()}
    for name in sorted(name for name in modules if name.partition(".")[0] != "weighmatch"):
        try:
            yield inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            continue
