"""From texts to token rows."""
