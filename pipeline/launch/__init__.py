"""From a checked job spec to a finished run: `run` does it all, `cluster` talks to Ray."""
