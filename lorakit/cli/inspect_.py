"""What is in an adapter: settings, base, size, and how far each layer moves from the base.

No base is loaded. The norm is that of the whole change, ‖scaling · B A‖ (Frobenius), of a DoRA
adapter before it is brought to its lengths; the
effective rank is the exponential of the entropy of its singular values: how many directions are
really used.

  lorakit inspect runs/mine
  lorakit inspect someone/adapter@main --layers
  lorakit inspect runs/mine --json
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.cli.adapters import ADAPTER_HELP, adapter_path
from lorakit.cli.output import add_json_argument, console, emit_json, plain, printable_stdout, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorakit.core.adapter import Adapter

_BAR = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER_HELP)
    parser.add_argument("--layers", action="store_true", help="every site, not a line a block")
    parser.add_argument(
        "--all", action="store_true", help="everything that the adapter says of its history"
    )
    add_json_argument(parser)


@dataclass(frozen=True)
class SiteFacts:
    """One site in numbers."""

    path: str
    kind: str
    """``"linear"``, ``"conv"``, ``"embedding"``, or ``"trained whole"``."""
    shape: tuple[int, ...]
    """Of the change; of the tensors' concatenation, flattened, where trained whole."""
    parameters: int
    rank: int | None = None
    scaling: float | None = None
    norm: float | None = None
    """‖scaling · B A‖, Frobenius; ``None`` where the value replaces one we do not know."""
    effective_rank: float | None = None


def run(options: argparse.Namespace) -> int:
    """Read and show."""
    from lorakit.formats import load_adapter

    path = adapter_path(options.adapter)
    if path != options.adapter:
        say(f"{options.adapter} is a run folder; its adapter is {path}")
    adapter = load_adapter(path)
    sites = [site_facts(path, site) for path, site in sorted(adapter.sites.items(), key=_order)]
    facts = adapter_facts(path, adapter)
    if options.json:
        emit_json({**facts, "sites": sites, "provenance": adapter.provenance})
        return 0
    printable_stdout()
    out = console(stdout=True)
    _print_facts(out, facts)
    _print_blocks(out, sites, each=options.layers)
    _print_provenance(out, adapter.provenance, everything=options.all)
    return 0


def adapter_facts(ref: str, adapter: Adapter) -> dict[str, Any]:
    """The adapter as a whole, as plain data."""
    import dataclasses

    base = adapter.base
    return {
        "adapter": ref,
        "base": None
        if base is None
        else {
            "name": base.name,
            "architecture": base.architecture,
            "storage": base.storage,
            "revision": base.revision,
        },
        "task_type": adapter.task_type,
        "parameters": adapter.num_parameters,
        "bytes": adapter.num_bytes,
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in adapter.dtypes),
        "low_rank_sites": len(adapter.low_rank),
        "replaced_sites": len(adapter.replaced),
        "virtual_tokens": adapter.num_virtual_tokens,
        "ranks": sorted({site.rank for site in adapter.low_rank.values()}),
        "settings": {
            field.name: plain(getattr(adapter.spec, field.name))
            for field in dataclasses.fields(adapter.spec)
        },
        "tokenizer_files": sorted(adapter.tokenizer_files),
    }


def site_facts(path: str, site: Any) -> SiteFacts:
    """Norm and effective rank of one site, from its factors."""
    from lorakit.core.linalg import effective_rank, factors, singular_values
    from lorakit.core.sites import LowRank, Prefix

    if isinstance(site, Prefix):
        return SiteFacts(path, "prefix", tuple(site.key.shape), site.num_parameters)
    if not isinstance(site, LowRank):
        return SiteFacts(path, "trained whole", (site.num_parameters,), site.num_parameters)
    A, B = factors(site)
    values = singular_values(site)
    return SiteFacts(
        path,
        site.kind,
        (*A.shape[:-2], B.shape[-2], A.shape[-1]),
        site.num_parameters,
        site.rank,
        site.scaling,
        float(values.square().sum().sqrt()),
        effective_rank(values),
    )


def block_of(path: str) -> str:
    """The block that a module is in: its path up to the first number, or its parent."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", path)
    return found.group() if found else path.rpartition(".")[0] or path


def _order(entry: tuple[str, Any]) -> list[Any]:
    """Numbers in a path by value, so that layer 10 follows 9."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in entry[0].split(".")]


# --- printing --------------------------------------------------------------------------------


def _print_facts(out: Any, facts: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    settings = facts["settings"]
    base = facts["base"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    lines = {
        "adapter": facts["adapter"],
        "base": "not said by the file" if base is None else _base_line(base),
        "task": facts["task_type"] or "not said by the file",
        "parameters": f"{facts['parameters']:,}",
        "size": f"{_size(facts['bytes'])} ({', '.join(facts['dtypes'])})",
        "sites": f"{facts['low_rank_sites']} low-rank, {facts['replaced_sites']} trained whole"
        + (
            f", a prefix of {facts['virtual_tokens']} virtual tokens"
            * bool(facts["virtual_tokens"])
        ),
        "rank": ", ".join(map(str, facts["ranks"])) or "none",
        "alpha": f"{settings['alpha']:g}, scaling {settings['scaling']}",
        "targets": _joined(settings["targets"]),
        **{
            name: _joined(settings[name])
            for name in ("exclude", "layers", "rank_pattern", "alpha_pattern", "train_modules")
            if settings[name]
        },
        **({"variant": settings["variant"]} if settings["variant"] != "lora" else {}),
        "dropout": f"{settings['dropout']:g}",
        "bias": settings["bias"],
        "init": settings["init"],
    }
    if facts["tokenizer_files"]:
        lines["tokenizer"] = ", ".join(facts["tokenizer_files"])
    for name, value in lines.items():
        table.add_row(name, Text(str(value)))
    out.print(table)


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def _base_line(base: Mapping[str, Any]) -> str:
    revision = f"@{base['revision'][:12]}" if base["revision"] else ""
    return f"{base['name']}{revision} ({base['architecture']}, stored as {base['storage']})"


def _joined(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return value if isinstance(value, str) else ", ".join(map(str, value))


def _print_blocks(out: Any, sites: Sequence[SiteFacts], *, each: bool) -> None:
    """One line a block, or one a site under its block, with a bar of the norms."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[SiteFacts]] = {}
    for site in sites:
        groups.setdefault(block_of(site.path), []).append(site)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("site" if each else "block", no_wrap=True)
    for name in ("sites" if not each else "rank", "parameters", "‖ΔW‖", "effective rank"):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = list(_site_rows(groups) if each else _block_rows(groups))
    largest = max((norm for *_, norm in rows if norm is not None), default=0.0)
    for *cells, norm in rows:
        size = round(_BAR * norm / largest) if norm is not None and largest > 0 else 0
        table.add_row(*(Text(cell) for cell in cells), Text("█" * size, style="cyan"))
    out.print()
    out.print(table)
    if sites and largest == 0.0 and any(site.norm is not None for site in sites):
        out.print("Every low-rank change is zero: this adapter was not trained.")


def _site_rows(groups: Mapping[str, Sequence[SiteFacts]]) -> Iterator[tuple[Any, ...]]:
    for block, members in groups.items():
        if len(members) > 1:
            yield block, "", "", "", "", None
        for site in members:
            inside = len(members) > 1 and site.path.startswith(f"{block}.")
            name = f"  {site.path[len(block) + 1 :]}" if inside else site.path
            rank = site.kind if site.rank is None else str(site.rank)
            yield name, rank, f"{site.parameters:,}", *_numbers(site), site.norm


def _numbers(site: SiteFacts) -> tuple[str, str]:
    if site.norm is None or site.effective_rank is None:
        return "", ""
    return f"{site.norm:#.4g}", f"{site.effective_rank:.1f}"


def _block_rows(groups: Mapping[str, Sequence[SiteFacts]]) -> Iterator[tuple[Any, ...]]:
    for block, members in groups.items():
        norms = [site.norm for site in members if site.norm is not None]
        ranks = [site.effective_rank for site in members if site.effective_rank is not None]
        total = sum(norm * norm for norm in norms) ** 0.5 if norms else None
        spread = f"{min(ranks):.1f} – {max(ranks):.1f}" if ranks else "trained whole"
        yield (
            block if len(members) > 1 else members[0].path,
            str(len(members)),
            f"{sum(site.parameters for site in members):,}",
            "" if total is None else f"{total:#.4g}",
            spread,
            total,
        )


def _print_provenance(out: Any, provenance: Mapping[str, Any], *, everything: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if not provenance:
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    facts = plain(provenance)
    lines = _in_full(facts) if everything else _in_short(facts)
    for name, text in lines.items():
        table.add_row(name, Text(text))
    out.print()
    out.print("where it comes from", style="bold")
    out.print(table)


def _in_full(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: ", ".join(f"{path} {one}".strip() for path, one in _flat(value) if one is not None)
        for name, value in provenance.items()
    }


def _in_short(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Data, steps, learning rate, losses and version; the names of what else there is."""
    told = {
        name: provenance[name] if isinstance(provenance.get(name), dict) else {}
        for name in ("data", "train", "metrics", "versions")
    }
    data, train, metrics = told["data"], told["train"], told["metrics"]
    known = [one for one in (metrics.get("step"), train.get("steps")) if one is not None]
    steps = " of ".join(map(str, known)) or None
    combined = provenance.get("combined")
    members = combined.get("adapters") if isinstance(combined, dict) else None
    lines = {
        "combined": _members(members),
        "data": _phrase(
            (", ".join(map(str, data.get("files") or ())), "{}"),
            (data.get("examples"), "{:,} examples"),
            (data.get("format"), "written {}"),
        ),
        "training": _phrase(
            (steps, "{} steps"),
            (train.get("lr"), "lr {:.3g}"),
        ),
        "loss": _phrase(
            (metrics.get("training_loss"), "training {:.3f}"),
            (metrics.get("validation_loss"), "validation {:.3f}"),
            (metrics.get("validation_loss_before"), "{:.3f} before training"),
        ),
        "lorakit": _phrase((told["versions"].get("lorakit"), "{}")),
    }
    lines = {name: text for name, text in lines.items() if text}
    more = [name for name in provenance if name not in told]
    lines["more"] = f"{', '.join(more)}: see --all" if more else "see --all"
    return lines


def _members(members: Any) -> str:
    """``0.7·a + 0.3·b``; nothing where a file says it otherwise."""
    if not isinstance(members, list) or not all(isinstance(one, dict) for one in members):
        return ""
    return " + ".join(f"{one.get('weight')}·{one.get('name')}" for one in members)


def _phrase(*parts: tuple[Any, str]) -> str:
    """What is known of these, each in its form; what has another type than its form, as it is."""
    found = []
    for value, form in parts:
        if value is None or value == "":
            continue
        try:
            found.append(form.format(value))
        except (ValueError, TypeError):  # provenance is what a file says
            found.append(str(value))
    return ", ".join(found)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested objects as pairs: ``columns.prompt`` and what it is."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, " ".join(map(str, value))
    elif isinstance(value, float):
        yield path, f"{value:.6g}"
    else:
        yield path, value
