"""One PPO update: every number against a loop over unpadded rows, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import pad_more, share_of_a
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
from torch import nn

from rlhf import ppo
from rlhf.config import PPOConfig
from rlhf.data import Prompt
from rlhf.guards import DivergedError
from rlhf.ppo import Experience, collect, minibatch_step, optimise, roll_out, score
from rlhf.reference import names_of
from rlhf.rollout import Rollout
from rlhf.setup import Run, split_test_prompts, value_start


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, Path], prompt_file: Path) -> Run:
    return set_up(checkpoints, prompt_file)


@pytest.fixture(scope="module")
def rollout(run: Run) -> Rollout:
    rollout = roll_out(run, run.prompts[:12], "rollout", 1)
    assert 0 < rollout.finished.sum() < len(rollout)
    assert len(set(rollout.response_lengths.tolist())) > 2
    return rollout


@pytest.fixture(scope="module")
def collected(run: Run, rollout: Rollout) -> tuple[Experience, dict[str, float]]:
    return collect(run, rollout, score(run, rollout))


def test_experience_and_metrics_equal_a_loop_over_episodes(
    run: Run, rollout: Rollout, collected: tuple[Experience, dict[str, float]]
) -> None:
    experience, metrics = collected
    scores = share_of_a(rollout.prompts, rollout.responses)
    sums: dict[str, list[float]] = {name: [] for name in ("kl/reference", "kl/third", "k1", "entropy", "objective")}
    for i, (ids, num_prompt) in enumerate(rows_alone(rollout)):
        with torch.no_grad():
            policy, reference, third = (
                log_distributions_alone(model, ids, num_prompt)
                for model in (run.model, run.reference.sources["reference"][1].model, run.tracked["third"].model)
            )
            values = [*values_alone(run, ids, num_prompt).tolist(), 0.0]
        tokens = ids[0, num_prompt:].tolist()
        length = len(tokens)
        logprobs = [float(policy[t, token]) for t, token in enumerate(tokens)]
        k1 = [logprobs[t] - float(reference[t, token]) for t, token in enumerate(tokens)]
        rewards = [-0.3 * value for value in k1]
        score = scores[i] - (0.0 if tokens[-1] == run.tokenizer.eos_token_id else 0.5)
        rewards[-1] += score
        delta = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
        advantages = [sum(0.72**step * delta[t + step] for step in range(length - t)) for t in range(length)]
        for name, expected in (
            ("logprobs", logprobs),
            ("values", values[:-1]),
            ("advantages", advantages),
            ("returns", [a + v for a, v in zip(advantages, values, strict=False)]),
        ):
            assert getattr(experience, name)[i, :length].tolist() == pytest.approx(expected, abs=2e-5), name
        sums["kl/reference"].append(float((policy.exp() * (policy - reference)).sum()))
        sums["kl/third"].append(float((policy.exp() * (policy - third)).sum()))
        sums["k1"].append(sum(k1))
        sums["entropy"].append(-float((policy.exp() * policy).sum()))
        sums["objective"].append(score - 0.3 * sum(k1))

    lengths = rollout.response_lengths.tolist()
    num = len(lengths)
    assert metrics["kl/reference"] == pytest.approx(sum(sums["kl/reference"]) / num, rel=1e-5)
    assert metrics["kl/third"] == pytest.approx(sum(sums["kl/third"]) / num, rel=1e-5)
    assert metrics["kl_k1/reference"] == pytest.approx(sum(sums["k1"]) / num, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(sum(sums["entropy"]) / sum(lengths), rel=1e-5)
    assert metrics["objective"] == pytest.approx(sum(sums["objective"]) / num, rel=1e-4)
    assert metrics["proxy_reward"] == pytest.approx(sum(scores) / num, rel=1e-5)
    assert metrics["gold_reward"] == pytest.approx(sum(len(r.split()) for r in rollout.responses) / num)
    assert metrics["response_length"] == pytest.approx(sum(lengths) / num)
    assert metrics["eos_rate"] == pytest.approx(rollout.finished.double().mean().item())
    assert metrics["kl_coef"] == 0.3
    assert metrics["sampling_gap"] < 1e-5


def test_the_kl_estimates_agree_within_their_errors(collected: tuple[Experience, dict[str, float]]) -> None:
    _, metrics = collected
    error = (metrics["kl_k1/reference_stderr"] ** 2 + metrics["kl/reference_stderr"] ** 2) ** 0.5
    assert abs(metrics["kl_k1/reference"] - metrics["kl/reference"]) < 4 * error
    assert metrics["kl/reference_stderr"] < metrics["kl_k1/reference_stderr"]


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 5), (3, 2)])
def test_more_padding_changes_nothing_in_an_update(
    checkpoints: dict[str, Path],
    prompt_file: Path,
    rollout: Rollout,
    collected: tuple[Experience, dict[str, float]],
    left: int,
    right: int,
) -> None:
    short_run, padded_run = (with_plain_descent(set_up(checkpoints, prompt_file)) for _ in range(2))
    before, mask = weights(short_run), rollout.response_mask
    experience, metrics = collected
    padded_rollout = pad_more(rollout, left, right)
    padded, padded_metrics = collect(padded_run, padded_rollout, score(padded_run, padded_rollout))
    assert padded_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for name in ("logprobs", "values", "advantages", "returns"):
        expected, found = getattr(experience, name), getattr(padded, name)[:, : mask.shape[1]]
        torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=1e-4, msg=name)

    step, padded_step = minibatch_step(short_run, experience), minibatch_step(padded_run, padded)
    assert padded_step == pytest.approx(step, rel=1e-3, abs=1e-5)
    assert_same_step(short_run, padded_run, before)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_take_the_same_step(
    checkpoints: dict[str, Path],
    prompt_file: Path,
    collected: tuple[Experience, dict[str, float]],
    micro_batch_size: int,
) -> None:
    minibatch = collected[0].rows(torch.arange(6))
    whole, parts = (
        with_plain_descent(set_up(checkpoints, prompt_file, micro_batch_size=size)) for size in (None, micro_batch_size)
    )
    before = weights(whole)
    metrics, micro_metrics = minibatch_step(whole, minibatch), minibatch_step(parts, minibatch)
    assert micro_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert_same_step(whole, parts, before)


def test_gradients_equal_a_loop_over_episodes(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    """At the sampling policy the clipped losses are −Σ A·log π / N and ½ Σ (V − R)² / N, over all N tokens."""
    experience = collected[0]
    stepped, plain = (with_plain_descent(set_up(checkpoints, prompt_file)) for _ in range(2))
    before = weights(plain)
    metrics = minibatch_step(stepped, experience)
    num_tokens = int(experience.rollout.response_mask.sum())
    for i, (ids, num_prompt) in enumerate(rows_alone(experience.rollout)):
        tokens = ids[0, num_prompt:]
        length = len(tokens)
        logprobs = log_distributions_alone(plain.model, ids, num_prompt).gather(1, tokens[:, None]).squeeze(1)
        (-(experience.advantages[i, :length] * logprobs).sum() / num_tokens).backward()
        errors = values_alone(plain, ids, num_prompt) - experience.returns[i, :length]
        ((errors**2).sum() / 2 / num_tokens).backward()
    norms = [
        nn.utils.get_total_norm([p.grad for p in learner.module.parameters() if p.grad is not None])
        for learner in plain.learners.values()
    ]
    for learner in plain.learners.values():
        learner.optimizer.step()
    assert_same_step(stepped, plain, before)
    assert [metrics["grad_norm/policy"], metrics["grad_norm/value"]] == pytest.approx(
        [norm.item() for norm in norms], rel=1e-4
    )


def test_first_step_has_ratio_one_and_later_ones_do_not(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    run = set_up(checkpoints, prompt_file)
    run.learners["policy"].optimizer = torch.optim.SGD(run.policy.parameters(), lr=0.01)
    experience, mask = collected[0], collected[0].rollout.response_mask
    first = minibatch_step(run, experience)
    with torch.no_grad():
        logprobs = run.policy(experience.rollout, 0.8).logprobs
    second = minibatch_step(run, experience)
    assert first["ratio_deviation"] < 1e-4
    assert first["approx_kl"] == pytest.approx(0, abs=1e-8)
    assert first["clip_fraction"] == first["value_clip_fraction"] == 0
    assert first["policy_loss"] == pytest.approx(
        -float(collected[0].advantages.sum() / collected[0].rollout.response_mask.sum()), rel=1e-4
    )
    assert second["policy_loss"] < first["policy_loss"]
    ratio = (logprobs - experience.logprobs)[mask].double().exp()
    advantages = experience.advantages[mask]
    cut = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert second["ratio_deviation"] == pytest.approx((ratio - 1).abs().max().item(), rel=1e-4)
    assert second["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3)  # E_old k3
    assert second["clip_fraction"] == pytest.approx(cut.double().mean().item())
    assert 0 < second["clip_fraction"] < 1


def test_a_step_leaves_no_gradients_behind(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    run = set_up(checkpoints, prompt_file)
    minibatch_step(run, collected[0])
    parameters = [p for learner in run.learners.values() for p in learner.module.parameters()]
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_gradients_are_scaled_down_to_the_norm_allowed(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    run = with_plain_descent(set_up(checkpoints, prompt_file, max_grad_norm=0.01), learning_rate=1.0)
    before = weights(run)
    metrics = minibatch_step(run, collected[0])
    after = weights(run)
    for model in ("policy", "value"):
        change = torch.cat([(after[n] - before[n]).flatten().double() for n in before if n.startswith(model)])
        assert torch.linalg.vector_norm(change).item() == pytest.approx(0.01, rel=1e-3)
        assert metrics[f"grad_norm/{model}"] > 0.02  # as it was before


def test_a_step_that_is_off_is_skipped_and_counted_and_three_in_a_row_end_the_run(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    run = set_up(checkpoints, prompt_file)
    before = weights(run)
    broken = replace(collected[0], advantages=torch.full_like(collected[0].advantages, torch.nan))
    for _ in range(2):
        assert minibatch_step(run, broken)["skipped_steps"] == 1
    assert minibatch_step(run, collected[0])["skipped_steps"] == 0
    assert any(not torch.equal(weights(run)[name], start) for name, start in before.items())
    assert all(parameter.isfinite().all() for parameter in weights(run).values())
    for _ in range(2):
        minibatch_step(run, broken)
    with pytest.raises(DivergedError, match="3 optimizer steps in a row had to be skipped, the last because the loss"):
        minibatch_step(run, broken)


def test_a_step_far_from_the_sampling_policy_is_skipped(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    experience = collected[0]
    old = experience.logprobs - 2.5 * experience.rollout.response_mask  # every ratio is e^2.5 = 12.2
    for max_ratio, skipped in ((12.0, 1.0), (12.4, 0.0)):
        run = set_up(checkpoints, prompt_file, max_ratio=max_ratio)
        before = weights(run)
        metrics = minibatch_step(run, replace(experience, logprobs=old))
        assert metrics["mean_ratio"] == pytest.approx(12.18, abs=0.01)
        assert metrics["skipped_steps"] == skipped
        assert all(torch.equal(weights(run)[name], start) for name, start in before.items()) == bool(skipped)


def test_tokens_outside_the_mask_have_no_effect(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    clean, dirty = (with_plain_descent(set_up(checkpoints, prompt_file)) for _ in range(2))
    before, mask = weights(clean), collected[0].rollout.response_mask
    names = ("advantages", "returns", "values")
    spoilt = replace(collected[0], **{name: getattr(collected[0], name).where(mask, 1e6) for name in names})
    assert minibatch_step(dirty, spoilt) == pytest.approx(minibatch_step(clean, collected[0]))
    assert_same_step(clean, dirty, before)


def test_advantages_are_whitened_over_response_tokens_and_returns_are_not(
    checkpoints: dict[str, Path], prompt_file: Path, collected: tuple[Experience, dict[str, float]]
) -> None:
    plain = collected[0]
    whitening = set_up(checkpoints, prompt_file, whiten_advantages=True)
    whitened, _ = collect(whitening, plain.rollout, score(whitening, plain.rollout))
    mask = plain.rollout.response_mask
    values = whitened.advantages[mask].double()
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    original = plain.advantages[mask].double()
    expected = (original - original.mean()) / original.std(correction=0)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whitened.returns, plain.returns)
    assert whitened.advantages[~mask].abs().sum() == 0


def test_rewards_are_whitened_on_request_and_keep_their_mean(
    checkpoints: dict[str, Path], prompt_file: Path, rollout: Rollout
) -> None:
    """With γ = 0 and values 0, advantages are the token rewards."""
    mask = rollout.response_mask
    rewards = []
    for whiten in (False, True):
        run = set_up(checkpoints, prompt_file, gamma=0.0, whiten_rewards=whiten)
        nn.init.zeros_(value_head(run).weight)
        rewards.append(collect(run, rollout, score(run, rollout))[0].advantages[mask].double())
    assert rewards[1].mean().item() == pytest.approx(rewards[0].mean().item(), abs=1e-5)
    assert rewards[1].var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert rewards[0].var(correction=0).item() != pytest.approx(1, abs=0.01)


def test_every_episode_is_used_once_an_epoch_at_the_scheduled_learning_rate(
    run: Run, collected: tuple[Experience, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = torch.arange(12.0)[:, None].expand(-1, collected[0].logprobs.shape[1])
    marked = replace(collected[0], returns=episodes)
    seen: list[list[int]] = []
    rates: list[tuple[float, ...]] = []

    def record(run: Run, minibatch: Experience) -> dict[str, float]:
        seen.append(minibatch.returns[:, 0].int().tolist())
        rates.append(tuple(run.learners[name].optimizer.param_groups[0]["lr"] for name in ("policy", "value")))
        return {"ratio_deviation": float(len(seen)), "skipped_steps": float(len(seen) == 2), "approx_kl": 0.0}

    monkeypatch.setattr(ppo, "minibatch_step", record)
    metrics = optimise(run, marked, update=3)  # of 100, the first five of which are warm-up
    assert [len(minibatch) for minibatch in seen] == [6, 6, 6, 6]
    epochs = [seen[0] + seen[1], seen[2] + seen[3]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(12))
    assert rates == [(pytest.approx(1e-5 * 0.5), pytest.approx(2e-5 * 0.5))] * 4
    assert metrics == {
        "ratio_deviation": 2.5,
        "ratio_deviation_first": 1.0,
        "learning_rate": pytest.approx(0.5e-5),
        "optimizer_steps": 3,
        "skipped_steps": 1,
        "approx_kl": 0.0,
    }
    seen.clear()
    optimise(run, marked, update=3)
    assert seen[0] + seen[1] == epochs[0]
    seen.clear()
    optimise(run, marked, update=4)
    assert seen[0] + seen[1] != epochs[0]


@pytest.mark.parametrize(
    ("value_init", "reward", "start"),
    [
        ("auto", "reward", "reward"),
        ("auto", "helpers:share_of_a", "first"),
        ("reward", "reward", "reward"),
        ("policy", "reward", "first"),
    ],
)
def test_where_the_value_model_starts(
    checkpoints: dict[str, Path], prompt_file: Path, value_init: str, reward: str, start: str
) -> None:
    spec = str(checkpoints.get(reward, reward))
    models = {"policy": str(checkpoints["first"]), "reward": [spec], "prompts": str(prompt_file)}
    config = PPOConfig(**models, max_new_tokens=7, value_init=value_init)
    assert value_start(config) == str(checkpoints[start])
    run = ppo.set_up(config)
    assert value_head(run).weight.abs().max() == 0
    assert run.value_model is not None
    assert run.value_model.scalar.body is not run.model.base_model


def test_adam_is_configured_as_asked(checkpoints: dict[str, Path], prompt_file: Path) -> None:
    run = set_up(checkpoints, prompt_file, adam_beta1=0.7, adam_beta2=0.8, adam_eps=0.01)
    for learner in run.learners.values():
        (group,) = learner.optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 0.01, 0)


def test_names_are_last_path_components_where_they_tell_folders_apart() -> None:
    assert names_of(["/x/a", "/x/b"]) == {"a": "/x/a", "b": "/x/b"}
    assert names_of(["/x/a", "/y/a", "/x/b"]) == {"x/a": "/x/a", "y/a": "/y/a", "x/b": "/x/b"}
    assert names_of(["/x/a", "/x/./a", "/x/a/"]) == {"a": "/x/a/"}
    assert names_of([]) == {}


def test_a_folder_called_reference_is_not_mistaken_for_the_reference() -> None:
    assert names_of(["/x/reference", "/x/b"]) == {"x/reference": "/x/reference", "x/b": "/x/b"}


def test_a_tenth_of_the_prompts_is_held_out() -> None:
    prompts = [Prompt(str(i), [i]) for i in range(25)]
    training, held_out = split_test_prompts(prompts, PPOConfig(prompts="p.txt", seed=1))
    assert (len(training), len(held_out)) == (23, 2)
    assert sorted(p.token_ids[0] for p in training + held_out) == list(range(25))
    assert split_test_prompts(prompts, PPOConfig(prompts="p.txt", seed=1)) == (training, held_out)
    assert split_test_prompts(prompts, PPOConfig(prompts="p.txt", seed=2))[1] != held_out
    assert [len(part) for part in split_test_prompts(prompts[:2], PPOConfig())] == [1, 1]
    with pytest.raises(ValueError, match=r"p\.txt: one prompt cannot be split"):
        split_test_prompts(prompts[:1], PPOConfig(prompts="p.txt"))
