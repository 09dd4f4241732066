"""Media and captions become WebDataset shards, and shards become batches, the same ones on any number of ranks."""
