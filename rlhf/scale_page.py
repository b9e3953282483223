"""The tables of docs/scale.md, made by the model on paper: ``python -m rlhf.scale_page docs/scale.md``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.command_line import parse_config, run_command
from rlhf.metrics import replace_text
from rlhf.ppo_page import table
from rlhf.scale import ALWAYS, GB, PHASES, SIZES, Plan, ScaleConfig, at, memory, peak, update_work

BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"
SALSA, PLAIN = "--policy sft1 --reference sft1 sft2", "--policy sft1 --reference sft1"
COMMON = (
    "--precision bf16 --reference_dtype bfloat16 --activation_checkpointing --batch_size 128 --minibatch_size 128 "
    "--micro_batch_size 2 --eval_episodes 128 --prompt_tokens 512 --max_new_tokens 512"
)
SHARDED = "--processes 8 --sharded"
# Size → a name for the settings → their flags beside the common ones.
SETTINGS: dict[str, dict[str, str]] = {
    "1b": {
        "one GPU": SALSA,
        "one GPU, shared value head": f"{SALSA} --value_model shared",
        "one GPU, LoRA": f"{SALSA} --lora_rank 16",
        "8 GPUs, DDP": f"{SALSA} --processes 8",
    },
    "7b": {
        "one GPU": SALSA,
        "one GPU, LoRA, small batch": (
            f"{PLAIN} --lora_rank 16 --value_model shared --reward_size 1b --batch_size 32 --minibatch_size 32 "
            "--eval_episodes 32"
        ),
        "8 GPUs, FSDP": f"{SALSA} {SHARDED}",
        "8 GPUs, FSDP, 1B reward and value": f"{SALSA} {SHARDED} --reward_size 1b",
        "8 H200, FSDP": f"{SALSA} {SHARDED} --device h200",
    },
    "70b": {
        "8 GPUs, FSDP": f"{SALSA} {SHARDED}",
        "64 GPUs, FSDP, shared value head, reward a function": (
            f"{SALSA} --processes 64 --sharded --value_model shared --reward my_rewards:score"
        ),
        "8 GPUs, FSDP, LoRA, the same": (
            f"{SALSA} {SHARDED} --lora_rank 16 --value_model shared --reward my_rewards:score"
        ),
    },
}


def plan_of(size: str, flags: str) -> Plan:
    """The plan for a size and flags beside the common ones."""
    return Plan.of(parse_config(ScaleConfig, shlex.split(f"--size {size} {COMMON} {flags}"), description=""))


def size_section(size: str) -> str:
    """A size's heading, flags of its settings, and the table of their memory and time."""
    plans = {name: plan_of(size, flags) for name, flags in SETTINGS[size].items()}
    parts = {name: memory(plan) for name, plan in plans.items()}
    rows = []
    for part in dict.fromkeys(part.name for of_plan in parts.values() for part in of_plan):
        most = [max(at([p for p in ps if p.name == part], moment) for moment in ALWAYS) for ps in parts.values()]
        rows.append([part, *(f"{num / GB:.1f}" if num else "" for num in most)])
    for phase, moments in PHASES.items():
        rows.append([f"**{phase}, at most**", *(f"**{peak(ps, moments)[1] / GB:.1f}**" for ps in parts.values())])
    fits = [peak(parts[name])[1] <= plan.device.memory for name, plan in plans.items()]
    rows.append(["**of memory**", *(f"{p.device.memory / GB:.0f}" for p in plans.values())])
    rows.append(["**fits**", *("yes" if fit else "**no**" for fit in fits)])
    for phase in ("rollout", "scoring", "training"):
        seconds = [sum(work.seconds for work in update_work(plan) if work.phase == phase) for plan in plans.values()]
        cells = (f"{s:.1f}" if fit else f"({s:.1f})" for s, fit in zip(seconds, fits, strict=True))
        rows.append([f"{phase} (s)", *cells])
    shape = SIZES[size]
    sizes = (
        f"{shape.language_model / 1e9:.2f} billion parameters: {shape.num_layers} layers, hidden size "
        f"{shape.hidden_size:,}, feed-forward {shape.intermediate_size:,}, {shape.num_heads} heads, "
        f"{shape.num_kv_heads} key–value heads, vocabulary {shape.vocab_size:,}{', tied' if shape.tied else ''}."
    )
    flags = [f"- {name}: `{given}`" for name, given in SETTINGS[size].items()]
    return "\n\n".join([f"### {size.upper()}", sizes, "\n".join(flags), table(["GB a device", *plans], rows)])


def scale_tables() -> str:
    """All sections, in Markdown."""
    return "\n\n".join([f"All settings have `{COMMON}`.", *map(size_section, SETTINGS)])


def main(argv: Sequence[str] | None = None) -> None:
    """Put the tables where a page has its marks."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 1:
        raise ValueError("give the page that the tables go into: python -m rlhf.scale_page docs/scale.md")
    page = Path(arguments[0])
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{page} has no place for the tables: add the lines {BEGIN} and {END}")
    replace_text(page, f"{before}{BEGIN}\n\n{scale_tables()}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(run_command(main))
