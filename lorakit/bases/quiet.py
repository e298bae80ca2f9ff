"""What transformers prints while it loads goes to the debug log, not to the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from lorakit.optional import require

_log = logging.getLogger(__name__)

#: transformers imports torchao where it is installed, which warns of kernels that are not needed
_LOUD = ("transformers", "bitsandbytes", "torchao", "torch.utils._pytree")


class _ToDebug(logging.Handler):
    """Repeats the records of another library at the level ``DEBUG`` of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.debug("%s: %s", record.name, record.getMessage())


@contextlib.contextmanager
def quiet_transformers(*, stderr: bool = False) -> Iterator[None]:
    """Send the logs and warnings of transformers and what it imports to the debug log of lorakit.

    What a user must know of a load (weights that are missing, a new head, another dtype) is
    reported by the caller, from the facts. Progress bars of downloads stay.

    Args:
        stderr: also take what is written to ``sys.stderr`` directly; for code that draws progress
            bars that cannot be switched off. The whole process is affected meanwhile.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        written = io.StringIO()
        if stderr:
            stack.enter_context(contextlib.redirect_stderr(written))
        stack.enter_context(_without_progress_bars())
        for logger in loggers:
            logger.handlers, logger.propagate = [_ToDebug()], False
        try:
            yield
        finally:
            for logger, (handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
            for warning in heard:
                _log.debug("%s: %s", warning.category.__name__, warning.message)
            if text := written.getvalue().strip():
                _log.debug("%s", text)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    hub = require("huggingface_hub.utils")
    bars = require("transformers.utils.logging")
    downloads_shown, shown = not hub.are_progress_bars_disabled(), bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    if downloads_shown:  # the line above silences the bars of downloads too
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
