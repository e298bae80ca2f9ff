"""What files without a config say about an adapter: nothing, or what our own header does.

kohya's and diffusers' files hold tensors and a scale. Settings, base and provenance go into the
header's ``lorakit`` entry, as in our PEFT files; another tool that writes the file again drops it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lorakit.core.adapter import Adapter
from lorakit.core.sites import LowRank, Site
from lorakit.core.spec import LoRASpec
from lorakit.formats.header import (
    Header,
    apply_difference,
    read_header,
    spec_difference,
    write_header,
)
from lorakit.formats.peft.match import fitting_spec


def header_of(
    adapter: Adapter, stored: Mapping[str, float], no_bias: Iterable[str] = ()
) -> dict[str, str]:
    """The metadata that gives everything back but the tensors.

    Args:
        adapter: what is written.
        stored: path → the scaling that a reader would find there.
        no_bias: sites that the format gives a bias of zeros, and that have none.
    """
    low_rank = adapter.low_rank
    return write_header(
        Header(
            base=adapter.base,
            provenance=adapter.provenance,
            spec=spec_difference(adapter.spec, None),
            task_type=adapter.task_type,
            no_bias=tuple(no_bias),
            scaling={
                path: low_rank[path].scaling
                for path, scaling in stored.items()
                if scaling != low_rank[path].scaling
                and math.isclose(scaling, low_rank[path].scaling, rel_tol=1e-12)
            },
        )
    )


def adapter_of(
    sites: Mapping[str, Site], metadata: Mapping[str, str], provenance: Mapping[str, Any]
) -> Adapter:
    """The adapter of a file.

    Args:
        sites: as read.
        metadata: of the file.
        provenance: for a file that another tool wrote.

    Raises:
        FormatError: our header is damaged, or a site is.
    """
    header = read_header(metadata)
    low_rank = {path: site for path, site in sites.items() if isinstance(site, LowRank)}
    if header is None:
        dora = any(site.magnitude is not None for site in low_rank.values())
        spec = LoRASpec(
            targets=names_of(low_rank) or "all-linear", variant="dora" if dora else "lora"
        )
        spec = fitting_spec(spec, low_rank)
        return Adapter(dict(sorted(sites.items())), spec, provenance=provenance)
    exact: dict[str, Site] = {
        path: replace(site, scaling=header.scaling[path])
        for path, site in low_rank.items()
        if math.isclose(header.scaling.get(path, math.nan), site.scaling, rel_tol=1e-12)
    }
    given = dict(sites) | exact
    for path in header.no_bias:
        site = given.get(path)
        if isinstance(site, LowRank) and site.bias is not None and not site.bias.any():
            given[path] = replace(site, bias=None)
    return Adapter(
        dict(sorted(given.items())),
        apply_difference(LoRASpec(), header.spec),
        base=header.base,
        provenance=header.provenance,
        task_type=header.task_type,
    )


def names_of(paths: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules' last names; of a list's member, the list's too (``to_out.0``)."""
    found = set()
    for path in paths:
        parent, _, name = path.rpartition(".")
        found.add(f"{parent.rpartition('.')[2]}.{name}" if name.isdigit() else name)
    return tuple(sorted(found))
