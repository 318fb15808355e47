"""Data on its way to the step: files (source), columns, which rows (sampler), batches (loader)."""
