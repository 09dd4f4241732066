"""The supervised model against the published one: cls feature, logits, loss and every gradient."""

from torch.nn import functional as F

from pretrain.released.back import to_released
from pretrain.released.names import to_ours


def test_classifier(golden, errors):
    file = golden("classifier")
    model = file.loaded("classifier").model
    output = model(file["video"])
    logits = model.classify(output.tokens_BLD)
    loss = F.cross_entropy(logits, file["labels"])
    loss.backward()
    errors.check("features", output.tokens_BLD[:, 0], file["features"])
    errors.check("logits", logits, file["logits"])
    errors.check("loss", loss, file["loss"])
    errors.gradients(model, to_ours(file.under("grad."), "video"))


def test_our_names_go_back_to_the_released_ones(golden):
    file = golden("classifier")
    loaded = file.loaded("classifier")
    back, theirs = to_released(loaded.model.state_dict(), loaded.meta)[0], file.under("weight.")
    assert back.keys() == theirs.keys()
    assert all(back[name].equal(value) for name, value in theirs.items())
