"""The parts of a search for settings (:mod:`lorakit.workflows.tune`)."""
