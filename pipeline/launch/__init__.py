"""From a checked job spec to a finished run: `run` does it all, `ray_trainer` talks to Ray."""
