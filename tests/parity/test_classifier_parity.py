"""The supervised model against the published one: cls feature, logits, loss and every gradient."""

from torch.nn import functional as F

from pretrain.models.videomamba import VideoMamba
from pretrain.released import from_released, to_released


def test_classifier(golden, errors):
    file = golden("classifier")
    model = VideoMamba(file.vision(classes=file.config["num_classes"]))
    model.load_state_dict(from_released(file.under("weight.")))
    output = model(file["video"])
    logits = model.classify(output.tokens_BLD)
    loss = F.cross_entropy(logits, file["labels"])
    loss.backward()
    errors.check("features", output.tokens_BLD[:, 0], file["features"])
    errors.check("logits", logits, file["logits"])
    errors.check("loss", loss, file["loss"])
    errors.gradients(model, from_released(file.under("grad.")))


def test_our_names_go_back_to_the_released_ones(golden):
    file = golden("classifier")
    model = VideoMamba(file.vision(classes=file.config["num_classes"]))
    model.load_state_dict(from_released(file.under("weight.")))
    back, theirs = to_released(model.state_dict(), supervised=True), file.under("weight.")
    assert back.keys() == theirs.keys()
    assert all(back[name].equal(value) for name, value in theirs.items())
