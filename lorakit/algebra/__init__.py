"""Adapter → Adapter, on values alone: no model is needed.

``combine`` adds adapters, exactly or by a published merging method; ``compress`` makes one smaller
and says by how much it changed. In order of reading: ``stack`` (the exact sum of one site),
``arithmetic`` (of whole adapters), ``svd`` and ``budget`` (what ``compress`` joins), then one file
a merging method: ``ties``, ``dare``, ``prune``.
"""
