"""The masked student of stage 1 against the published one: features, loss and every parameter's gradient."""

import torch
from torch.nn import functional as F

from pretrain.losses import alignment_loss


def test_stage1_encoder(golden, errors, visible):
    file = golden("stage1_encoder")
    model = file.loaded("stage1").model
    model.train()
    student = model.align(model(file["video"], visible(file["mask"])))
    loss = alignment_loss(student, file["target"])
    loss.backward()
    errors.check("student", F.normalize(student, dim=-1), file["student"])
    errors.check("loss", loss, file["loss"])
    errors.gradients(model, file.under("grad."))


def test_the_last_layer_learns_where_alignment_takes_the_output(golden, visible):
    file = golden("stage1_encoder")
    model = file.loaded("stage1", align_source="output").model
    alignment_loss(model.align(model(file["video"], visible(file["mask"]))), file["target"]).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not torch.any(p.grad)]
    assert not silent
