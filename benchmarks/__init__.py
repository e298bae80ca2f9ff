"""Benchmarks: contestants take turns on one machine, and ratios are reported.

``python -m benchmarks train`` runs one; ``make bench`` runs all that this machine can.
"""
