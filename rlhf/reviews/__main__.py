"""Make the built-in reviews task in a folder of your own: the data, the models and what they are worth.

    python -m rlhf.reviews --output reviews            # about a minute on two cores, nothing to download
    python -m rlhf.reviews --output reviews1 --seed 1  # other data, other weights

A grammar writes short restaurant reviews. A tiny Llama is pre-trained on broad, sloppy ones (base) and fine-tuned
three times on careful ones, each time on other data in another order (sft1, sft2, sft3). A hidden gold reward judges
reviews: sentiment, staying on the prompt's subject, grammar. A proxy reward model (reward) learns from noisy
comparisons of gold. All are ordinary checkpoint folders. Then, for example:

    python -m rlhf.ppo --policy reviews/sft1 --reference reviews/sft1 reviews/sft2 --reward reviews/reward \\
        --prompts reviews/prompts.jsonl --test_prompts reviews/test_prompts.jsonl --max_new_tokens 32 \\
        --gold_reward rlhf.reviews:gold_reward --learning_rate 5e-4 --value_learning_rate 1e-3 --output run

`python -m rlhf.ppo` without arguments makes the task in the user's cache directory ($SOUPKIT_CACHE) and runs on it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rlhf.checkpointing import require_new
from rlhf.command_line import run_process
from rlhf.metrics import table
from rlhf.reviews.task import ReviewsTask, make_task


def summary(task: ReviewsTask) -> str:
    """The measured quality of a task as a table for people."""
    quality = task.quality
    rows = [["held-out prompts", "loss (nats/token)", "gold reward"]]
    for name in quality["loss"]:
        cells = ["{:.3f} ± {:.3f}".format(*quality[measure][name]) for measure in ("loss", "gold")]
        rows.append([name, *cells])
    return (
        f"{table(rows)}\n\n"
        f"proxy reward model: orders {quality['reward_accuracy']:.1%} of held-out pairs as gold does, "
        f"correlation with gold {quality['reward_correlation']:.2f}; "
        f"{quality['label_agreement']:.1%} of its training pairs agree with gold"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rlhf.reviews``."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.reviews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder of the task, made new.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all data and weights (default: 0).")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed}: must not be negative")
    require_new(arguments.output)
    started = time.perf_counter()
    task = make_task(arguments.output, arguments.seed)
    print(summary(task))
    print(f"\n{time.perf_counter() - started:.0f} s → {task.folder}")


if __name__ == "__main__":
    run_process(main)
