"""Loss, greedy generation, metrics and their intervals."""
