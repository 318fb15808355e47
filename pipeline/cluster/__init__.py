"""Jobs on a Ray cluster, through its dashboard: what is sent there, and what becomes of it."""
