"""Published checkpoints in and out: the one place that knows where their names and shapes differ from ours.

names.py   the four layouts and how their names differ
sizes.py   a model's sizes, from the shapes alone
fit.py     a published state dict made into the weights of one of our models, strictly
folder.py  that as a checkpoint folder, for `videomamba import-released`
back.py    our checkpoints in the published layouts, for `videomamba checkpoint convert`

docs/released.md says which published files are meant and what to expect of them.
"""
