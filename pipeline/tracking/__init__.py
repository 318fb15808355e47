"""MLflow: a run's record on its way there, and the model that is loaded from it."""
