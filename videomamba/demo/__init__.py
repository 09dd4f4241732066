"""The demo: the whole pipeline once, small and real, each step a public command."""
