"""Doors to other frameworks; each module needs its framework and is imported on demand."""
