"""The selective scan as Triton kernels: one program walks one sample's positions for one block of channels.

Letters: B samples, L positions, D channels, N state; of a program's own tiles, D is BLOCK channels and N is PADDED
states, a power of two.

The state of a block stays in registers, float32 whatever the inputs are. The forward pass stores the state before
every chunk of CHUNK positions but the first. The backward pass takes the chunks from the last to the first and
recomputes their states twice: once to have the state before every group of GROUP positions, once inside a group, so
that CHUNK / GROUP + GROUP states are held at a time and none is written out. Nothing is added atomically: every
program writes its own sums, which the launcher adds up in a fixed order.

Only what Triton's interpreter and its compiler both take is used here. The interpreter computes bfloat16 wrongly, so
everything is cast to float32 as soon as it is loaded. Tuples keep the lists of arguments short:

    rows     (pointer to a sample, stride between positions)            channels adjacent
    coefs    (pointer to a sample, stride between positions, stride between states)
    walk     (length, channels d, which of them exist, states n, which of them exist)
    sources  (rows of u, rows of delta, coefs of B, bias, A log2 e)     what a step of the recurrence reads
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), exact to rounding at both ends."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def softplus(x):
    """log(1 + e^x); NaN stays NaN, and small values of e^x are not lost beside the one (Kahan's correction)."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    log = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.where(x > 0, x, 0.0) + log


@triton.jit
def position_of(step, length, REVERSE: tl.constexpr):
    """Where the walk is in its `step`, in 64 bits, because it is multiplied by a stride."""
    return ((length - 1 - step) if REVERSE else (step + 0 * length)).to(tl.int64)


@triton.jit
def load_row(rows, step, walk, REVERSE: tl.constexpr):
    """The channels of the position met in `step`, float32; zeros past the last step."""
    at = rows[0] + position_of(step, walk[0], REVERSE) * rows[1] + walk[1]
    return tl.load(at, mask=walk[2] & (step < walk[0]), other=0.0).to(tl.float32)


@triton.jit
def store_row(rows, step, walk, values, REVERSE: tl.constexpr):
    """Write the channels of the position met in `step`; nothing past the last step."""
    at = rows[0] + position_of(step, walk[0], REVERSE) * rows[1] + walk[1]
    tl.store(at, values, mask=walk[2] & (step < walk[0]))


@triton.jit
def load_coefs(coefs, step, walk, REVERSE: tl.constexpr):
    """B or C of the position met in `step`, float32; zeros past the last step."""
    at = coefs[0] + position_of(step, walk[0], REVERSE) * coefs[1] + walk[3] * coefs[2]
    return tl.load(at, mask=walk[4] & (step < walk[0]), other=0.0).to(tl.float32)


@triton.jit
def store_coefs(coefs, step, walk, values, REVERSE: tl.constexpr):
    """Write a value for each state of the position met in `step`; nothing past the last step."""
    at = coefs[0] + position_of(step, walk[0], REVERSE) * coefs[1] + walk[3] * coefs[2]
    tl.store(at, values, mask=walk[4] & (step < walk[0]))


@triton.jit
def load_sizes(delta, bias_D, step, walk, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr):
    """Delta plus its bias, before and after softplus; after it 0 past the last step, which keeps the state."""
    raw_D = load_row(delta, step, walk, REVERSE) + bias_D
    return raw_D, tl.where(step < walk[0], softplus(raw_D) if SOFTPLUS else raw_D, 0.0)


@triton.jit
def load_vector(vector, walk):
    """A value for each channel in float32, or zeros where there is no such vector."""
    if vector is None:
        values = tl.zeros(walk[1].shape, tl.float32)
    else:
        values = tl.load(vector + walk[1], mask=walk[2], other=0.0).to(tl.float32)
    return values


@triton.jit
def place(length, channels, STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, block and walk of this program. The grid has one dimension, because the others end at 65,535."""
    blocks = tl.cdiv(channels, BLOCK)
    block = tl.program_id(0) % blocks
    d = block * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, PADDED)
    return (tl.program_id(0) // blocks).to(tl.int64), block.to(tl.int64), (length, d, d < channels, n, n < STATES)


@triton.jit
def advance(state_DN, step, sources, walk, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr):
    """h = 2^(delta A log2 e) h + delta u B: the state after `step`, and that step's u."""
    rows_u, rows_delta, coefs_B, bias_D, decay_DN = sources
    u_D = load_row(rows_u, step, walk, REVERSE)
    size_D = load_sizes(rows_delta, bias_D, step, walk, SOFTPLUS, REVERSE)[1]
    drive_DN = (size_D * u_D)[:, None] * load_coefs(coefs_B, step, walk, REVERSE)[None, :]
    return tl.exp2(size_D[:, None] * decay_DN) * state_DN + drive_DN, u_D


@triton.jit(do_not_specialize=["length"])
def scan_forward_kernel(
    u, delta, A, B, C, D, z, bias,
    y, last_state, states,
    length, channels,
    u_sample, u_row, delta_sample, delta_row, z_sample, z_row, B_sample, B_row, B_state, C_sample, C_row, C_state,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """y (B, L, D); last_state (B, D, N) and states (B, chunks - 1, N, D) unless None. Outputs are dense.

    A is float32 and dense, D and bias too or None; z may be None.
    """
    sample, _, walk = place(length, channels, STATES, PADDED, BLOCK)
    d, n = walk[1][:, None], walk[3][None, :]
    in_tile = walk[2][:, None] & walk[4][None, :]
    decay_DN = tl.load(A + d * STATES + n, mask=in_tile, other=0.0) * LOG2_E
    skip_D, bias_D = load_vector(D, walk), load_vector(bias, walk)
    rows_u, rows_delta = (u + sample * u_sample, u_row), (delta + sample * delta_sample, delta_row)
    coefs_B, coefs_C = (B + sample * B_sample, B_row, B_state), (C + sample * C_sample, C_row, C_state)
    sources = (rows_u, rows_delta, coefs_B, bias_D, decay_DN)
    rows_y = (y + sample * length * channels, channels)
    state_DN = tl.zeros([BLOCK, PADDED], tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for chunk in range(chunks):
        if states is not None:
            stored = states + (sample * (chunks - 1) + chunk - 1) * STATES * channels
            tl.store(stored + n * channels + d, state_DN, mask=in_tile & (chunk > 0))
        for step in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)):
            state_DN, u_D = advance(state_DN, step, sources, walk, SOFTPLUS, REVERSE)
            y_D = tl.sum(state_DN * load_coefs(coefs_C, step, walk, REVERSE)[None, :], 1) + skip_D * u_D
            if z is not None:
                z_D = load_row((z + sample * z_sample, z_row), step, walk, REVERSE)
                y_D *= z_D * sigmoid(z_D)
            store_row(rows_y, step, walk, y_D, REVERSE)
    if last_state is not None:
        tl.store(last_state + (sample * channels + d) * STATES + n, state_DN, mask=in_tile)


@triton.jit
def ungate(grad_D, u_D, state_DN, C_N, skip_D, gate, step, walk, REVERSE: tl.constexpr):
    """Write the gradient of z, and return that of y before the gate; `gate` is the rows of z and of its gradient."""
    z_D = load_row(gate[0], step, walk, REVERSE)
    open_D = sigmoid(z_D)
    y_D = tl.sum(state_DN * C_N[None, :], 1) + skip_D * u_D
    store_row(gate[1], step, walk, grad_D * y_D * open_D * (1.0 + z_D * (1.0 - open_D)), REVERSE)
    return grad_D * z_D * open_D


@triton.jit
def retreat(
    carry_DN, sums, before_DN, after_DN, step, sources, outside, gate, outputs, walk, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """One step backwards: from the gradient of the state after `step` to that of the state before it.

    `outside` is the gradient of y, C and D; `gate` z and where its gradient goes, or None; `outputs` where those of u,
    delta, B and C go. `sums` gathers those of A, D and the bias.
    """
    rows_u, rows_delta, coefs_B, bias_D, decay_DN = sources
    rows_grad_y, coefs_C, skip_D = outside
    rows_grad_u, rows_grad_delta, grad_B, grad_C = outputs
    grad_A_DN, grad_D_D, grad_bias_D = sums
    u_D = load_row(rows_u, step, walk, REVERSE)
    raw_D, size_D = load_sizes(rows_delta, bias_D, step, walk, SOFTPLUS, REVERSE)
    C_N = load_coefs(coefs_C, step, walk, REVERSE)
    grad_y_D = load_row(rows_grad_y, step, walk, REVERSE)
    if gate is not None:
        grad_y_D = ungate(grad_y_D, u_D, after_DN, C_N, skip_D, gate, step, walk, REVERSE)
    store_coefs(grad_C, step, walk, tl.sum(grad_y_D[:, None] * after_DN, 0), REVERSE)
    carry_DN += grad_y_D[:, None] * C_N[None, :]
    store_coefs(grad_B, step, walk, tl.sum((size_D * u_D)[:, None] * carry_DN, 0), REVERSE)
    through_B_D = tl.sum(carry_DN * load_coefs(coefs_B, step, walk, REVERSE)[None, :], 1)
    carry_DN *= tl.exp2(size_D[:, None] * decay_DN)
    kept_DN = carry_DN * before_DN
    grad_raw_D = u_D * through_B_D + tl.sum(kept_DN * decay_DN, 1) * LN_2
    if SOFTPLUS:
        grad_raw_D *= sigmoid(raw_D)
    store_row(rows_grad_u, step, walk, size_D * through_B_D + skip_D * grad_y_D, REVERSE)
    store_row(rows_grad_delta, step, walk, grad_raw_D, REVERSE)
    grad_raw_D = tl.where(step < walk[0], grad_raw_D, 0.0)
    return carry_DN, (grad_A_DN + size_D[:, None] * kept_DN, grad_D_D + grad_y_D * u_D, grad_bias_D + grad_raw_D)


@triton.jit(do_not_specialize=["length"])
def scan_backward_kernel(
    grad_y, grad_last_state, states, u, delta, A, B, C, D, z, bias,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias,
    length, channels,
    grad_sample, grad_row,
    u_sample, u_row, delta_sample, delta_row, z_sample, z_row, B_sample, B_row, B_state, C_sample, C_row, C_state,
    STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of every input from those of y and of the last state (or None) and from the stored states.

    grad_u, grad_delta and grad_z are (B, L, D). Sums over positions are written for each sample: grad_A (B, D, N),
    grad_D and grad_bias (B, D); sums over channels for each block: grad_B and grad_C (blocks, B, L, N). Those are
    float32; all are dense.
    """
    sample, block, walk = place(length, channels, STATES, PADDED, BLOCK)
    d, n = walk[1][:, None], walk[3][None, :]
    in_tile = walk[2][:, None] & walk[4][None, :]
    decay_DN = tl.load(A + d * STATES + n, mask=in_tile, other=0.0) * LOG2_E
    skip_D, bias_D = load_vector(D, walk), load_vector(bias, walk)
    rows_u, rows_delta = (u + sample * u_sample, u_row), (delta + sample * delta_sample, delta_row)
    coefs_B, coefs_C = (B + sample * B_sample, B_row, B_state), (C + sample * C_sample, C_row, C_state)
    sources = (rows_u, rows_delta, coefs_B, bias_D, decay_DN)
    outside = ((grad_y + sample * grad_sample, grad_row), coefs_C, skip_D)
    dense, summed = sample * length * channels, (sample * channels + d) * STATES + n
    part = (block * (tl.num_programs(0) // tl.cdiv(channels, BLOCK)) + sample) * length * STATES
    outputs = (
        (grad_u + dense, channels), (grad_delta + dense, channels),
        (grad_B + part, STATES, 1), (grad_C + part, STATES, 1),
    )  # fmt: skip
    gate = None if z is None else ((z + sample * z_sample, z_row), (grad_z + dense, channels))
    none_DN, none_D = tl.zeros([BLOCK, PADDED], tl.float32), tl.zeros([BLOCK], tl.float32)
    carry_DN, sums = none_DN, (none_DN, none_D, none_D)
    if grad_last_state is not None:
        carry_DN += tl.load(grad_last_state + summed, mask=in_tile, other=0.0)
    chunks = tl.cdiv(length, CHUNK)
    for behind in range(chunks):
        chunk = chunks - 1 - behind
        stored = states + (sample * (chunks - 1) + chunk - 1) * STATES * channels
        state_DN = tl.load(stored + n * channels + d, mask=in_tile & (chunk > 0), other=0.0)
        starts = (state_DN,)
        for g in tl.static_range(1, CHUNK // GROUP):
            for k in range(GROUP):
                step = chunk * CHUNK + (g - 1) * GROUP + k
                state_DN = advance(state_DN, step, sources, walk, SOFTPLUS, REVERSE)[0]
            starts = starts + (state_DN,)
        for turn in range(CHUNK // GROUP):
            group = CHUNK // GROUP - 1 - turn
            state_DN = starts[0]
            for other in tl.static_range(1, CHUNK // GROUP):
                state_DN = tl.where(group == other, starts[other], state_DN)
            walked = (state_DN,)
            for j in tl.static_range(GROUP):
                step = chunk * CHUNK + group * GROUP + j
                walked = walked + (advance(walked[j], step, sources, walk, SOFTPLUS, REVERSE)[0],)
            for j in tl.static_range(GROUP - 1, -1, -1):
                step = chunk * CHUNK + group * GROUP + j
                carry_DN, sums = retreat(
                    carry_DN, sums, walked[j], walked[j + 1], step, sources, outside, gate, outputs, walk,
                    SOFTPLUS, REVERSE,
                )  # fmt: skip
    tl.store(grad_A + summed, sums[0], mask=in_tile)
    if grad_D is not None:
        tl.store(grad_D + sample * channels + walk[1], sums[1], mask=walk[2])
    if grad_bias is not None:
        tl.store(grad_bias + sample * channels + walk[1], sums[2], mask=walk[2])
