"""What training costs its machines: where a step's time goes, FLOPs, the load of each node."""
