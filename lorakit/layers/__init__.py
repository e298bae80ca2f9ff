"""Adapters on a model: ``attach``, the routing, and the handle.

Read in this order: ``routing`` (which rows use what), ``forwards`` (when it is captured), ``site``
(what an adapted module computes), ``handle`` (what a user holds), then ``targets`` and ``kinds``.
"""

from lorakit.layers.dropout import token_keys
from lorakit.layers.handle import Handle, attach, handle_of
from lorakit.layers.merge import Undo, merge
from lorakit.layers.routing import Routing

__all__ = ["Handle", "Routing", "Undo", "attach", "handle_of", "merge", "token_keys"]
