"""Every figure of the documents, to be measured again: `python -m tests.benchmarks`."""
