"""The built-in task: short restaurant reviews, small models that write them, and a gold reward that judges them.

python -m rlhf.reviews --output DIR        make it anywhere
rlhf.reviews.cached_task()                 make it once, in the user's cache directory
--reward rlhf.reviews:gold_reward          use its gold reward in rlhf.ppo
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.reviews.gold import explain, gold_reward

if TYPE_CHECKING:
    from rlhf.reviews.task import ReviewsTask, cached_task, make_task, tiny_task

__all__ = ["ReviewsTask", "cached_task", "explain", "gold_reward", "make_task", "tiny_task"]


def __getattr__(name: str) -> Any:
    # Making a task needs torch and transformers; scoring a text does not, and should not wait for them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf.reviews import task

    return getattr(task, name)
