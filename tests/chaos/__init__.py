"""Kill it anywhere, damage anything: what a run leaves is the same as if nothing had happened."""
