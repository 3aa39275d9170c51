"""From prompts and seeds to pictures."""
