"""PPO for language models whose KL reference is a soup of supervised-fine-tuned models (SALSA, arXiv 2411.01798).

The algorithm is told in :mod:`rlhf.ppo`; run it with ``python -m rlhf.ppo``. This file imports nothing on purpose, so
that ``python -m rlhf.ppo`` loads that module once.
"""
