"""Merging into files, in memory and into one quantised GGUF, and what checks what came out."""
