"""What a run changed: ``summary.json`` and the table printed at the end."""

from __future__ import annotations

from typing import Any

from rlhf.evaluation import Evaluation
from rlhf.metrics import Estimate, table


def summarise(before: Evaluation, after: Evaluation, **totals: float) -> dict[str, Any]:
    """The content of ``summary.json``: every measure before and after training, then the run's totals.

    KL is exact, in nats per response; entropy in nats per token. A gold reward that was not measured is None.
    """
    rewards = {name: _change(before.rewards[name], after.rewards[name]) for name in before.rewards}
    return {
        "proxy_reward": rewards["proxy_reward"],
        "gold_reward": rewards.get("gold_reward"),
        "entropy": _change(before.entropy, after.entropy),
        "response_length": _change(before.response_length, after.response_length),
        "kl": {name: _change(before.kl[name], after.kl[name]) for name in before.kl},
        **totals,
    }


def _change(before: Estimate, after: Estimate) -> dict[str, float]:
    return {
        "before": before.mean,
        "before_stderr": before.stderr,
        "after": after.mean,
        "after_stderr": after.stderr,
    }


def summary_table(summary: dict[str, Any]) -> str:
    """The summary for people: before, after, and the change, also in standard errors √(se² before + se² after)."""
    measures = {name.replace("_", " "): summary[name] for name in ("proxy_reward", "gold_reward") if summary[name]}
    measures |= {f"KL to {name} (nats)": value for name, value in summary["kl"].items()}
    measures |= {"entropy (nats/token)": summary["entropy"], "response length (tokens)": summary["response_length"]}
    rows = [["held-out prompts", "before", "after", "change"]]
    for name, m in measures.items():
        change, error = m["after"] - m["before"], (m["before_stderr"] ** 2 + m["after_stderr"] ** 2) ** 0.5
        cells = [f"{_number(m[when])} ± {_number(m[f'{when}_stderr'])}" for when in ("before", "after")]
        rows.append([name, *cells, _number(change, "+") + (f" ({change / error:+.1f} SE)" if error > 0 else "")])
    return table(rows)


def _number(value: float, sign: str = "") -> str:
    """Three decimals, or powers of ten for what would read as zero and is not."""
    return f"{value:{sign}.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:{sign}.0e}"
