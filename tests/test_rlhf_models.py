"""Reading log-probabilities, values and scores off models: padding changes nothing; what is loaded, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from logging import Handler
from pathlib import Path

import pytest
import torch
import transformers
from helpers import BOS, CONTEXT, EOS, PAD, llama_config, make_tokenizer, pad_more, random_examples
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from rlhf.checkpointing import save_model
from rlhf.data import TokenBatch, batch_examples
from rlhf.models import (
    ScalarHeadModel,
    context_length,
    head_values,
    load_causal_lm,
    load_scalar_head_model,
    load_tokenizer,
    require_checkpoint,
    require_same_tokenizer,
    with_weights,
)
from rlhf.policy import Policy, ValueModel
from rlhf.reference import load_model_reference
from rlhf.rewards import last_token_scores

EXAMPLES = random_examples(seed=0)
ARCHITECTURES = pytest.mark.parametrize("name", ["first", "gpt2"])  # rotary positions, and absolute ones


def logprobs_of(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probabilities [B, T] of the response tokens at a temperature that is not 1."""
    return Policy(model)(batch, temperature=0.7).logprobs  # type: ignore[arg-type]


def response_values(model: ScalarHeadModel, batch: TokenBatch) -> Tensor:
    """Values [B, T] of the states that predict the response tokens."""
    return ValueModel(model)(batch)


def scores_of(model: ScalarHeadModel, batch: TokenBatch) -> Tensor:
    """Scores as a [B, 1] tensor, in the shape that the checks on [B, T] expect."""
    return last_token_scores(model, batch.tokens, batch.attention_mask)[:, None]


def load(folder: Path, scalar: bool) -> nn.Module:
    torch.manual_seed(0)  # draws the head that a language model's folder lacks
    return load_scalar_head_model(folder) if scalar else load_causal_lm(folder)


@ARCHITECTURES
def test_values_and_scores_equal_those_of_each_row_alone(checkpoints: dict[str, Path], name: str) -> None:
    model = load(checkpoints[name], scalar=True)
    assert isinstance(model, ScalarHeadModel)
    batch = batch_examples(EXAMPLES, EOS)
    values, scores = response_values(model, batch), scores_of(model, batch)
    for i, example in enumerate(EXAMPLES):
        hidden = model.model.base_model(torch.tensor([example.token_ids])).last_hidden_state[0]
        expected = hidden @ model.model.score.weight[0]
        num_prompt, num_response = len(example.prompt_ids), len(example.response_ids)
        torch.testing.assert_close(values[i, :num_response], expected[num_prompt - 1 : -1], atol=1e-5, rtol=1e-5)
        assert scores[i].item() == pytest.approx(expected[-1].item(), abs=1e-5)


def test_scores_equal_transformers_own_on_unpadded_rows(checkpoints: dict[str, Path]) -> None:
    batch = batch_examples(EXAMPLES, PAD)
    scores = scores_of(load_scalar_head_model(checkpoints["reward"]), batch)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints["reward"]).eval()
    expected = [model(torch.tensor([example.token_ids])).logits.item() for example in EXAMPLES]
    assert scores.squeeze(1).tolist() == pytest.approx(expected, abs=1e-5)


@ARCHITECTURES
@pytest.mark.parametrize(
    ("read", "scalar"),
    [(logprobs_of, False), (response_values, True), (scores_of, True)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 4), (3, 7)])
def test_more_padding_changes_neither_values_nor_gradients(
    checkpoints: dict[str, Path],
    name: str,
    read: Callable[[nn.Module, TokenBatch], Tensor],
    scalar: bool,
    left: int,
    right: int,
) -> None:
    results = []
    for batch in (short := batch_examples(EXAMPLES, PAD), pad_more(short, left, right)):
        model = load(checkpoints[name], scalar)
        read_values = read(model, batch)
        width = min(read_values.shape[1], short.response_mask.shape[1])
        mask = short.response_mask[:, :width] if width > 1 else torch.ones(len(short), 1, dtype=torch.bool)
        kept = read_values[:, :width].where(mask, 0.0)
        weights = torch.linspace(-1, 1, kept.numel()).view_as(kept)  # no cancellation, every entry different
        (weights * kept).sum().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((kept.detach(), gradients))
    (before, gradients_before), (after, gradients_after) = results
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert gradients_before.keys() == gradients_after.keys()
    for key, gradient in gradients_before.items():
        torch.testing.assert_close(gradients_after[key], gradient, atol=1e-4, rtol=1e-4, msg=key)
        assert gradient.isfinite().all()


@ARCHITECTURES
@pytest.mark.parametrize("scalar", [False, True])
def test_training_mode_computes_what_evaluation_mode_does(
    checkpoints: dict[str, Path], name: str, scalar: bool
) -> None:
    """No dropout is left, or the first ratio of PPO would not be 1."""
    model, batch = load(checkpoints[name], scalar), batch_examples(EXAMPLES, PAD)
    read = response_values if scalar else logprobs_of
    assert not model.training
    before = read(model, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(read(model.train(), batch), before, rtol=0, atol=0)  # type: ignore[arg-type]


def test_head_values_by_hand() -> None:
    head = nn.Linear(2, 1, bias=False).bfloat16()
    head.weight.data = torch.tensor([[2.0, -1.0]]).bfloat16()
    mask = torch.tensor([[True, False], [True, True]])
    values = head_values(head, torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]]), mask)
    assert values.dtype == torch.float32
    assert values.tolist() == [[2, 0], [-3, 1]]


def test_context_length_is_the_configs(checkpoints: dict[str, Path]) -> None:
    assert [context_length(checkpoints[name]) for name in ("first", "gpt2")] == [CONTEXT, CONTEXT]


def test_head_starts_at_zero_on_request_or_with_the_standard_deviation_stated(checkpoints: dict[str, Path]) -> None:
    for name in ("first", "reward"):
        values = response_values(load_scalar_head_model(checkpoints[name], zero_head=True), batch_examples(EXAMPLES, 0))
        assert values.abs().max() == 0
    torch.manual_seed(0)
    heads = torch.cat([load_scalar_head_model(checkpoints["first"]).head.weight.detach() for _ in range(15)])
    # 240 draws of variance 1/(16 + 1); the model's own initializer_range of 0.3 would give 1.53 times that
    assert float(heads.square().mean()) * 17 == pytest.approx(1, abs=0.25)


def test_body_of_a_language_model_is_kept(checkpoints: dict[str, Path]) -> None:
    body = load_scalar_head_model(checkpoints["first"]).body.state_dict()
    expected = load_causal_lm(checkpoints["first"]).base_model.state_dict()
    assert body.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(body[name], tensor), name


def test_reward_models_with_several_labels_are_refused(tmp_path: Path) -> None:
    save_model(LlamaForSequenceClassification(llama_config(num_labels=3)), make_tokenizer(), tmp_path / "three")
    with pytest.raises(ValueError, match=r"three: 3 labels, but a reward model has 1"):
        load_scalar_head_model(tmp_path / "three")


def test_other_weights_in_the_same_architecture(checkpoints: dict[str, Path]) -> None:
    first, second = (load_causal_lm(checkpoints[name]) for name in ("first", "second"))
    stored = {name: tensor for name, tensor in second.state_dict().items() if name != "lm_head.weight"}  # tied
    other, batch = with_weights(first, stored), batch_examples(EXAMPLES, PAD)
    assert torch.equal(logprobs_of(other, batch), logprobs_of(second, batch))
    assert not torch.equal(logprobs_of(first, batch), logprobs_of(second, batch))
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight


def test_tokenizer_pads_on_the_left_with_eos_where_there_is_no_pad_token(checkpoints: dict[str, Path]) -> None:
    for name, pad in (("first", PAD), ("chat", EOS)):
        tokenizer = load_tokenizer(checkpoints[name])
        assert (tokenizer.pad_token_id, tokenizer.padding_side) == (pad, "left")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    with pytest.raises(ValueError, match="no_eos: its tokenizer has no end-of-sequence token"):
        load_tokenizer(checkpoints["no_eos"])


def test_folders_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    for load_folder in (load_causal_lm, load_tokenizer, load_scalar_head_model):
        with pytest.raises(FileNotFoundError, match=r"absent: no such folder"):
            load_folder(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            load_folder(tmp_path)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("larger_vocabulary", "vocabulary of 21 tokens, but .*first has 20"),
        ("reordered_vocabulary", r"tokenizer differs from that of .*first in 14 tokens \(first: \['a', 'b', 'c'\]\)"),
        ("other_eos", "end-of-sequence token 'n', but .*first has '<eos>'"),
    ],
)
def test_different_tokenizers_are_refused_with_both_folders(
    checkpoints: dict[str, Path], second: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"{second}: .*{reason}") as error:
        require_same_tokenizer(checkpoints["first"], checkpoints[second])
    assert "\n" not in str(error.value)


def test_same_tokenizer_passes_also_where_pad_tokens_or_chat_templates_differ(checkpoints: dict[str, Path]) -> None:
    for name in ("first", "second", "gpt2", "chat"):
        require_same_tokenizer(checkpoints["first"], checkpoints[name])


def test_an_adapter_is_folded_into_its_base(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """W + (α / r) B A, and nothing else moves; config and tokenizer are the base's."""
    base = load_causal_lm(checkpoints["first"])
    name = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    prefix = f"base_model.model.{name}"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapted = f"{checkpoints['first']}+{tmp_path}"
    changed = load_causal_lm(adapted).state_dict()
    for key, tensor in base.state_dict().items():
        expected = tensor + 3 * up @ down if key == f"{name}.weight" else tensor
        torch.testing.assert_close(changed[key], expected, atol=1e-6, rtol=1e-6)
    require_same_tokenizer(checkpoints["second"], adapted)
    assert load_tokenizer(adapted).eos_token == "<eos>"
    reference = load_model_reference([adapted, checkpoints["first"]])
    average = reference.model.get_submodule(name).weight
    torch.testing.assert_close(average, base.get_submodule(name).weight + 1.5 * up @ down, atol=1e-6, rtol=1e-6)


def test_a_hub_id_stands_for_its_snapshot(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf.models.locate", lambda source, allow_pickle: checkpoints["first"])
    assert require_checkpoint("org/name@main") == checkpoints["first"]
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        require_checkpoint("absent")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_what_is_wrong_with_weights_is_told_by_the_error_alone(
    change: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(checkpoints["first"], folder)
    tensors = load_file(folder / "model.safetensors")
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    records: list[str] = []
    handler = Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    transformers.utils.logging.add_handler(handler)
    try:
        with pytest.raises(ValueError, match=r"model\.(norm|extra)\.weight"):
            load_causal_lm(folder)
    finally:
        transformers.utils.logging.remove_handler(handler)
    assert records == []
