"""Runs a command on a Slurm cluster; knows `configs` and no model: what it starts, it starts by command line.

cluster.py (what a site is) + job.py (what is to run) -> render.py (one sbatch script, its body in job.sh)
-> submit.py (hands it to sbatch, keeps a record in the run folder) -> status.py (looks, cancels).
"""
