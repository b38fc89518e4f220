"""Everything that knows transformers: finding blocks, replaying them, their wiring, checkpoints."""
