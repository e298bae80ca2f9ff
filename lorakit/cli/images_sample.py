"""Draw pictures with a base and adapters on it.

Several adapters act together, each at its weight; a contact sheet compares them, or weights, seeds,
prompts, denoising steps. Every PNG says in its metadata how it was made.

examples:
  lorakit images sample --base B --prompt "a house" --out pictures
  lorakit images sample --base B --adapter runs/style=0.8 --prompt "a house" --seed 1,2,3 --out p
  lorakit images sample --base B --adapter a.safetensors=0.7 --adapter b.safetensors=0.4 \\
      --prompt "a house" --negative "blurred" --out p
  lorakit images sample --base B --adapter runs/style --prompt "a house" --out p \\
      --grid "weight=0,0.5,1 seed=1,2,3"
  lorakit images sample --base B --adapter a --adapter b --prompt "a house" --prompt "a tree" \\
      --grid "prompt adapter" --out p
  lorakit images sample --base B --adapter runs/style --prompt "a house" --against -1 --out p \\
      --grid "start=0,0.2,0.4 weight=0.4,0.6,0.8"

A grid has one or two of weight, adapter, prompt, seed, step (denoising steps) and start (the share
of them after which adapters begin); rows come first. prompt and adapter alone mean all that were
given, and the base beside the adapters.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import add_adapter_arguments, attach_adapters, check_names, load_adapters
from lorakit.cli.flags import check_text, finite_float, fraction, non_negative_float, positive_int
from lorakit.cli.output import add_json_argument, emit_json, plural, say
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.images.base import PictureBase
    from lorakit.images.drawing import Cell
    from lorakit.images.grid import Axis
    from lorakit.layers import Handle


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_pipeline_arguments(parser, required=True)
    add_adapter_arguments(parser)
    asking = parser.add_argument_group("pictures")
    asking.add_argument("--prompt", action="append", metavar="P", help="a prompt; may be repeated")
    asking.add_argument("--prompts", metavar="FILE", help="a file with a prompt on each line")
    asking.add_argument("--negative", metavar="TEXT", help="what the pictures should not show")
    asking.add_argument("--seed", type=_seeds, metavar="N[,N…]", help="of the noise; default 0")
    asking.add_argument(
        "--steps", type=positive_int, metavar="N", help="denoising steps; default 30"
    )
    asking.add_argument(
        "--guidance",
        type=non_negative_float,
        metavar="X",
        help="how strongly the prompt counts; default: usual for the family of the base",
    )
    asking.add_argument(
        "--against",
        type=finite_float,
        default=1.0,
        metavar="X",
        help="times the adapters' weights in the picture that guidance pushes away from: 1 is as "
        "everywhere (default), 0 the bare base, -1 the opposite. Below 1 styles are stronger: "
        "lower their weights with it, and more of the prompt may be kept",
    )
    asking.add_argument(
        "--adapter-start",
        type=fraction,
        metavar="X",
        help="share of the steps that the bare base makes before the adapters act, 0 (default) to "
        "below 1: what is where comes about early, how it is drawn later",
    )
    for name in ("width", "height"):
        asking.add_argument(
            f"--{name}", type=positive_int, metavar="PIXELS", help="default: the base's own"
        )
    asking.add_argument(
        "--grid",
        metavar="AXES",
        help="a contact sheet too, over one or two of weight, adapter, prompt, seed, step and "
        'start: "weight=0,0.5,1 seed=1,2,3"',
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", required=True, metavar="FOLDER", help="where the PNGs go; new, or empty"
    )
    output.add_argument(
        "--captions",
        action="store_true",
        help="each picture's prompt beside it as .txt, as `lorakit images train` reads it",
    )
    output.add_argument(
        "--parallel", type=positive_int, default=4, metavar="N", help="drawn at a time; default 4"
    )
    add_json_argument(parser)


def add_pipeline_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--base`` and how to load it."""
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--base", required=required, metavar="B", help="folder or hub id of a diffusers pipeline"
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--device", default="auto", metavar="D", help="auto (default), cpu, cuda, cuda:1, mps"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base's weights; auto (default) chooses for the processor and says why. The "
        "VAE is float32 in any case",
    )
    group.add_argument(
        "--quantize",
        choices=("nf4",),
        help="store the linears of transformers (SD3's, Flux's, T5) in 4 bits",
    )
    group.add_argument(
        "--text-tokens",
        type=positive_int,
        metavar="N",
        help="tokens that T5 reads of a prompt (SD3 and Flux), up to 512; default: usual for the "
        "family",
    )
    group.add_argument(
        "--allow-other-base",
        action="store_true",
        help="use an adapter although its base has other weights (shapes must fit)",
    )


def pipeline_options(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``load_pipeline`` beside the reference."""
    names = ("device", "dtype", "quantize", "revision")
    found = {name: getattr(options, name) for name in names}
    return {**found, "text_length": options.text_tokens}


def load_pipeline_from(options: argparse.Namespace, *, quiet: bool = False) -> PictureBase:
    """Load the base of these flags; says on stderr where it was put, and why."""
    from lorakit.images.base import load_pipeline

    tell = (lambda text: None) if quiet else say
    base = load_pipeline(options.base, say=tell, **pipeline_options(options))
    dtype = str(base.placement.dtype).removeprefix("torch.")
    tell(f"Base {options.base}: {dtype} on {base.placement.device} ({base.placement.reason})")
    for note in base.notes:
        tell(f"  {note}")
    return base


def run(options: argparse.Namespace) -> int:
    """Load, draw, write."""
    check_names(options.adapter)
    prompts = _prompts(options)
    if options.against != 1 and not options.adapter:
        raise InputError("--against is given, and no adapter that it could weigh; give --adapter")
    if options.adapter_start and not options.adapter:
        raise InputError("--adapter-start is given, and no adapter that could; give --adapter")
    names = [one.name for one in options.adapter]
    weights = {one.name: 1.0 if one.weight is None else one.weight for one in options.adapter}
    from lorakit.images.base import check_text_length
    from lorakit.images.drawing import STEPS, Cell, check_cells
    from lorakit.images.grid import cells_of, parse_grid

    check_text_length(options.text_tokens)
    seeds = options.seed or (0,)
    first = Cell(
        prompts[0],
        options.negative,
        seeds[0],
        weights or None,
        options.steps or STEPS,
        options.guidance,
        options.width,
        options.height,
        options.against,
        options.adapter_start or 0.0,
    )
    axes: tuple[Axis, ...] = ()
    if options.grid is not None:
        axes = parse_grid(options.grid, prompts, names)
        _check_grid(options, axes, prompts)
        table = cells_of(axes, first, weights)
        cells = [cell for row in table for cell in row]
    else:
        cells = _plain(first, prompts, seeds)
    folder = _new_folder(options.out)
    adapters = load_adapters(options.adapter)
    cells = _as_learnt(options, adapters, cells)
    base = load_pipeline_from(options)
    check_cells(base, cells)
    for note in base.cut_captions(prompts):
        say(note)
    _draw(options, folder, base, _attach(options, base, adapters), cells, axes)
    return 0


def _plain(first: Cell, prompts: list[str], seeds: tuple[int, ...]) -> list[Cell]:
    import dataclasses

    return [
        dataclasses.replace(first, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds
    ]


def _as_learnt(
    options: argparse.Namespace, adapters: dict[str, Any], cells: list[Cell]
) -> list[Cell]:
    """The size and the length of text that all adapters were trained with, where no flag says."""
    import dataclasses

    facts = [adapter.provenance.get("data") for adapter in adapters.values()]
    told = [one for one in facts if isinstance(one, dict) and one.get("kind") == "pictures"]
    names = ", ".join(adapters)
    if not told or len(told) < len(adapters):
        return cells
    lengths = {one.get("text_tokens") for one in told}
    if options.text_tokens is None and len(lengths) == 1 and isinstance(n := lengths.pop(), int):
        options.text_tokens = n
        say(f"T5 reads {n} tokens, as {names} learnt")
    sides = {one.get("resolution") for one in told}
    if options.width or options.height or len(sides) > 1:
        return cells
    side = sides.pop()
    if not isinstance(side, int) or side < 1:
        return cells
    say(f"Pictures are {side} × {side} pixels, as {names} learnt (--width and --height say other)")
    return [dataclasses.replace(cell, width=side, height=side) for cell in cells]


def _attach(
    options: argparse.Namespace, base: PictureBase, adapters: dict[str, Any]
) -> Handle | None:
    return attach_adapters(base, adapters, allow_other=options.allow_other_base)


def _draw(
    options: argparse.Namespace,
    folder: Path,
    base: PictureBase,
    handle: Handle | None,
    cells: list[Cell],
    axes: tuple[Axis, ...],
) -> None:
    """Draw and write; each picture is a file as soon as it is there."""
    from lorakit.cli.meter import meter
    from lorakit.images.drawing import drawn

    told: dict[int, dict[str, Any]] = {}
    kept: dict[int, Any] = {}
    with meter() as tell:
        for number, picture in drawn(base, handle, cells, batch=options.parallel):
            told[number] = _write(options, folder, base, number, cells[number], picture)
            if not _is_finite(picture):
                where = told[number]["file"]
                say(f"note: {where} holds no picture: its pixels are no numbers; lower the weights")
            if axes:
                kept[number] = picture
            tell("pictures", len(told), len(cells))
    page = None
    if axes:
        page = folder / "sheet.png"
        _write_sheet(options, page, base, cells, [kept[i] for i in range(len(cells))], axes)
    if options.json:
        pictures = [told[number] for number in range(len(cells))]
        emit_json({"base": base.ref, "pictures": pictures, "sheet": page})
        return
    say(f"{plural(len(told), 'picture')} in {folder}" + (f", and {page}" if page else ""))


def _is_finite(picture: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(picture).all())


def _write(
    options: argparse.Namespace,
    folder: Path,
    base: PictureBase,
    number: int,
    cell: Cell,
    picture: Any,
) -> dict[str, Any]:
    """Write one picture, and its caption if wanted; what is told of it."""
    from lorakit.core.files import write_atomic
    from lorakit.images.sheets import as_image, png

    facts = _facts(options, base, cell, picture)
    path = folder / f"{number:03}-{_slug(cell.prompt)}-{cell.seed}.png"
    write_atomic(path, png(as_image(picture), facts))
    if options.captions:
        write_atomic(path.with_suffix(".txt"), (cell.prompt + "\n").encode())
    return {"file": str(path), **facts}


def _write_sheet(
    options: argparse.Namespace,
    path: Path,
    base: PictureBase,
    cells: list[Cell],
    pictures: list[Any],
    axes: tuple[Axis, ...],
) -> None:
    from lorakit.core.files import write_atomic
    from lorakit.images.sheets import png, sheet

    rows, columns = axes
    width = len(columns.values)
    table = [pictures[i : i + width] for i in range(0, len(pictures), width)]
    title = "" if "prompt" in (rows.name, columns.name) else cells[0].prompt
    labels = [""] if rows.name == "row" else rows.labels()
    page = sheet(table, labels, columns.labels(), title)
    each = [_facts(options, base, *both) for both in zip(cells, pictures, strict=True)]
    alike = {k: v for k, v in each[0].items() if all(other[k] == v for other in each)}
    write_atomic(path, png(page, {"grid": options.grid, **alike}))


def _facts(
    options: argparse.Namespace, base: PictureBase, cell: Cell, picture: Any
) -> dict[str, Any]:
    """How a picture was made, for its metadata."""
    from lorakit import __version__
    from lorakit.layers.routing import as_mix

    refs = {one.name: one.ref for one in options.adapter}
    return {
        "prompt": cell.prompt,
        "negative": cell.negative,
        "seed": cell.seed,
        "steps": cell.steps,
        "guidance": base.family.guidance if cell.guidance is None else cell.guidance,
        "against": cell.against,
        "adapter_start": cell.start,
        "size": f"{picture.shape[1]}x{picture.shape[0]}",
        "base": base.ref,
        "adapters": [
            {"name": name, "ref": refs[name], "weight": weight} for name, weight in as_mix(cell.mix)
        ],
        "scheduler": type(base.pipe.scheduler).__name__,
        "lorakit": __version__,
    }


# --- what is asked ---------------------------------------------------------------------------


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt and options.prompts:
        raise InputError("--prompt and --prompts are both given; give one of them")
    found = list(options.prompt or ())
    if options.prompts:
        try:
            text = Path(options.prompts).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(
                f"--prompts {options.prompts} cannot be read: {error.strerror}"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts {options.prompts} is not UTF-8 text: {error}") from error
        found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise InputError("no prompt is given; give --prompt, or --prompts FILE with one on a line")
    for prompt in found:
        check_text(prompt, "--prompt")
    check_text(options.negative or "", "--negative")
    return found


def _check_grid(options: argparse.Namespace, axes: tuple[Axis, ...], prompts: list[str]) -> None:
    """Refuse flags that a grid leaves unused."""
    names = {axis.name for axis in axes}
    problems = []
    if len(prompts) > 1 and "prompt" not in names:
        problems.append(f"{len(prompts)} prompts are given; put prompt into --grid, or give one")
    if options.seed is not None and len(options.seed) > 1 and "seed" not in names:
        problems.append(f"{len(options.seed)} seeds are given; put seed=… into --grid, or give one")
    alone = (
        ("seed", "--seed", options.seed),
        ("step", "--steps", options.steps),
        ("start", "--adapter-start", options.adapter_start),
    )
    for axis, flag, value in alone:
        if axis in names and value is not None:
            problems.append(f"{flag} and {axis} in --grid are both given; give one of them")
    if problems:
        raise InputError("; ".join(problems))


def _new_folder(out: str) -> Path:
    """The folder for the pictures.

    Raises:
        InputError: something is in it already, or it is a file.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--out {out} is not empty; give a new folder. Nothing was touched")
    return folder


def _slug(text: str) -> str:
    """A prompt as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"


def _seeds(text: str) -> tuple[int, ...]:
    """An argparse type: ``1,2,3``."""
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected whole numbers, such as 1,2,3")
    return tuple(int(word) for word in words)
