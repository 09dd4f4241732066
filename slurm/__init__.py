"""Runs on a cluster: empty so far, comes with the Slurm issue; it will know `configs` and no model."""
