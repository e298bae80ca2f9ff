"""One file per command: parse, call, print.

What several commands share: ``flags`` (numbers, lists of names), ``bases``, ``adapters`` and
``rows`` (``--base``, ``--adapter`` and ``--data``, and what becomes of them), ``output``.
"""
