"""The models, their kernels and losses, and the one trainer that serves both pretraining stages."""
