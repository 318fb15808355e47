"""Sums over workers: what is computed where, in which order, and what travels."""
