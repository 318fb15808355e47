"""MLflow: the journal's way into it (`deliver`) and the model that is served (`model`, `served`)."""
