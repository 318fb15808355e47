"""MLflow: the journal's way into it (`deliver`), and the served model (`model`, `served`)."""
