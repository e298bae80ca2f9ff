"""What would be trained on, of another task than causal."""

from __future__ import annotations

import argparse
import sys

from lorakit.cli.output import emit_json, printable_stdout
from lorakit.cli.tasks.choosing import OF_CAUSAL, kind_for, refuse, row_spec


def preview(options: argparse.Namespace, task: str, why: str) -> int:
    """Show what would be trained on, of a task other than causal; the base's weights are loaded
    on the processor, for its sizes and what it reads its input with."""
    import dataclasses

    refuse(options, task, dict.fromkeys(OF_CAUSAL, "it is about texts that are continued"))
    asked = row_spec(options)
    kind = kind_for(options, task, asked)
    base = kind.load_base(
        ref=options.base,
        device="cpu",
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    data = kind.load_data(dataclasses.replace(asked, bad_rows="skip"), base)
    stops = asked.bad_rows == "error" and data.report.num_dropped > 0
    shown = [
        {
            "where": data.where(i),
            "size": data[i].size,
            "asked": str(kind.asked(data, i)),
            "expected": kind.expected(data, i),
        }
        for i in range(min(options.rows, len(data)))
    ]
    if options.json:
        emit_json(
            {
                "base": options.base,
                "task": task,
                "report": data.report.to_dict(),
                "digest": data.digest,
                "training_would_stop": stops,
                "examples": shown,
            }
        )
        return 0
    printable_stdout()
    lines = [f"Task: {task} ({why})", *data.report.lines()]
    if stops:
        lines.append(
            f"Training would stop at these {data.report.num_dropped:,} rows; with --bad-rows skip "
            "it leaves them out."
        )
    for one in shown:
        lines += ["", f"{one['where']}: {one['size']:,} {kind.unit}"]
        lines += [f"  asked:    {one['asked']}", f"  expected: {one['expected']}"]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
