"""What a run costs, said before it starts and measured while it runs: arithmetic, memory, bytes on the network."""
