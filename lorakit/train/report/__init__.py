"""``write_report``: one run folder as one page that needs nothing else.

No network, no script, no fonts: markup, one style sheet and inline SVG, light or dark as the
reader's system is. Every text from outside is escaped by ``markup``; a part that the folder does
not hold is left out, and the page says so at its end. ``train.record`` reads the folder, ``page``
puts the parts together, ``charts`` draws.
"""

from lorakit.train.report.page import write_report

__all__ = ["write_report"]
