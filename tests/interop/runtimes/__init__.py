"""Our adapter files in the programs that are to read them; `make interop` runs all of it.

Each runtime lives in an environment of its own, because no two of them agree on their needs. For
the runtime NAME there are up to three scripts, run one after another, each with the work folder as
its only argument:

``prepare_NAME.py``
    runs in our own environment and puts what the runtime shall read into ``WORK/NAME/``;
``check_NAME.py``
    runs in the runtime's environment, so it may import that runtime, numpy, the standard library
    and ``cases`` from this folder. Comments at its head name what to install::

        # requires: xllamacpp==2026.10.11549
        # without: torchvision          (uninstalled afterwards)
        # build: CMAKE_ARGS=-DX=OFF     (a variable set while installing)

``read_NAME.py``
    runs in our own environment again, and reads what the runtime wrote into ``WORK/NAME/``.

Checks that require the same share an environment. What every check starts from is made by
``prepare``: ``WORK/base`` (a float32 folder of transformers), ``WORK/base.gguf`` (its weights),
``WORK/prompt.json``, ``WORK/adapters/CASE`` (PEFT folders) and ``WORK/expected/CASE.npy`` (logits
[T, V] of transformers and PEFT). Scripts report through ``cases``, which prints one JSON line for
each case; a negative is a case that must be far off, and proves that the check can fail.
"""
