"""One file per command: parse, call, print.

At the top of each only the standard library and one another are imported, so that ``--help`` is
instant.

What several commands share: ``flags`` (numbers, lists of names), ``bases``, ``adapters`` and
``rows`` (``--base``, ``--adapter`` and ``--data``, and what becomes of them), ``output``.
"""
