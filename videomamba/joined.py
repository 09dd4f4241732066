"""What only the top of the house can join: a training, and the evaluator that measures it meanwhile."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig
    from pretrain.evaluation import Evaluator
    from pretrain.tasks import Task


class Joined:
    """Given to every command as its context's object; imports what it is asked for, when it is asked."""

    def evaluator(self, config: "PretrainConfig", task: "Task") -> "Evaluator":
        """The evaluator that `config.evaluate` asks for; UserError where it cannot begin."""
        from retrieval_eval.in_loop import InLoop

        return InLoop(config, task)

    def evaluation_lines(self, config: "PretrainConfig") -> Iterator[str]:
        """What the run's evaluations would read; UserError where they could not begin."""
        from retrieval_eval.in_loop import lines_of

        return lines_of(config)
