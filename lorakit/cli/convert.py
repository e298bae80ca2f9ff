"""Write an adapter in another format, or as a certain program needs it.

The format of IN is detected. Every key and setting that the new format has no place for is listed;
then nothing is written and the exit code is 2, unless --allow-loss says that it may go. The same
input gives the same bytes.

  lorakit convert runs/mine --to gguf --base smollm2 --out mine.gguf
  lorakit convert style.safetensors --to diffusers --out pytorch_lora_weights.safetensors
  lorakit convert runs/mine --for vllm --out served
  lorakit convert runs/mine --to peft --portable --out plain
  lorakit convert old.pt --alpha 16 --to peft --out old
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import adapter_path
from lorakit.cli.flags import finite_float, positive_int
from lorakit.cli.output import add_json_argument, emit_json, plural, say

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorakit.formats.convert import Plan

EPILOG = """\
formats to write: peft, kohya, diffusers, gguf, mlx, loralib, onnx
formats to read:  peft, kohya, diffusers, gguf, mlx, loralib, lycoris, torchtune, litgpt
programs (--for): vllm, openvino, llama.cpp, ollama, mlx, onnxruntime, diffusers, mistralrs
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.epilog = EPILOG
    parser.add_argument("adapter", metavar="IN", help="a run, an adapter folder or a file")
    parser.add_argument("--out", required=True, metavar="OUT", help="the file or folder to write")
    parser.add_argument(
        "--to", metavar="FORMAT", help="format to write: peft, kohya, … (see below)"
    )
    parser.add_argument(
        "--for",
        dest="runtime",
        metavar="PROGRAM",
        help="format and shape that a program needs: vllm, ollama, … (see below)",
    )
    parser.add_argument(
        "--from", dest="source", metavar="FORMAT", help="format of IN, where it is not clear"
    )
    parser.add_argument(
        "--portable",
        action="store_true",
        help="fold each scale into B, so that no program can read it otherwise",
    )
    parser.add_argument(
        "--alpha", type=finite_float, metavar="A", help="of files that do not store it (loralib)"
    )
    parser.add_argument(
        "--rank",
        type=positive_int,
        metavar="R",
        help="rank to approximate at, where a file's change has no low rank (LoKr)",
    )
    parser.add_argument(
        "--base",
        metavar="B",
        help="the base: only its config is read, for its heads and names; default: the base that "
        "the adapter names, where its config is on this machine",
    )
    parser.add_argument(
        "--enabled",
        type=_switches,
        default=(),
        metavar="1,0,1",
        help="which parts of a joined projection were trained, where a file does not say "
        "(loralib's enable_lora; litgpt's query, key, value)",
    )
    parser.add_argument(
        "--family", metavar="NAME", help="naming of a picture model, such as sdxl, if not clear"
    )
    parser.add_argument(
        "--allow-loss", action="store_true", help="write although something is not carried over"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what this format wrote to OUT before"
    )
    add_json_argument(parser)


def _switches(text: str) -> tuple[bool, ...]:
    parts = text.split(",")
    if not all(part in ("0", "1") for part in parts) or "1" not in parts:
        raise argparse.ArgumentTypeError(f"{text!r} given; expected ones and zeros, such as 1,0,1")
    return tuple(part == "1" for part in parts)


def run(options: argparse.Namespace) -> int:
    """Read, plan, say, write."""
    from lorakit.errors import InputError
    from lorakit.formats.convert import check_nothing_lost, plan

    if (options.to is None) == (options.runtime is None):
        raise InputError("give either --to FORMAT or --for PROGRAM; see `lorakit convert --help`")
    path = adapter_path(options.adapter)
    planned = plan(
        path,
        to=options.to,
        source=options.source,
        hints=_hints(options, path),
        portable=options.portable,
        runtime=options.runtime,
    )
    for note in planned.notes:
        say(f"note: {note}")
    if planned.lost and not options.allow_loss:
        if options.json:
            emit_json(_facts(options, planned, None))
        check_nothing_lost(planned)
    for name, why in planned.lost.items():
        say(f"lost: {name}: {why}")
    out = planned.write(options.out, overwrite=options.overwrite)
    if options.json:
        emit_json(_facts(options, planned, out))
    say(f"Wrote {plural(len(planned.sites), 'site')} as {planned.target.title} to {out}")
    return 0


def _hints(options: argparse.Namespace, path: str) -> Any:
    from lorakit.formats.format import Hints

    return Hints(
        alpha=options.alpha,
        rank=options.rank,
        base=_base_config(options, path),
        enabled=options.enabled,
        family=options.family,
    )


def _base_config(options: argparse.Namespace, path: str) -> Mapping[str, Any]:
    """The base's config, given or named by the adapter; empty where none is known or needed."""
    from pathlib import Path

    from lorakit.bases.config import find_config, read_config
    from lorakit.bases.source import adapter_base
    from lorakit.formats.registry import NEEDS_BASE
    from lorakit.formats.runtimes import RUNTIMES

    if options.base is not None:
        return read_config(options.base)
    formats = {options.to, options.source, Path(path).suffix.removeprefix(".")}
    if options.runtime in RUNTIMES:
        formats.add(RUNTIMES[options.runtime].format)
    if not formats & {*NEEDS_BASE, "pt", "pth", "lora"}:
        return {}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    named = adapter_base(folder / "adapter_config.json")
    config = None if named is None else find_config(named)
    if config is not None:
        say(f"note: heads and names are those of {named}, which the adapter names as its base")
    return config or {}


def _facts(options: argparse.Namespace, planned: Plan, out: Path | None) -> dict[str, Any]:
    return {
        "adapter": options.adapter,
        "from": planned.source,
        "to": planned.target.name,
        "for": options.runtime,
        "out": None if out is None else str(out),
        "sites": len(planned.sites),
        "parameters": sum(site.num_parameters for site in planned.sites.values()),
        "notes": list(planned.notes),
        "lost": dict(planned.lost),
    }
