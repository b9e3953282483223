"""A soup as the reference model of TRL's trainers, for development: needs an environment with TRL, and nothing of ours.

    python benchmarks/trl_reference.py REVIEWS SOUP

REVIEWS is a folder that ``python -m rlhf.reviews --output REVIEWS`` made, SOUP a soup of its ``sft1`` and ``sft2``. Two
steps of DPOTrainer, and one update of PPOTrainer where the installed TRL has it (1.12.0 and before), with the soup as
``ref_model``. Prints one line for each; fails where a trainer does not take the soup, or changes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Run both trainers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path, metavar="REVIEWS")
    parser.add_argument("soup", type=Path, metavar="SOUP")
    folders = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(folders.soup)
    soup = AutoModelForCausalLM.from_pretrained(folders.soup)
    before = {name: tensor.clone() for name, tensor in soup.state_dict().items()}
    shared = soup.get_input_embeddings().weight is soup.get_output_embeddings().weight
    print(f"soup loaded, tied: {shared}, config says: {soup.config.tie_word_embeddings}")
    train_with_dpo(folders.reviews, soup, tokenizer)
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        print("PPOTrainer: not in this TRL")
    else:
        train_with_ppo(folders.reviews, soup, tokenizer, PPOConfig, PPOTrainer)
    changed = [name for name, tensor in soup.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        raise SystemExit(f"the reference was changed: {changed}")
    print("the reference is as it was, bit for bit")


def train_with_dpo(reviews: Path, soup: Any, tokenizer: Any) -> None:
    """Two steps of DPO from sft1 on the task's preference pairs."""
    pairs = [json.loads(line) for line in (reviews / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:16]]
    data = Dataset.from_list([{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs])
    with tempfile.TemporaryDirectory() as output:
        settings = DPOConfig(
            output_dir=output, max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(reviews / "sft1"),
            ref_model=soup,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
        )
        print(f"DPOTrainer: 2 steps, loss {trainer.train().training_loss:.4f}")


def train_with_ppo(reviews: Path, soup: Any, tokenizer: Any, config: Any, trainer_class: Any) -> None:
    """One update of PPO from sft1 with the task's reward model."""
    tokenizer.padding_side = "left"
    rows = [json.loads(line) for line in (reviews / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:32]]
    data = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows])
    reward = AutoModelForSequenceClassification.from_pretrained(reviews / "reward", num_labels=1)
    value = AutoModelForSequenceClassification.from_pretrained(reviews / "reward", num_labels=1)
    with tempfile.TemporaryDirectory() as output:
        settings = config(
            output_dir=output,
            total_episodes=16,
            per_device_train_batch_size=8,
            num_mini_batches=1,
            num_ppo_epochs=1,
            response_length=16,
            num_sample_generations=0,
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        trainer = trainer_class(
            args=settings,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(reviews / "sft1"),
            ref_model=soup,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
        )
        trainer.train()
        kl = [row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row]
        print(f"PPOTrainer: {len(kl)} updates, KL of the policy to the soup {kl[0]:.4f} in the first")


if __name__ == "__main__":
    main()
