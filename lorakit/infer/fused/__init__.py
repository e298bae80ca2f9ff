"""Decoder layers of the Llama kind, whole, with a backward written by hand.

``linear`` is one frozen linear with its adapters, ``norm`` and ``rope`` the small parts,
``family`` finds out what a layer is made of, ``layer`` puts them together, and ``running`` lets a
model use it for a forward. What does not fit runs as it is, and the reason is said.
"""
