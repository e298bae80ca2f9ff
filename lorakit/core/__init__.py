"""Values and pure maths: what an adapter is, without any model in memory.

Read in this order: ``sites`` (one adapted weight), ``adapter`` (all of them), ``spec`` (the
settings that made them), ``identity`` (the base they belong to).
"""
