CHECK = """
import sys
from data_pipeline.torchvision_shim import ensure_torchvision
assert "torch" not in sys.modules, "the shim itself must cost nothing"
assert ensure_torchvision() and ensure_torchvision()
import torchvision, open_clip, timm
from transformers import BertModel
from torchvision.transforms import v2
import torch
print(v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape)
"""


def test_what_needs_torchvision_imports_in_a_fresh_process(python):
    ran = python("-c", CHECK, timeout=110)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "[3, 4, 4]" in ran.stdout


IMPORT = "from data_pipeline.torchvision_shim import ensure_torchvision\n"


def test_an_absent_torchvision_is_false_and_a_broken_one_is_told(tmp_path, python):
    absent = python("-c", "import sys; sys.modules['torchvision'] = None\n" + IMPORT + "print(ensure_torchvision())")
    assert absent.stdout.strip() == "False", absent.stderr
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    broken = python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + IMPORT + "ensure_torchvision()")
    assert "RuntimeError: something else" in broken.stderr
