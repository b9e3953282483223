"""LoRA: what is trained and what stays, the folders that come of it, and adapters that are gone on with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOS, ppo_arguments
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf import ppo
from rlhf.config import PPOConfig
from rlhf.lora import LoraSettings, add_adapter, linear_layers, load_with_adapter, save_adapter
from rlhf.models import load_causal_lm, load_scalar_head_model
from rlhf.policy import halve_linear_layers, mixed_precision
from rlhf.setup import set_up

peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 6.0
TOKENS = torch.tensor([[BOS, 5, 7, 9, 11, 6]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of adapters, by layer and letter."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in matrices(model).values():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture(params=["first", "gpt2"])
def folder(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> str:
    return str(checkpoints[request.param])


@pytest.fixture
def trained(checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with LoRA on the query and the down projections."""
    monkeypatch.setattr("rlhf.figures.draw_run", lambda run: [])
    run = tmp_path / "run"
    ppo.main(ppo_arguments(checkpoints, prompt_file, run, lora_rank=RANK, lora_targets=["q_proj", "down_proj"]))
    return run


def test_an_adapter_starts_at_the_model_it_is_added_to(folder: str) -> None:
    model = load_with_adapter(folder, LoraSettings(RANK, ALPHA))
    assert torch.equal(logits(model), logits(load_causal_lm(folder)))
    ends = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ends == {"default"}  # of lora_A.default.weight: nothing else is trained
    assert {name.split(".")[-4] for name in matrices(model)} == set(linear_layers(load_causal_lm(folder)))
    again, other = (load_with_adapter(folder, LoraSettings(RANK, ALPHA, seed=seed)) for seed in (0, 1))
    same = [all(map(torch.equal, matrices(model).values(), matrices(m).values())) for m in (again, other)]
    assert same == [True, False]


def test_the_layer_is_the_formulas(checkpoints: dict[str, Path]) -> None:
    """x Wᵀ + (α/r) x Aᵀ Bᵀ"""
    model = randomised(load_with_adapter(str(checkpoints["first"]), LoraSettings(RANK, ALPHA, ("v_proj",))))
    layer = model.base_model.layers[1].self_attn.v_proj
    a, b = (matrices(model)[f"model.layers.1.self_attn.v_proj.lora_{letter}.default.weight"] for letter in "AB")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    expected = x @ layer.base_layer.weight.T + ALPHA / RANK * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert (a.shape, b.shape) == ((RANK, 16), (layer.base_layer.out_features, RANK))


def test_training_changes_adapters_alone(checkpoints: dict[str, Path], prompt_file: Path) -> None:
    config = PPOConfig(
        policy=str(checkpoints["first"]), reward=["helpers:share_of_a"], prompts=str(prompt_file), lora_rank=RANK,
        batch_size=8, minibatch_size=4, max_new_tokens=6, learning_rate=0.1, value_learning_rate=0.1,
    )  # fmt: skip
    run = set_up(config)
    before = {
        (name, n): p.detach().clone() for name, lr in run.learners.items() for n, p in lr.module.named_parameters()
    }
    for update in (1, 2):  # B is zero at first, so that A has no gradient
        ppo.one_update(run, update)
    changed = {
        (name, n)
        for name, learner in run.learners.items()
        for n, p in learner.module.named_parameters()
        if not torch.equal(p, before[name, n])
    }
    assert changed == {(name, n) for name, n in before if "lora_" in n or n == "scalar.model.score.weight"}
    assert {name for name, _ in changed} == {"policy", "value"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_the_folders_of_a_run_are_one_model(trained: Path, checkpoints: dict[str, Path]) -> None:
    base = str(checkpoints["first"])
    whole = logits(AutoModelForCausalLM.from_pretrained(trained / "policy"))
    assert not torch.allclose(whole, logits(load_causal_lm(base)), atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trained / "adapter")
    torch.testing.assert_close(logits(loaded), whole, rtol=1e-4, atol=1e-5)
    continued = load_with_adapter(f"{base}+{trained / 'adapter'}", LoraSettings(RANK))
    torch.testing.assert_close(logits(continued), whole, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in continued.named_parameters())

    written = json.loads((trained / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == base
    assert written["target_modules"] == ["down_proj", "q_proj"]
    assert (written["r"], written["lora_alpha"]) == (RANK, 32.0)


def test_a_run_goes_on_with_an_adapter_and_a_soup_of_adapters_as_its_reference(
    trained: Path, checkpoints: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    base = checkpoints["first"]
    adapter = f"{base}+{trained / 'adapter'}"
    output = tmp_path / "second"
    settings: dict[str, Any] = {
        "policy": adapter, "reference": [base, adapter], "lora_rank": RANK, "kl_in": "reward", "updates": 1,
        "learning_rate": 1e-9,
    }  # fmt: skip
    ppo.main(ppo_arguments(checkpoints, prompt_file, output, **settings))
    second, first = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (output, trained))
    assert second.keys() == first.keys()
    for name, matrix in first.items():
        torch.testing.assert_close(second[name], matrix, atol=1e-6, rtol=0)
    (row,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["kl/reference"] > 0
    assert row["ratio_deviation_first"] < 1e-4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_an_adapter_that_peft_saved_is_trained_on(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = str(checkpoints["first"])
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r".*\.(q|v)_proj", init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_with_adapter(f"{base}+{tmp_path / 'adapter'}", LoraSettings(RANK, ALPHA))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    again = tmp_path / "again"
    again.mkdir()
    save_adapter(model, base, again, matrices(model))
    written = json.loads((again / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["target_modules"] == r".*\.(q|v)_proj"


def test_a_value_model_starts_from_the_body_with_its_adapter(checkpoints: dict[str, Path], trained: Path) -> None:
    folder = f"{checkpoints['first']}+{trained / 'adapter'}"
    body, whole = load_scalar_head_model(folder).body, load_causal_lm(folder).base_model
    for name, weight in whole.state_dict().items():
        assert torch.equal(body.state_dict()[name], weight), name
    assert not torch.equal(
        body.layers[0].self_attn.q_proj.weight,
        load_causal_lm(checkpoints["first"]).base_model.layers[0].self_attn.q_proj.weight,
    )


def test_frozen_weights_in_bfloat16_give_the_same_products(checkpoints: dict[str, Path]) -> None:
    whole, halved = (
        randomised(load_with_adapter(str(checkpoints["first"]), LoraSettings(RANK, ALPHA))) for _ in range(2)
    )
    halve_linear_layers(halved, frozen_only=True)
    kinds = {parameter.dtype for name, parameter in halved.named_parameters() if "base_layer" in name}
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in matrices(halved).values()} == {torch.float32}
    assert halved.get_input_embeddings().weight.dtype == torch.float32
    with mixed_precision(torch.device("cpu"), "bf16"):
        assert torch.equal(logits(halved), logits(whole))


def test_what_no_adapter_can_be_made_of_or_gone_on_with(
    checkpoints: dict[str, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = str(checkpoints["first"]), trained / "adapter"
    with pytest.raises(ValueError, match=r"lora_targets=\['lm_head'\]: no such linear layers in .*it has \['q_proj'"):
        add_adapter(load_causal_lm(base), LoraSettings(RANK, ALPHA, ("q_proj", "lm_head")))
    with pytest.raises(ValueError, match=f"lora_rank=8: the adapter of .* has rank {RANK} and is trained on; give"):
        load_with_adapter(f"{base}+{adapter}", LoraSettings(8, ALPHA))

    with pytest.raises(ValueError, match="lora_rank with reference_kind=moving_average: a policy with adapters is not"):
        PPOConfig(lora_rank=4, reference_kind="moving_average")
    for others in ({"alpha": 1.0}, {"targets": ("q_proj",)}):
        with pytest.raises(ValueError, match="lora_alpha and lora_targets are those of the adapter of"):
            load_with_adapter(f"{base}+{adapter}", LoraSettings(RANK, **others))
    for setting in ({"lora_alpha": 3.0}, {"lora_targets": ["q_proj"]}):
        with pytest.raises(ValueError, match="change nothing without adapters; give lora_rank too"):
            PPOConfig(**setting)
    dora = tmp_path / "dora"
    dora.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (dora / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}), encoding="utf-8")
    with pytest.raises(ValueError, match="uses use_dora, which is not supported"):
        load_with_adapter(f"{base}+{dora}", LoraSettings(RANK))

    more = tmp_path / "more"
    more.mkdir()
    (more / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, more / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds more than LoRA matrices for .*fold it into its base"):
        load_with_adapter(f"{base}+{more}", LoraSettings(RANK))

    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=re.escape("lora_rank: peft is not installed; pip install peft, or set")):
        load_with_adapter(base, LoraSettings(RANK, ALPHA))
