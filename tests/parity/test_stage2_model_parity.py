"""The joint model against the published one: evaluation, images, masked training and all four losses."""

import pytest
import torch

from pretrain.losses import (
    alignment_loss,
    contrastive_loss,
    hard_negatives,
    matching_loss,
    mlm_loss,
    similarity,
)
from pretrain.released.back import to_released


@pytest.fixture
def file(golden):
    return golden("stage2_model")


@pytest.fixture
def loaded(file):
    return file.loaded("stage2")


@pytest.fixture
def model(loaded):
    return loaded.model


@torch.no_grad()
def test_evaluation(file, model, errors):
    model.eval()
    encoder, frames = model.vision_encoder, file.config["num_frames"] // file.config["tubelet"]
    out = encoder(file["video"])
    pooled = encoder.pooled(out.tokens_BLD, frames, per_frame=True)
    hidden = model.text_encoder.encode(file["input_ids"], file["attention_mask"])
    score = similarity(model.embed_video(pooled), model.embed_text(hidden))
    errors.check("eval_tokens", out.patches, file["eval_tokens"])
    errors.check("eval_pooled", encoder.pooled(out.tokens_BLD), file["eval_pooled"])
    errors.check("eval_pooled_per_frame", pooled, file["eval_pooled_per_frame"])
    for pool in ("cls", "avg", "cls_cat_avg"):
        errors.check(f"pooled_{pool}", encoder.pooled(out.tokens_BLD, pool=pool), file[f"pooled_{pool}"])
    errors.check("text_tokens", hidden, file["text_tokens"])
    errors.check("sim_v2t", score, file["sim_v2t"])
    errors.check("sim_t2v", score.T, file["sim_t2v"])
    errors.check("match_logits", model.match_logits(hidden, file["attention_mask"], out.patches), file["match_logits"])


@torch.no_grad()
def test_images(file, model, errors, visible):
    model.eval()
    encoder, image = model.vision_encoder, file["video"][:, :, :1]
    whole, masked = encoder(image), encoder(image, visible(file["image_mask"]))
    errors.check("image_tokens", whole.patches, file["image_tokens"])
    errors.check("image_pooled", encoder.pooled(whole.tokens_BLD), file["image_pooled"])
    errors.check("image_masked_tokens", masked.patches, file["image_masked_tokens"])
    errors.check("image_masked_pooled", encoder.pooled(masked.tokens_BLD), file["image_masked_pooled"])
    errors.check("image_masked_student", encoder.align(masked), file["image_masked_student"])


@torch.no_grad()
def test_masked_training(file, model, errors, visible):
    model.train()  # dropout and drop path are 0 in the file
    encoder, words = model.vision_encoder, file["attention_mask"]
    seen = visible(file["mask"])
    out = encoder(file["video"], seen)
    pooled = encoder.pooled(out.tokens_BLD)
    student = encoder.align(out)
    errors.check("train_tokens", out.patches, file["train_tokens"])
    errors.check("train_pooled", pooled, file["train_pooled"])
    errors.check("student", student, file["student"])
    errors.check("loss_uta", alignment_loss(student, file["teacher_visible"]), file["loss_uta"])

    hidden = model.text_encoder.encode(file["input_ids"], words)
    video, text = model.embed_video(pooled), model.embed_text(hidden)
    for name, identity in (("loss_vtc", torch.tensor([0, 1])), ("loss_vtc_same_video", torch.tensor([3, 3]))):
        loss = contrastive_loss(video, text, video, text, model.temp, identity, identity)
        errors.check(name, loss, file[name])

    score = similarity(video, text) / model.temp
    identity, seeds = torch.tensor([0, 1]), torch.tensor([5, 6])
    hard_text, has_text = hard_negatives(score, identity, identity, seeds, "matching.text")
    hard_video, has_video = hard_negatives(score.T, identity, identity, seeds, "matching.video")
    total, count = matching_loss(
        model.match_logits(hidden, words, out.patches),
        model.match_logits(hidden, words, out.patches[hard_video]),
        model.match_logits(hidden[hard_text], words[hard_text], out.patches),
        has_video,
        has_text,
    )
    errors.check("loss_vtm", total / count, file["loss_vtm"])

    labels = file["mlm_labels"]
    asked = labels != -100
    total, count = mlm_loss(model.mlm_logits(file["mlm_input_ids"], words, out.patches, asked), labels[asked])
    errors.check("loss_mlm", total / count, file["loss_mlm"])


def test_every_parameter_learns_from_some_loss(file, model, visible):
    model.train()
    encoder, words = model.vision_encoder, file["attention_mask"]
    out = encoder(file["video"], visible(file["mask"]))
    hidden = model.text_encoder.encode(file["input_ids"], words)
    video, text = model.embed_video(encoder.pooled(out.tokens_BLD)), model.embed_text(hidden)
    identity = torch.tensor([0, 1])
    asked = file["mlm_labels"] != -100
    logits = model.mlm_logits(file["mlm_input_ids"], words, out.patches, asked)
    loss = alignment_loss(encoder.align(out), file["teacher_visible"])
    loss = loss + contrastive_loss(video, text, video, text, model.temp, identity, identity)
    loss = loss + matching_loss(*[model.match_logits(hidden, words, out.patches)] * 3)[0]
    loss = loss + mlm_loss(logits, file["mlm_labels"][asked])[0]
    loss.backward()
    # The key's bias moves every score of a row alike, which softmax does not see.
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert not silent


def test_the_released_state_dict_goes_there_and_back(file, loaded):
    back, theirs = to_released(loaded.model.state_dict(), loaded.meta)[0], file.under("weight.")
    assert back.keys() == theirs.keys()
    assert all(back[name].shape == value.shape and back[name].equal(value) for name, value in theirs.items())
