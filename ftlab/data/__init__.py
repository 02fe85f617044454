"""From files to batches: sources, records, chat templates, tokens, packing, loading."""
