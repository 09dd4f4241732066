"""One bidirectional mixer against the published one: output and every gradient."""

from pretrain.models.mixer import Mixer


def test_mixer(golden, errors):
    file = golden("mixer")
    mixer = Mixer(file.vision())
    mixer.load_state_dict(file.under("weight."))
    tokens = file["input"].clone().requires_grad_()
    output = mixer(tokens)
    output.backward(file["dy"])
    errors.check("output", output, file["output"])
    errors.check("grad_input", tokens.grad, file["grad_input"], 2e-5)
    errors.gradients(mixer, file.under("grad."))
