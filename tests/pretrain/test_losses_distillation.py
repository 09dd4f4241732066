"""Self-distillation against the loop that its docstring writes, through its head and a real pair of encoders."""

import pytest
import torch

from pretrain.losses import distillation_loss, distilled_classification_loss
from pretrain.models.config import VisionConfig
from pretrain.models.distill import DistillHead
from pretrain.models.videomamba import VideoMamba

B, L, D, C = 2, 5, 12, 6


def loop(tokens, teacher, head):
    total = 0.0
    for b in range(B):
        for t in range(L):
            x = tokens[b, t]
            normed = x / (x.square().mean() + 1e-5).sqrt() * head[0].weight
            s = head[1].weight @ normed + head[1].bias
            total += 2 - 2 * (s / s.norm()) @ (teacher[b, t] / teacher[b, t].norm())
    return total / (B * L)


@pytest.fixture
def head():
    torch.manual_seed(0)
    head = DistillHead(D, C)
    assert list(head.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn_like(parameter)
    return head


def test_distillation(head):
    tokens, teacher = torch.randn(B, L, D, requires_grad=True), torch.randn(B, L, C, requires_grad=True)
    loss = distillation_loss(head(tokens), teacher)
    expected = loop(tokens, teacher, head)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(x, [tokens, *head.parameters()], retain_graph=True) for x in (loss, expected))
    for mine, naive in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert teacher.grad is None
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(torch.randn(1, 2, 3), torch.randn(1, 2, 4))


@pytest.mark.parametrize("soft", [False, True])
def test_beside_the_classification(head, soft):
    logits, tokens, teacher = torch.randn(B, 4), torch.randn(B, L, D), torch.randn(B, L, C)
    classes = torch.tensor([3, 1])
    shares = torch.eye(4)[classes] * 0.7 + torch.eye(4)[[0, 2]] * 0.3 if soft else torch.eye(4)[classes]
    expected = -sum(float(share @ row.log_softmax(0)) for share, row in zip(shares, logits, strict=True)) / B
    expected += 0.5 * float(loop(tokens, teacher, head).detach())
    loss = distilled_classification_loss(logits, shares if soft else classes, head(tokens), teacher, weight=0.5)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_student_comes_nearer_to_its_teacher():
    torch.manual_seed(0)
    sizes = {"depth": 1, "patch_size": 8, "frames": 2, "image_size": 16}
    teacher = VideoMamba(VisionConfig(width=16, **sizes)).eval().requires_grad_(False)
    student, head = VideoMamba(VisionConfig(width=32, **sizes)), DistillHead(32, 16)
    video = torch.randn(2, 3, 2, 16, 16)
    target = teacher(video).tokens_BLD
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = distillation_loss(head(student(video).tokens_BLD), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in student.norm.parameters())
