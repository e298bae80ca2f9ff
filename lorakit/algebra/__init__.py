"""Adapter → Adapter, on values alone: no model is needed."""
