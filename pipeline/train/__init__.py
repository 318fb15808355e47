"""The training loop: `step` is the four lines, `reduce` the sums over workers, `worker` the run."""
