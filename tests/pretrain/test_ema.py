"""The average of the weights: what it is, that it goes on exactly, and that it becomes a checkpoint of its own."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from pretrain import checkpoint, trainer
from pretrain.averaged import write_average
from pretrain.ema import Ema


def test_it_is_the_weights_of_all_steps_each_counting_less():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = Ema([("p", parameter)], decay=0.75)
    expected = parameter.detach().clone()
    for step in range(5):
        with torch.no_grad():
            parameter.add_(torch.tensor([1.0, -step]))
        average.update()
        expected = 0.75 * expected + 0.25 * parameter.detach()
    torch.testing.assert_close(average.state_dict(), {"p": expected})
    again = Ema([("p", parameter)], decay=0.75)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.state_dict()["p"], average.state_dict()["p"])
    with pytest.raises(KeyError):
        again.load_state_dict({})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_run_that_goes_on_has_the_average_of_one_that_did_not_stop(runs, stage1_tree, zero):
    tree = copy.deepcopy(stage1_tree) | {"precision": "fp32", "steps": 4, "checkpoint": {"every_steps": 2, "keep": 3}}
    tree |= {"deepspeed": zero}
    tree["optim"]["ema_decay"] = 0.5
    assert trainer.train(runs.config(tree, "run")) == 0
    folder = runs.folder / "run"
    last = folder / "checkpoints" / "step-0000004"
    straight = load_file(last / "ema.safetensors")
    weights = load_file(last / "model.safetensors")
    assert any(not torch.equal(straight[name], weights[name]) for name in straight)
    (folder / "done.json").unlink()
    (last / "meta.json").write_text("{")
    assert trainer.train(runs.config(tree, "run")) == 0
    again = load_file(last / "ema.safetensors")
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)

    made = write_average(folder, runs.folder / "average")
    model, _, _ = checkpoint.load_model(made)
    assert all(torch.equal(tensor, straight[name]) for name, tensor in model.named_parameters())
    assert not list(made.glob("optimizer-*"))
    with pytest.raises(UserError, match="is not empty"):
        write_average(folder, made)
    with pytest.raises(UserError, match="no average of the weights"):
        write_average(made, runs.folder / "other")
