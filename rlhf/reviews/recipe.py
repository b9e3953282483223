"""The PPO settings of the built-in task: what ``python -m rlhf.ppo`` runs when it is given no policy."""

from __future__ import annotations

from typing import Any

from rlhf.reviews.task import MAX_NEW_TOKENS, ReviewsTask, cached_task


def ppo_settings(task: ReviewsTask | None = None) -> dict[str, Any]:
    """Settings for :class:`rlhf.config.PPOConfig`: policy from sft1, reference the soup of sft1 and sft2.

    ``task`` is the cached one unless given. The model is tiny, so the learning rates are far above those of a real one.
    """
    task = task or cached_task()
    return {
        "policy": str(task.sft1),
        "reference": [str(task.sft1), str(task.sft2)],
        "reward": [str(task.reward)],
        "gold_reward": "rlhf.reviews:gold_reward",
        "prompts": str(task.prompts),
        "test_prompts": str(task.test_prompts),
        "track_kl": [str(task.sft1), str(task.sft2)],
        "updates": 60,
        "max_new_tokens": MAX_NEW_TOKENS,
        "learning_rate": 5e-4,
        "value_learning_rate": 1e-3,
        "eval_episodes": 1024,
    }
