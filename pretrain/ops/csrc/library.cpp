// The CPU kernels behind the operators of pretrain/ops/operators.py, where their schemas are.
//
// Free of Python.h: the library is compiled with torch's own headers and loaded by torch.ops.load_library.
#include <torch/library.h>

#include "conv_operators.h"
#include "scan_operators.h"

TORCH_LIBRARY_IMPL(videomamba, CPU, m) {
  m.impl("scan_forward", videomamba::scan_forward_cpu);
  m.impl("scan_backward", videomamba::scan_backward_cpu);
  m.impl("bidirectional_scan_forward", videomamba::bidirectional_scan_forward_cpu);
  m.impl("bidirectional_scan_backward", videomamba::bidirectional_scan_backward_cpu);
  m.impl("conv_forward", videomamba::conv_forward_cpu);
  m.impl("conv_backward", videomamba::conv_backward_cpu);
  m.impl("bidirectional_conv_forward", videomamba::bidirectional_conv_forward_cpu);
  m.impl("bidirectional_conv_backward", videomamba::bidirectional_conv_backward_cpu);
}
