"""Objectives (sums, never means) and penalties."""

__all__: list[str] = []
