"""Where an adapter begins: pure functions of a weight and of statistics of data.

=========== ============================== ================================= =======
init        A                              B                                 moves W
=========== ============================== ================================= =======
``pissa``   √(Σ/s) Vᵀ, W's leading         U √(Σ/s)                          yes
``olora``   first r rows of W's R          first r columns of W's Q          yes
``eva``     inputs' leading directions     0                                 no
``lora-ga`` gradient's leading right ones  gradient's next left ones         yes
``loftq``   √(Σ/s) Vᵀ of W − Q             U √(Σ/s) of W − Q                 no
=========== ============================== ================================= =======

*Moves W*: the papers put ``W − s·B A`` in the place of W, so that the first forward is the base's.
Here no base changes; whoever trains the factors subtracts ``s·B A`` as it was at the beginning.

Legend: W [d_out, n] with its outputs in rows, s the factor on B·A, r rank; A [r, n], B [d_out, r].
"""

from __future__ import annotations

from lorakit.inits.directions import InputDirections
from lorakit.inits.eva import eva, redistributed
from lorakit.inits.factors import Factors
from lorakit.inits.loftq import loftq
from lorakit.inits.lora_ga import lora_ga
from lorakit.inits.olora import olora
from lorakit.inits.pissa import pissa

__all__ = [
    "Factors",
    "InputDirections",
    "eva",
    "loftq",
    "lora_ga",
    "olora",
    "pissa",
    "redistributed",
]
