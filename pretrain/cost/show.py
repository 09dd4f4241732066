"""A plan as tables for a reader."""

import math

from rich.console import Console, Group
from rich.table import Table

from pretrain.cost.plan import Plan


def show(plan: Plan, console: Console) -> None:
    """Print a plan."""
    console.print(Group(_head(plan), _memory(plan), _flops(plan), _data(plan)))
    for note in plan.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def _head(plan: Plan) -> Table:
    table = _table(f"{plan.gpus} x {plan.device.label}", "", "")
    executed = sum(
        share * sum(part.model + part.beside for part in plan.flops[kind]) for kind, share in plan.kinds.items()
    )
    model = sum(share * sum(part.model for part in plan.flops[kind]) for kind, share in plan.kinds.items())
    for name, value in (
        ("parameters", f"{plan.parameters:,}"),
        ("global batch", f"{plan.batch} = {plan.gpus} ranks x {plan.micro_batches} x {plan.micro_batch}"),
        ("FLOPs a step", f"{model:.3g} of the model, {executed:.3g} computed"),
        ("peak of a GPU", f"{plan.device.peak / 1e12:.4g} TFLOP/s bf16, dense ({plan.device.source})"),
        ("utilisation, as stated", f"{plan.utilisation:.0%} of the peak; of the model's FLOPs {_mfu(plan, model):.0%}"),
        ("time a step", f"{plan.step_seconds:.3g} s, {plan.batch / plan.step_seconds:,.0f} samples/s"),
        ("whole run", f"{plan.steps:,} steps, {plan.days:.3g} days, {24 * plan.days * plan.gpus:,.0f} GPU hours"),
        ("one checkpoint", size(plan.checkpoint_bytes)),
        *((f"a rank sends in a step: {name}", size(value)) for name, value in plan.network.items()),
    ):
        table.add_row(name, value)
    return table


def _mfu(plan: Plan, model: float) -> float:
    return model / (plan.step_seconds * plan.device.peak * plan.gpus)


def _memory(plan: Plan) -> Table:
    names = ("as configured", "with activation checkpointing")
    if plan.checkpointed:
        names = ("as configured", "without activation checkpointing")
    table = _table("\nmemory of each device at its peak", "", *names)
    for name in {**plan.memory.parts, **plan.memory_other.parts}:
        table.add_row(name, *(size(one.parts.get(name, 0)) for one in (plan.memory, plan.memory_other)))
    table.add_row("together", size(plan.memory.total), size(plan.memory_other.total), style="bold")
    table.add_row(
        f"of {size(plan.device.memory)}", *(_share(one.total, plan) for one in (plan.memory, plan.memory_other))
    )
    return table


def _share(total: int, plan: Plan) -> str:
    return f"{total / plan.device.memory:.0%}"


def _flops(plan: Plan) -> Table:
    table = _table("\nFLOPs of a step, of all ranks", "", "forward", "backward", "beside", "share")
    for kind, parts in plan.flops.items():
        whole = sum(part.model + part.beside for part in parts)
        for part in parts:
            table.add_row(
                f"{kind}, {part.name}",
                f"{part.forward:.3g}",
                f"{part.backward:.3g}",
                f"{part.beside:.3g}" if part.beside else "",
                f"{(part.model + part.beside) / whole:.1%}",
            )
    return table


def _data(plan: Plan) -> Table:
    table = _table(
        "\ndata" if plan.data else "", *(("", "shards", "samples", "a rank sees", "epochs") if plan.data else ("",))
    )
    for one in plan.data:
        table.add_row(
            f"{one.path} ({one.kind}s)",
            f"{one.shards:,}",
            f"{one.samples:,}",
            f"{one.per_rank:,.0f}",
            f"{one.epochs:.3g}",
        )
    return table


def size(count: float) -> str:
    """Bytes in words: 1.5 GB."""
    power = min(4, int(math.log10(max(count, 1))) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
