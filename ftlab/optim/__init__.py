"""AdamW with its parameter groups, and learning-rate schedules."""

__all__: list[str] = []
