"""Upload an adapter to the Hugging Face hub.

The adapter is read and checked first; its config, weights, card and tokenizer files are uploaded
and nothing else. Log in once with `hf auth login`, or set HF_TOKEN.

examples:
  lorakit push runs/mine owner/name
  lorakit push runs/mine owner/name --private --revision v2
"""

from __future__ import annotations

import argparse

from lorakit.cli.adapters import adapter_path
from lorakit.cli.output import add_json_argument, emit_json, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a run, an adapter folder or a file")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="where to; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="a branch, made if it is not there (default: main)")
    parser.add_argument("--message", help="message of the commit")
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Upload; prints the page's address."""
    from lorakit.formats import push_adapter

    url = push_adapter(
        adapter_path(options.adapter),
        options.repo_id,
        private=options.private,
        revision=options.revision,
        message=options.message,
    )
    if options.json:
        emit_json({"url": url, "repo_id": options.repo_id, "revision": options.revision})
    else:
        say(f"{options.adapter} is uploaded.")
        print(url)
    return 0
