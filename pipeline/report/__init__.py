"""A run in pictures and tables, made from its folder alone: for its MLflow page, and to mail."""
