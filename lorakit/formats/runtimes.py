"""What each program needs: ``--for`` picks the format, the folding, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.core.adapter import Adapter
from lorakit.errors import FormatError
from lorakit.formats.format import Hints
from lorakit.formats.portable import fold


@dataclass(frozen=True)
class Runtime:
    """One program."""

    title: str
    format: str


RUNTIMES = {
    "vllm": Runtime("vLLM", "peft"),
    "openvino": Runtime("OpenVINO GenAI", "peft"),
    "llama.cpp": Runtime("llama.cpp", "gguf"),
    "ollama": Runtime("Ollama", "gguf"),
    "mlx": Runtime("MLX", "mlx"),
    "onnxruntime": Runtime("ONNX Runtime GenAI", "onnx"),
    "diffusers": Runtime("diffusers", "diffusers"),
    "mistralrs": Runtime("mistral.rs", "peft"),
}


def shape_for(
    name: str, adapter: Adapter, to: str | None, hints: Hints
) -> tuple[Adapter, str, list[str]]:
    """The adapter as a program needs it, the format, and what was done.

    Raises:
        FormatError: there is no such program here, or it would drop or crash on something.
    """
    if name not in RUNTIMES:
        raise FormatError(f"{name!r} is no program known here; they are {', '.join(RUNTIMES)}")
    runtime = RUNTIMES[name]
    if to not in (None, runtime.format):
        raise FormatError(f"{runtime.title} takes the format {runtime.format}, not {to}")
    folded, notes = fold(adapter)
    return folded, runtime.format, notes
