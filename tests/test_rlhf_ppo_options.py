"""What the options of an update change: where the KL goes and how it is estimated, shared trunks, bonuses, stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_helpers import (
    assert_same_step,
    log_distributions_alone,
    rows_alone,
    set_up,
    value_head,
    values_alone,
    weights,
    with_plain_descent,
)
from torch import Tensor, nn

from rlhf import ppo
from rlhf.ppo import Experience, collect, minibatch_step, optimise, roll_out, score
from rlhf.rollout import Rollout
from rlhf.setup import Run

BETA, TEMPERATURE = 0.3, 0.8  # of ppo_helpers.SETTINGS
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def rollout(checkpoints: Folders, prompt_file: Path) -> Rollout:
    run = set_up(checkpoints, prompt_file)
    return roll_out(run, run.prompts[:12], "rollout", 1)


def experience_of(run: Run, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
    return collect(run, rollout, score(run, rollout))


def gradient_step_of_loop(run: Run, experience: Experience, loss: Any) -> dict[str, Tensor]:
    """Weights after one step on Σ over episodes of ``loss(i, ids, num_prompt)`` / number of tokens, without padding."""
    num_tokens = int(experience.rollout.response_mask.sum())
    for i, (ids, num_prompt) in enumerate(rows_alone(experience.rollout)):
        (loss(i, ids, num_prompt) / num_tokens).backward()
    for learner in run.learners.values():
        learner.optimizer.step()
    return weights(run)


def surrogate(run: Run, experience: Experience, i: int, ids: Tensor, num_prompt: int) -> tuple[Tensor, Tensor]:
    """−Σ A log π of an episode, whose gradient is the clipped loss's at ratio 1, and its log-distributions."""
    distributions = log_distributions_alone(run.model, ids, num_prompt)
    logprobs = distributions.gather(1, ids[0, num_prompt:, None]).squeeze(1)
    return -(experience.advantages[i, : len(logprobs)] * logprobs).sum(), distributions


def value_error(run: Run, experience: Experience, i: int, ids: Tensor, num_prompt: int) -> Tensor:
    """½ Σ (V − R)² of an episode."""
    values = values_alone(run, ids, num_prompt)
    return 0.5 * ((values - experience.returns[i, : len(values)]) ** 2).sum()


def test_a_shared_trunk_learns_from_both_losses(checkpoints: Folders, prompt_file: Path, rollout: Rollout) -> None:
    shared = {"value_model": "shared", "value_coef": 0.7}
    stepped, plain = (with_plain_descent(set_up(checkpoints, prompt_file, **shared)) for _ in range(2))
    assert stepped.value_model is None
    assert list(stepped.learners) == ["policy"]
    experience, _ = experience_of(stepped, rollout)
    with torch.no_grad():
        for i, (ids, num_prompt) in enumerate(rows_alone(rollout)):
            expected = values_alone(plain, ids, num_prompt)
            torch.testing.assert_close(experience.values[i, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    before = weights(plain)

    def loss(i: int, ids: Tensor, num_prompt: int) -> Tensor:
        return surrogate(plain, experience, i, ids, num_prompt)[0] + 0.7 * value_error(
            plain, experience, i, ids, num_prompt
        )

    minibatch_step(stepped, experience)
    gradient_step_of_loop(plain, experience, loss)
    assert_same_step(stepped, plain, before)


def test_a_head_on_the_trunk_has_the_learning_rate_of_values(checkpoints: Folders, prompt_file: Path) -> None:
    run = set_up(checkpoints, prompt_file, value_model="shared", learning_rate=1e-3, value_learning_rate=5e-3)
    model, head = run.learners["policy"].optimizer.param_groups
    assert head["params"] == [value_head(run).weight]
    assert len(model["params"]) == len(list(run.model.parameters()))
    assert run.learners["policy"].learning_rates == [1e-3, 5e-3]


@pytest.mark.parametrize("kind", ["soup", "weighted_kl"])
@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
def test_kl_in_the_loss(checkpoints: Folders, prompt_file: Path, rollout: Rollout, kind: str, estimator: str) -> None:
    """Its gradient is added to that of the rewards, which know nothing of it."""
    settings = {"kl_in": "loss", "kl_estimator": estimator, "reference_kind": kind, "micro_batch_size": 3}
    stepped, plain = (with_plain_descent(set_up(checkpoints, prompt_file, **settings)) for _ in range(2))
    experience, metrics = experience_of(stepped, rollout)
    free, _ = experience_of(set_up(checkpoints, prompt_file, kl_coef=0.0), rollout)
    torch.testing.assert_close(experience.advantages, free.advantages)
    before = weights(plain)
    total = 0.0

    def loss(i: int, ids: Tensor, num_prompt: int) -> Tensor:
        nonlocal total
        objective, policy = surrogate(plain, experience, i, ids, num_prompt)
        tokens = ids[0, num_prompt:, None]
        for weight, source in plain.reference.sources.values():
            with torch.no_grad():
                reference = log_distributions_alone(source.model, ids, num_prompt)  # type: ignore[attr-defined]
            log_ratio = (policy - reference).gather(1, tokens)
            terms = {
                "exact": policy.exp() * (policy - reference),
                "k2": log_ratio**2 / 2,
                "k3": (-log_ratio).exp() - 1 + log_ratio,
            }
            divergence = weight * terms[estimator].sum()
            total += divergence.item()
            objective = objective + BETA * divergence
        return objective + value_error(plain, experience, i, ids, num_prompt)

    minibatch_step(stepped, experience)
    gradient_step_of_loop(plain, experience, loss)
    assert_same_step(stepped, plain, before)
    name = "kl/reference" if estimator == "exact" else f"kl_{estimator}/reference"
    assert metrics[name] == pytest.approx(total / len(rollout), rel=1e-4)


def test_exact_kl_in_both_places_is_its_whole_gradient(checkpoints: Folders, prompt_file: Path) -> None:
    """Over all responses of two tokens, weighted by their probabilities, so that nothing is left to chance.

    With no score, γ = λ = 1 and no values, the expected step must be down the gradient of E_π[Σ_t KL_t], which is that
    of KL(π‖ρ) over responses.
    """
    settings = {"kl_in": "both", "kl_estimator": "exact", "gamma": 1.0, "gae_lambda": 1.0, "missing_eos_penalty": 0.0}
    run = set_up(checkpoints, prompt_file, max_new_tokens=2, **settings)
    nn.init.zeros_(value_head(run).weight)
    prompt = torch.tensor(run.prompts[0].token_ids)
    eos, size = run.tokenizer.eos_token_id, run.model.config.vocab_size
    responses = [[eos], *([a, b] for a in range(size) if a != eos for b in range(size))]
    rollout = rollout_of(run, prompt, responses)
    experience, _ = collect(run, rollout, {"proxy_reward": torch.zeros(len(rollout))})
    with torch.no_grad():
        probabilities = run.policy(rollout, TEMPERATURE).logprobs.sum(dim=1).exp().double()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)

    expected_loss = torch.zeros((), dtype=torch.float64)
    output = run.policy(rollout, TEMPERATURE, references=ppo.loss_references(run, experience))
    losses, _ = ppo.policy_loss(output.logprobs, experience.logprobs, experience.advantages, 0.2)
    expected_loss = (probabilities[:, None] * (losses + BETA * output.kl)).sum()
    found = torch.autograd.grad(expected_loss, list(run.model.parameters()))

    weight, source = run.reference.sources["reference"]
    with torch.no_grad():
        reference = [
            log_distributions_alone(source.model, ids, n).gather(1, ids[0, n:, None]).sum()  # type: ignore[attr-defined]
            for ids, n in rows_alone(rollout)
        ]
    logprobs = run.policy(rollout, TEMPERATURE).logprobs.sum(dim=1).double()
    divergence = (logprobs.exp() * (logprobs - torch.stack(reference).double())).sum()
    expected = torch.autograd.grad(BETA * weight * divergence, list(run.model.parameters()))
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * largest, rtol=1e-3)


def rollout_of(run: Run, prompt: Tensor, responses: list[list[int]]) -> Rollout:
    """Given responses to one prompt."""
    width, eos = max(map(len, responses)), run.tokenizer.eos_token_id
    tokens = torch.tensor([[*prompt.tolist(), *row, *[0] * (width - len(row))] for row in responses])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in responses])
    return Rollout(
        tokens=tokens,
        attention_mask=torch.cat([torch.ones(len(responses), len(prompt), dtype=torch.bool), mask], dim=1),
        response_mask=mask,
        logprobs=torch.zeros(mask.shape),
        finished=torch.tensor([eos in row for row in responses]),
        prompts=["p"] * len(responses),
        responses=["r"] * len(responses),
    )


def test_one_update_of_a_bandit_with_three_arms(checkpoints: Folders, prompt_file: Path) -> None:
    """One token a response, reward 1, 0 or −2 by token, no penalty: ΔW = lr · mean_i r_i (e_{y_i} − π) hᵀ / T."""
    run = set_up(checkpoints, prompt_file, kl_coef=0.0, max_new_tokens=1, missing_eos_penalty=0.0)
    nn.init.zeros_(value_head(run).weight)
    head = run.model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # apart from the embedding, whose gradient it shares
    run.learners["policy"].optimizer = torch.optim.SGD([head.weight], lr=0.5)
    prompt = torch.tensor(run.prompts[0].token_ids)
    arms, rewards = [3, 7, 7, 9], [1.0, 0.0, 0.0, -2.0]
    rollout = rollout_of(run, prompt, [[arm] for arm in arms])
    experience, _ = collect(run, rollout, {"proxy_reward": torch.tensor(rewards)})
    before = head.weight.detach().clone()
    with torch.no_grad():
        hidden = run.model.base_model(prompt[None]).last_hidden_state[0, -1]
        probabilities = (head(hidden) / TEMPERATURE).softmax(-1)
    minibatch_step(run, experience)
    change = torch.zeros_like(before)
    for arm, reward in zip(arms, rewards, strict=True):
        error = -probabilities.clone()
        error[arm] += 1
        change += 0.5 * reward * torch.outer(error, hidden) / TEMPERATURE / len(arms)
    torch.testing.assert_close(head.weight.detach() - before, change, atol=1e-6, rtol=1e-4)
    assert change.abs().max() > 1e-2


def test_an_entropy_bonus(checkpoints: Folders, prompt_file: Path, rollout: Rollout) -> None:
    stepped, plain = (with_plain_descent(set_up(checkpoints, prompt_file, entropy_coef=0.4)) for _ in range(2))
    experience, _ = experience_of(stepped, rollout)
    before = weights(plain)

    def loss(i: int, ids: Tensor, num_prompt: int) -> Tensor:
        objective, policy = surrogate(plain, experience, i, ids, num_prompt)
        return objective + 0.4 * (policy.exp() * policy).sum() + value_error(plain, experience, i, ids, num_prompt)

    minibatch_step(stepped, experience)
    gradient_step_of_loop(plain, experience, loss)
    assert_same_step(stepped, plain, before)


def test_the_order_of_episodes_changes_nothing(checkpoints: Folders, prompt_file: Path, rollout: Rollout) -> None:
    first, second = (with_plain_descent(set_up(checkpoints, prompt_file, micro_batch_size=3)) for _ in range(2))
    before = weights(first)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(5))
    experience, metrics = experience_of(first, rollout)
    shuffled, shuffled_metrics = experience_of(second, rollout.rows(order))
    assert shuffled_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(shuffled.advantages, experience.advantages[order], atol=2e-5, rtol=1e-4)
    minibatch_step(first, experience)
    minibatch_step(second, shuffled)
    assert_same_step(first, second, before)


def test_scored_and_sampled_states_say_the_same(checkpoints: Folders, prompt_file: Path) -> None:
    """Log-probabilities, entropies, KLs and values from the states kept while sampling, and from a forward."""
    for value_model in ("separate", "shared"):
        results = []
        for old_logprobs in ("sampled", "scored"):
            run = set_up(checkpoints, prompt_file, old_logprobs=old_logprobs, value_model=value_model)
            rollout = roll_out(run, run.prompts[:12], "rollout", 1)
            assert (rollout.hidden is None) == (old_logprobs == "scored")
            results.append(experience_of(run, rollout))
        (kept, kept_metrics), (scored, scored_metrics) = results
        assert kept_metrics == pytest.approx(scored_metrics, rel=1e-4, abs=1e-5)
        for name in ("logprobs", "values", "advantages"):
            torch.testing.assert_close(getattr(kept, name), getattr(scored, name), atol=2e-5, rtol=1e-4)
        assert kept_metrics["sampling_gap"] < 1e-5


def test_an_update_stops_early_where_the_policy_has_moved_enough(
    checkpoints: Folders, prompt_file: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = set_up(checkpoints, prompt_file, early_stop_kl=0.1)
    experience, _ = experience_of(run, rollout)
    found = iter([0.05, 0.2, 0.3, 0.4])
    monkeypatch.setattr(
        ppo,
        "minibatch_step",
        lambda run, minibatch: {"approx_kl": next(found), "ratio_deviation": 0.0, "skipped_steps": 0.0},
    )
    assert optimise(run, experience, update=1)["optimizer_steps"] == 2
    run.config = replace(run.config, early_stop_kl=None)
    found = iter([0.05, 0.2, 0.3, 0.4])
    assert optimise(run, experience, update=1)["optimizer_steps"] == 4


def test_without_a_reference_nothing_is_penalised(checkpoints: Folders, prompt_file: Path, rollout: Rollout) -> None:
    free = set_up(checkpoints, prompt_file, reference_kind="none", reference=[])
    kept = set_up(checkpoints, prompt_file, kl_coef=0.0)
    (without, metrics), (zero, _) = (experience_of(run, rollout) for run in (free, kept))
    torch.testing.assert_close(without.advantages, zero.advantages)
    assert [name for name in metrics if name.startswith("kl/")] == ["kl/third", "kl/third_stderr"]


def test_held_out_prompts_that_are_trained_on_are_told(
    checkpoints: Folders, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("n n n n n n\n" + prompt_file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    set_up(checkpoints, prompt_file, test_prompts=str(held_out))
    assert f"warning: 1 of 2 prompts of {held_out} are trained on as well" in capsys.readouterr().err


def test_bf16_measures_and_trains_to_its_digits(checkpoints: Folders, prompt_file: Path, rollout: Rollout) -> None:
    settings = {"kl_in": "both", "kl_estimator": "exact", "entropy_coef": 0.1, "old_logprobs": "scored"}
    found = {}
    for precision in ("float32", "bf16"):
        run = set_up(checkpoints, prompt_file, precision=precision, **settings)
        experience, metrics = experience_of(run, replace(rollout, hidden=None))
        found[precision] = metrics | minibatch_step(run, experience)
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    for name in ("kl/reference", "kl/third", "entropy", "proxy_reward", "grad_norm/policy"):
        assert found["bf16"][name] == pytest.approx(found["float32"][name], rel=0.05), name
    assert found["bf16"]["entropy"] != found["float32"]["entropy"]
    assert 0 < found["bf16"]["ratio_deviation"] < 0.05
