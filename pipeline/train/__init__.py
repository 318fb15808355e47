"""Training: `step` is one step, `loop` the loop over batches, `state` what they change."""
