"""Runs on Kubernetes: a RayJob's manifests from a job spec, and rules that they keep."""
