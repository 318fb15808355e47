"""Data on its way to the step: files (source), tensors (columns), rows (order), batches (feed)."""
