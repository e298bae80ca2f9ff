"""The loop: forwards and backwards of the runs on one model, and their evaluations.

Runs go through the model in rounds, and in a round every run makes one optimizer step::

    windows = each job's next examples, its share of them where there are several processes
    forwards of the examples of all runs    # each example's loss / its own window's tokens
    for each run:
        sum over all processes              # of the gradient, where there are several
        loss and gradient finite?           # before anything moves
        run.step(…)                         # clip, optimizer, count, row

A run alone is a round of one. Several runs put their examples behind one another, run by run, into
forwards of a common number of tokens, and the routing tells which adapter each stretch uses. As no
stretch reaches another's loss or gradient, each run's step is that which it would make alone, up to
the rounding of the products. Between two rounds no run is in the middle of a batch: there runs
join, leave, and are saved.

Every run makes a step a round, whatever its batch: runs that are compared are at the same step,
each goes at the pace that its settings say, and what a round is made of depends on the runs alone,
so that a set of runs that was saved together goes on bit for bit.

Between two forwards the loop looks whether somebody asked to stop.

Read ``rounds`` first, then ``forwards``, which says what a forward is of and makes smaller ones
where the memory has no room; ``trial`` finds that out before the first step, ``validation``
evaluates, ``members`` knows who takes part, and ``stopping`` who wants to stop.
"""

from lorakit.train.loop.forwards import check_first_forward
from lorakit.train.loop.rounds import Loop
from lorakit.train.loop.stopping import Stopped

__all__ = ["Loop", "Stopped", "check_first_forward"]
