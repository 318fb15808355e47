"""Files that outlive a power cut, and that say when they are damaged."""
