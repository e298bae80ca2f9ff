"""``write_report``: one run folder as one page that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder from what the folder holds; see ``train.record``."""
    raise NotImplementedError
