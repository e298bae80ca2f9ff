"""How what was trained is used, to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from lorakit.train.record import Record
from lorakit.train.report import pictures
from lorakit.train.report.blocks import section
from lorakit.train.report.markup import Html, fill
from lorakit.train.report.words import base_ref


def _use_model(record: Record) -> Html:
    ref = base_ref(record) or "BASE"
    model, run = shlex.quote(str(record.folder / "model")), shlex.quote(str(record.folder))
    shell = (
        f'lorakit generate --base {model} --prompt "…"\n'
        f"lorakit eval --base {shlex.quote(ref)} --full {run} --data test.jsonl --forgetting\n"
        f"lorakit extract --base {shlex.quote(ref)} --tuned {model} --rank 32 --out adapter"
    )
    return section(
        "Using the model",
        "The folder is a whole model, as transformers saves it. The last line makes an adapter of "
        "its difference to the base.",
        fill("<h3>{title}</h3><pre>{code}</pre>", title="In the shell", code=shell),
    )


def use(record: Record) -> Html:
    if record.is_full and (record.folder / "model").is_dir():
        return _use_model(record)
    if record.adapter is None:
        return Html("")
    ref = base_ref(record) or "BASE"
    if pictures.is_of_pictures(record):
        return _used("The folder is in PEFT's format.", pictures.use(record, ref))
    folder = str(record.folder / "adapter")
    base, adapter = shlex.quote(ref), shlex.quote(folder)
    shell = (
        f'lorakit generate --base {base} --adapter {adapter} --prompt "…"\n'
        f"lorakit eval --base {base} --adapter {adapter} --data test.jsonl --metrics bleu,exact\n"
        f"lorakit inspect {adapter}"
    )
    python = (
        "import lorakit\n\n"
        f"base = lorakit.load_base({ref!r})\n"
        f"handle = lorakit.attach(base.model, lorakit.load_adapter({folder!r}), name='mine')\n"
        "# base.model now answers with the adapter; handle.use(None) is the bare base"
    )
    blocks = [("In the shell", shell), ("In Python", python)]
    hub = _transformers_ref(ref)
    if hub is not None:
        blocks.append(
            (
                "With PEFT, without lorakit",
                "from peft import PeftModel\n"
                "from transformers import AutoModelForCausalLM\n\n"
                f"model = AutoModelForCausalLM.from_pretrained({hub!r})\n"
                f"model = PeftModel.from_pretrained(model, {folder!r})",
            )
        )
    told = "The folder is in PEFT's format: vLLM, diffusers and OpenVINO GenAI read it too."
    return _used(told, blocks)


def _used(told: str, blocks: Iterable[tuple[str, str]]) -> Html:
    return section(
        "Using the adapter",
        told,
        *(
            fill("<h3>{title}</h3><pre>{code}</pre>", title=title, code=code)
            for title, code in blocks
        ),
    )


def _transformers_ref(ref: str) -> str | None:
    """What transformers would load the same base from; ``None`` for a file of another format."""
    from lorakit.bases.source import ALIASES

    if ref in ALIASES:
        return str(ALIASES[ref].hub_id)
    return None if ref == "BASE" or ref.endswith(".gguf") else ref
