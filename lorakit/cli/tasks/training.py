"""Training on another task than causal: its trainer, of the flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.bases import load_base_from
from lorakit.cli.output import say
from lorakit.cli.tasks.choosing import OF_CAUSAL, kind_for, refuse, row_spec
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.train import Trainer
    from lorakit.train.distributed import World


def trainer_for(
    options: argparse.Namespace, task: str, why: str, world: World, callbacks: Sequence[Any]
) -> Trainer:
    """A trainer as these flags say, of a task other than causal."""
    from lorakit.cli import train
    from lorakit.core.spec import LoRASpec
    from lorakit.train import Origin, Trainer

    refuse(
        options,
        task,
        {
            **dict.fromkeys(OF_CAUSAL, "it is about texts that are continued"),
            "shard": "the base of this task is not spread over processes",
            "prefix": "a prefix stands in front of a text that is continued",
        },
    )
    if options.init in ("eva", "lora-ga"):
        raise SpecError(
            f"--init {options.init}: it looks at the texts of causal language models; leave it out"
        )
    tell: Callable[[str], None] = (lambda text: None) if options.quiet else say
    tell(f"Task: {task} ({why})")
    settings, what = train.settings_of(options), train.what_of(options)
    spec = row_spec(options)
    start = None if options.start is None else train.started_from(options)
    kind = kind_for(options, task, spec, None if start is None else {options.start: start})
    base = load_base_from(options, load=kind.load_base, quiet=options.quiet)
    if start is not None:
        kind.check_start(start, base)
    valid = None if options.valid is None else row_spec(options, options.valid)
    origin = Origin(base=train.base_options(options), data=spec, validation=valid, kind=kind)
    data, validation = origin.load_data(base), origin.load_validation(base)
    for found in filter(None, (data, validation)):
        for line in found.report.lines():
            tell(line)
    if start is None and isinstance(what, LoRASpec):
        what, notes = kind.adapter_spec(what, base)
        for note in notes:
            tell(f"note: {note}")
    return Trainer(
        base,
        what if start is None else start,
        data,
        settings,
        options.out,
        validation=validation,
        callbacks=callbacks,
        origin=origin,
        extra={"callbacks": {"report_to": options.report_to}} if options.report_to else None,
        allow_other_base=options.allow_other_base,
        world=world,
        task=kind,
    )
