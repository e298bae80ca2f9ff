"""Contestants: each prepares the same task and takes its steps as its users would."""
