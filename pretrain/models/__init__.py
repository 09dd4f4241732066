"""The models: the VideoMamba encoder, the text tower, the two joined, and the frozen teacher."""
