"""PEFT's folder as one of the formats: the native one, which loses nothing."""

from __future__ import annotations

from lorakit.core.adapter import Adapter
from lorakit.errors import FormatError
from lorakit.formats.folder import CONFIG
from lorakit.formats.format import Hints, Reading, Source, Written
from lorakit.formats.peft.keys import PREFIX
from lorakit.formats.peft.prefix import ALONE, TENSOR
from lorakit.formats.peft.read import read_peft
from lorakit.formats.peft.write import plan_files


class _Peft:
    name = "peft"
    title = "PEFT folder"
    folder = True

    def recognises(self, source: Source) -> bool:
        """PEFT's beginning of its keys, or the one tensor of its prefix tuning."""
        alone = source.config.get("peft_type") == ALONE and TENSOR in source.shapes
        return alone or any(key.startswith(PREFIX) for key in source.shapes)

    def read(self, source: Source, hints: Hints) -> Reading:
        """The adapter of the folder in which the weights lie."""
        folder = source.weights.parent
        if not (folder / CONFIG).exists():
            raise FormatError(
                f"{source.weights} has weights but no {CONFIG} beside it, without which their "
                "scale and ranks are unknown. Put the config of the same adapter there."
            )
        return Reading(read_peft(folder, source.weights))

    def write(self, adapter: Adapter, hints: Hints) -> Written:
        """The folder's files."""
        return Written(plan_files(adapter))


FORMAT = _Peft()
