"""Several commands as a chain, here or on a cluster.

config.py (what a pipeline file says) + names.py (its references) -> chain.py (everything filled in, faults said)
-> plan.py (what is not done yet) -> runner.py with process.py here, submit.py on a cluster; folder.py remembers.
"""
