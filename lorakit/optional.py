"""Optional dependencies: imported on use, and a missing one prints its install command."""

from __future__ import annotations

import importlib
from types import ModuleType

from lorakit.errors import MissingDependencyError


def require(module: str, *, extra: str | None = None, purpose: str | None = None) -> ModuleType:
    """Import ``module``, or raise with the command that installs it.

    Args:
        module: dotted name, for example ``"bitsandbytes"``.
        extra: the extra of lorakit that brings it; ``None`` means the package has none
            and is installed under its own name.
        purpose: what it is needed for, completing "… is needed for".

    Raises:
        MissingDependencyError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != top:
            raise  # the package is there, but one of its own imports is broken
        package = f"'lorakit[{extra}]'" if extra else top.replace("_", "-")
        reason = f" for {purpose}" if purpose else ""
        raise MissingDependencyError(
            f"{top} is needed{reason} and is not installed. Run: pip install {package}"
        ) from None
