"""soupkit's tools: diff, inspect, verify, the model card of a soup, and the page of all methods."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import yaml
from helpers import ROOT, make_llama, run_python
from safetensors.torch import save_file

import soupkit
from soupkit import hashing, inspection, verification
from soupkit.__main__ import main
from soupkit.card import code, fenced, hub_ids_of, model_card
from soupkit.diff import diff
from soupkit.errors import MergeError
from soupkit.inspection import KEYS_OF_SIZE, count_layers, inspect
from soupkit.layers import layer_name
from soupkit.method_page import example_recipe, method_page
from soupkit.methods import METHODS, Method, Parameter
from soupkit.recipe import Recipe, load_recipe
from soupkit.tables import number, percent, printable, size, text_table
from soupkit.verification import verify


def save(folder: Path, state: dict[str, torch.Tensor], *, shards: int = 1, **config: Any) -> Path:
    """Write a checkpoint with the safetensors library."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(state.items())[index::shards])
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quietly(*models: Any, **options: Any) -> Any:
    return diff(*models, progress=False, **options)


# --- diff ---


def test_diff_by_hand():
    a, b, base = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 1.0])
    found = quietly({"w": a}, {"w": b}, base={"w": base}).tensors[0].distance
    assert found.l2 == 4
    assert found.relative == 4 / 5
    assert found.max_abs == 4
    assert found.cosine == pytest.approx(9 / 15, abs=1e-15)
    assert found.equal_share == 1 / 2
    # a - base = (1, 3), b - base = (1, -1)
    assert found.task_norm_a == pytest.approx(10**0.5)
    assert found.task_norm_b == pytest.approx(2**0.5)
    assert found.task_cosine == pytest.approx(-2 / 20**0.5)
    assert found.num_both_moved == 2
    assert found.sign_agreement == 1 / 2


def test_sign_agreement_counts_where_both_moved():
    base = torch.zeros(6)
    a = torch.tensor([1.0, 1.0, -2.0, 0.0, 5.0, 0.0])
    b = torch.tensor([7.0, -1.0, -1e-30, 3.0, 0.0, 0.0])
    found = quietly({"w": a}, {"w": b}, base={"w": base}).total
    assert found.num_both_moved == 3
    assert found.sign_agreement == 2 / 3


def test_total_is_of_floating_tensors_laid_end_to_end():
    a = {"x": torch.tensor([1.0, 0.0]), "n": torch.arange(5), "y": torch.tensor([[2.0]])}
    b = {"x": torch.tensor([1.0, 2.0]), "n": torch.arange(5) + 9, "y": torch.tensor([[0.0]])}
    found = quietly(a, b)
    assert found.total.num_elements == 3
    assert found.total.l2 == 8**0.5
    assert found.total.relative == pytest.approx((8 / 5) ** 0.5)
    assert found.total.max_abs == 2
    assert found.total.equal_share == 1 / 3
    assert [tensor.distance.max_abs for tensor in found.tensors] == [2, 9, 2]


def oracle(a: np.ndarray, b: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """The same figures from whole float64 arrays."""
    task_a, task_b = a - base, b - base
    moved = (task_a != 0) & (task_b != 0)
    return {
        "num_elements": a.size,
        "l2": np.linalg.norm(a - b),
        "relative": np.linalg.norm(a - b) / np.linalg.norm(a),
        "max_abs": np.abs(a - b).max(),
        "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "equal_share": np.mean(a == b),
        "task_norm_a": np.linalg.norm(task_a),
        "task_norm_b": np.linalg.norm(task_b),
        "task_cosine": task_a @ task_b / np.linalg.norm(task_a) / np.linalg.norm(task_b),
        "sign_agreement": np.mean(np.sign(task_a[moved]) == np.sign(task_b[moved])),
        "num_both_moved": moved.sum(),
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_streamed_figures_are_those_of_whole_arrays(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(inspection, "BLOCK", 100)
    monkeypatch.setattr(inspection, "SPAN", 256)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed.weight": (37, 11),
        "model.layers.0.w": (1013,),
        "model.layers.10.w": (),
        "model.layers.2.w": (7, 2, 3),
    }
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Far from zero, so that float32 sums would not do; rounded, so that some elements are equal.
    states = [
        {name: (x + 3e3 + 0.02 * torch.randn(x.shape, generator=generator)).to(dtype) for name, x in base.items()}
        for dtype in (torch.float32, torch.bfloat16)
    ]
    folders = [save(tmp_path / name, state, shards=shards) for name, state in zip("ab", states, strict=True)]
    found = quietly(*folders, base=save(tmp_path / "base", base))
    wide = [{name: x.double().numpy().ravel() for name, x in state.items()} for state in (*states, base)]
    for tensor in found.tensors:
        expected = oracle(*(state[tensor.name] for state in wide))
        actual = {name: getattr(tensor.distance, name) for name in expected}
        assert actual == pytest.approx(expected, rel=1e-12)
        assert tensor.dtypes == ("float32", "bfloat16")
        assert tensor.shape == shapes[tensor.name]
    joined = oracle(*(np.concatenate([state[name] for name in shapes]) for state in wide))
    assert {name: getattr(found.total, name) for name in joined} == pytest.approx(joined, rel=1e-12)
    assert set(found.layers) == {"(outside layers)", "model.layers.0", "model.layers.2", "model.layers.10"}
    assert found.layers["model.layers.0"].l2 == pytest.approx(oracle(*(s["model.layers.0.w"] for s in wide))["l2"])
    again = quietly(*states, base=base)
    assert [tensor.distance for tensor in sorted(again.tensors, key=lambda t: t.name)] == [
        tensor.distance for tensor in sorted(found.tensors, key=lambda t: t.name)
    ]


def test_numbers_of_threads_do_not_matter(monkeypatch):
    monkeypatch.setattr(inspection, "SPAN", 64)
    monkeypatch.setattr(inspection, "BLOCK", 20)
    states = [{"w": torch.randn(999, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
    torch.set_num_threads(2)
    try:
        totals = []
        for count in (1, 3):
            monkeypatch.setattr(inspection, "parse_num_threads", lambda _, count=count: count)
            totals.append(quietly(*states).total)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert totals[0] == totals[1]


def test_only_blocks_are_read(monkeypatch):
    lengths = []

    class Watched:
        dtype, shape = torch.float32, (1000,)

        def open(self):
            return self

        def __enter__(self):
            return self.read

        def __exit__(self, *exception):
            return None

        def read(self, start, stop):
            lengths.append(stop - start)
            return torch.ones(stop - start)

    monkeypatch.setattr(inspection, "BLOCK", 128)
    sums = inspection.streamed_sums({"w": [Watched()]}, lambda blocks: float(blocks[0].sum()), 0.0, "test", False)
    assert sums == {"w": 1000.0}
    assert max(lengths) == 128


def test_non_finite_values_are_counted_and_left_out():
    nan, inf = torch.nan, torch.inf
    a = torch.tensor([1.0, nan, nan, inf, 5.0, 2.0])
    b = torch.tensor([1.0, nan, 2.0, inf, -inf, 4.0])
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, nan])
    found = quietly({"w": a}, {"w": b}, base={"w": base})
    total = found.total
    assert (total.num_nan_a, total.num_inf_a, total.num_nan_b, total.num_inf_b) == (2, 1, 1, 2)
    assert total.num_non_finite_base == 1
    assert total.l2 == 2  # of the first and the last element
    assert total.relative == 2 / 5**0.5
    assert total.equal_share == 3 / 6  # 1, NaN in both, infinity in both
    assert (total.task_norm_a, total.task_norm_b) == (1, 1)
    assert total.num_both_moved == 1
    assert "2 NaN and 1 infinite values in a, 1 and 2 in b, 1 in the base: w" in str(found)


def test_undefined_figures_are_none_in_json():
    found = quietly({"z": torch.zeros(2), "e": torch.zeros(0)}, {"z": torch.ones(2), "e": torch.zeros(0)})
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["total"]["relative"] is None
    assert content["total"]["cosine"] is None
    assert content["tensors"]["e"]["equal_share"] is None
    assert content["tensors"]["e"]["relative"] == 0
    assert "task_cosine" not in content["total"]
    assert "inf" in str(found)


def test_integers_are_compared_exactly():
    a = {"n": torch.tensor([2**53, 7]), "w": torch.ones(1)}
    found = quietly(a, {"n": torch.tensor([2**53 + 1, 7]), "w": torch.ones(1)})
    assert found.tensors[0].distance.num_equal == 1
    assert not found.same_weights
    assert quietly(a, a).same_weights


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bool, torch.uint16, torch.uint64])
def test_dtypes(dtype):
    x, y = torch.tensor([0.0, 1.0]).to(dtype), torch.tensor([1.0, 1.0]).to(dtype)
    found = quietly({"w": x}, {"w": y}).tensors[0].distance
    assert (found.l2, found.equal_share) == (1, 0.5)


def test_same_weights_needs_names_shapes_and_dtypes():
    state = {"w": torch.ones(2), "v": torch.ones(1)}
    assert quietly(state, dict(state)).same_weights
    assert not quietly(state, {"w": torch.ones(2)}).same_weights
    assert not quietly({"w": torch.ones(2)}, state).same_weights
    assert not quietly(state, state | {"v": torch.ones(2)}).same_weights
    assert not quietly(state, state | {"v": torch.ones(1).half()}).same_weights
    assert not quietly(state, state | {"v": torch.zeros(1)}).same_weights


def test_what_does_not_fit_is_told():
    a = {"w": torch.ones(2), "v": torch.ones(1), "only": torch.ones(1), "h": torch.ones(2)}
    b = {"w": torch.ones(2), "v": torch.ones(3), "other": torch.ones(1), "h": torch.ones(2).half()}
    found = quietly(a, b, base={"w": torch.zeros(2, 1), "h": torch.zeros(2)})
    assert [tensor.name for tensor in found.tensors] == ["w", "h"]
    assert found.only_in_a == ("only",)
    assert found.only_in_b == ("other",)
    assert found.shapes == {"v": ((1,), (3,))}
    assert found.not_in_base == ("w",)
    assert found.total.task_norm_a == 2**0.5  # of h alone
    printed = str(found)
    for line in ("v is 1 in a, 3 in b", "only in a: only", "only in b: other", "base: w", "dtypes differ: h"):
        assert line in printed
    total = printed.split("\n\n")[1].splitlines()
    assert re.fullmatch(r"tensors left out +1 only in a, 1 only in b, 1 of other shapes", total[1])
    assert re.fullmatch(r"elements +4", total[2])
    place = next(number for number, line in enumerate(total) if line.startswith("tensors not in the base, left out "))
    assert total[place].endswith(" 1")
    assert total[place + 1].startswith("‖a−base‖ ")
    assert "left out" not in str(quietly({"w": a["w"]}, {"w": b["w"]}, base={"w": b["w"]}))
    assert re.search(r"\ntensors left out +3 only in b\n", str(quietly({"w": a["w"]}, a)))


def test_the_most_different_tensors_come_first():
    a = {f"model.layers.{i}.w": torch.ones(4) for i in range(20)} | {"same.w": torch.ones(4)}
    b = {name: x * (1 + 0.01 * i) for i, (name, x) in enumerate(a.items())} | {"same.w": torch.ones(4)}
    lines = str(quietly(a, b)).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("most different tensors")) + 1 :]
    assert [line.split()[0] for line in table] == [f"model.layers.{i}.w" for i in range(19, 4, -1)]
    assert table[0].split()[1:5] == ["0.19", "0.38", "0.19", "1"]
    short = quietly(a, b).render(num_tensors=2).splitlines()
    assert short[-1].startswith("model.layers.18.w")
    by_layer = quietly(a, b).render(by_layer=True).splitlines()
    assert by_layer[-21].startswith("(outside layers)")
    assert by_layer[-1].startswith("model.layers.19 ")
    assert "most different tensors, 2 of 19 " in quietly(a, b).render(num_tensors=2)
    assert "most different" not in str(quietly(a, a))


def test_kinds_gather_layers_and_experts():
    names = [f"layers.{i}.experts.{j}.w2" for i in range(3) for j in range(2)]
    a = {name: torch.zeros(2) for name in [*names, "norm.w", "same.1"]}
    b = a | {name: torch.tensor([1.0, 0.0]) for name in names} | {"norm.w": torch.tensor([3.0, 4.0])}
    found = quietly(a, b)
    assert {kind: distance.squares for kind, distance in found.kinds.items()} == {
        "layers.*.experts.*.w2": 6, "norm.w": 25, "same.*": 0,
    }  # fmt: skip
    assert found.to_dict()["kinds"]["layers.*.experts.*.w2"]["l2"] == pytest.approx(6**0.5)
    assert found.to_dict()["layers"]["layers.1"]["num_elements"] == 4
    assert "most different kinds, 2 of 2 " in str(found)
    assert "most different kinds" not in str(quietly({"w": a["norm.w"]}, {"w": b["norm.w"]}))


def test_tables_fit_a_screen():
    x = torch.linspace(-1, 1, 99)
    name = "model.layers.11.post_attention_layernorm.bias"
    base, a, b = {name: x}, {name: x + x.square() / 4e4}, {name: x - x.square() / 3e4}
    for found in (quietly(a, b), quietly(a, b, base=base)):
        assert max(map(len, str(found).splitlines())) <= 100


def test_cosines_near_one_do_not_read_as_one():
    a = torch.tensor([1.0, 0.0])
    for b, text in (([1.0, 3e-4], "1−4.5e-08"), ([1.0, 3e-3], "0.999996"), ([2.0, 0.0], "1"), ([-1.0, 0.0], "-1")):
        assert re.search(f"cosine of a and b +{text}\n", str(quietly({"w": a}, {"w": torch.tensor(b)})))


def test_config_and_tokenizer_differences(checkpoints):
    first = checkpoints["first"]
    found = quietly(first, checkpoints["larger_vocabulary"])
    assert found.config["vocab_size"] == {"a": 20, "b": 21}
    assert found.tokenizer[0] == "1 tokens only in b: 'o'"
    assert "model.embed_tokens.weight is 20×16 in a, 21×16 in b" in str(found)
    found = quietly(first, checkpoints["reordered_vocabulary"])
    assert found.config == {}
    assert found.tokenizer == (
        "14 tokens with different ids: 'a' (6 and 19), 'b' (7 and 18), 'c' (8 and 17), 'd' (9 and 16), 'e' (10 and 15) "
        "and 9 more",
    )
    found = quietly(first, checkpoints["chat"])
    assert found.same_weights
    assert {"chat_template.jinja is only in b", "tokenizer_config.json differs"} <= set(found.tokenizer)
    assert quietly(first, checkpoints["second"]).tokenizer == ()
    json.dumps(found.to_dict(), allow_nan=False)


def test_merges_are_part_of_a_tokenizer(tmp_path):
    folders = [save(tmp_path / name, {"w": torch.ones(1)}) for name in "ab"]
    for folder, merges in zip(folders, (["x y"], ["y x"]), strict=True):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}, "merges": merges}}))
    assert quietly(*folders).tokenizer == ("the merges of tokenizer.json differ",)
    (folders[1] / "tokenizer.json").unlink()
    assert quietly(*folders).tokenizer == ("tokenizer.json is only in a",)


def test_config_keys_of_parts_and_absent_ones(tmp_path):
    state = {"w": torch.ones(1)}
    a = save(tmp_path / "a", state, text_config={"rope": 1, "same": 2}, gone=None)
    b = save(tmp_path / "b", state, text_config={"rope": 3, "same": 2})
    found = quietly(a, b)
    assert found.config == {"text_config.rope": {"a": 1, "b": 3}, "gone": {"a": None}}
    assert "config.json: gone is null in a, absent in b" in str(found)


def test_tied_names_count_once(checkpoints):
    tied, untied = make_llama(1), make_llama(2, tie_word_embeddings=False)
    num_parameters = sum(parameter.numel() for parameter in tied.parameters())
    for other in (checkpoints["second"], make_llama(2)):
        for models in ((tied, other), (other, tied)):
            found = quietly(*models)
            assert found.total.num_elements == num_parameters
            assert found.only_in_a == found.only_in_b == ()
    assert quietly(tied, checkpoints["first"]).same_weights
    found = quietly(tied, untied)  # the head is another one there
    assert "lm_head.weight" in {tensor.name for tensor in found.tensors}
    assert quietly(untied, checkpoints["first"]).only_in_a == ("lm_head.weight",)


def test_diff_refuses():
    with pytest.raises(MergeError, match="no tensor of the same name and shape"):
        quietly({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(MergeError, match="b is a list: give a checkpoint folder, a state dict or a module"):
        quietly({"a": torch.ones(1)}, [torch.ones(1)])
    with pytest.raises(MergeError, match="does not exist"):
        quietly({"a": torch.ones(1)}, "/nowhere/at/all")


def test_diff_leaves_its_input_alone():
    a, b = torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 1.0])
    quietly({"w": a}, {"w": b}, base={"w": b})
    assert torch.equal(a, torch.tensor([1.0, torch.nan])) or a[0] == 1
    assert b.tolist() == [2, 1]


def test_bars_are_in_bytes(capsys):
    diff({"w": torch.ones(1000)}, {"w": torch.ones(1000).half()})
    assert "6.00k/6.00k" in capsys.readouterr().err
    quietly({"w": torch.ones(1000)}, {"w": torch.ones(1000)})
    assert capsys.readouterr().err == ""


# --- inspect ---


def test_inspect_names_what_a_checkpoint_is(checkpoints):
    found = inspect(checkpoints["first"])
    model = make_llama(1)
    assert found.architecture == "LlamaForCausalLM"
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.dtypes == {"float32": {"tensors": 20, "elements": found.num_parameters}}
    assert found.layers == {"model.layers": 2}
    assert found.head == "tied to the embeddings"
    assert found.vocabulary == {
        "vocab_size of config.json": 20,
        "rows of model.embed_tokens.weight": 20,
        "tokens of tokenizer.json": 20,
    }
    assert found.sizes["hidden_size"] == 16
    file = checkpoints["first"] / "model.safetensors"
    assert found.files == {"model.safetensors": file.stat().st_size}
    assert found.making == found.notes == ()
    printed = found.render(tensors=True)
    assert re.search(r"^parameters +5,008$", printed, re.M)
    assert re.search(r"^model\.layers\.1\.mlp\.down_proj\.weight +float32 +16×32$", printed, re.M)
    assert "model.layers.1.mlp" not in str(found)
    assert json.loads(json.dumps(found.to_dict()))["num_parameters"] == 5008


def test_heads(checkpoints, tmp_path):
    assert inspect(checkpoints["reward"]).head == "no language-model head"
    state = {"embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.zeros(3, 2)}
    causal = {"architectures": ["XForCausalLM"]}
    assert inspect(save(tmp_path / "a", state, **causal, tie_word_embeddings=False)).head == "stored as lm_head.weight"
    found = inspect(save(tmp_path / "b", state, **causal, tie_word_embeddings=True))
    assert found.head == "stored as lm_head.weight, though the config ties it to the embeddings"
    del state["lm_head.weight"]
    assert inspect(save(tmp_path / "c", state, **causal)).head == "tied to the embeddings"
    found = inspect(save(tmp_path / "d", state, **causal, tie_word_embeddings=False))
    assert found.head == "missing: the config does not tie it to the embeddings"
    found = inspect(save(tmp_path / "e", state))
    assert (found.architecture, found.head) == ("unknown", "no language-model head")


def test_layers_are_named_by_their_first_number():
    assert layer_name("model.layers.3.mlp.experts.17.up.weight") == "model.layers.3"
    assert layer_name("h.0.attn.weight") == "h.0"
    assert layer_name("0.weight") == "0"
    assert layer_name("model.norm2.weight") is None
    assert layer_name("lm_head.weight") is None
    names = ["enc.1.w", "enc.0.w", "dec.0.w", "enc.1.b", "norm.weight"]
    assert count_layers(names) == {"enc": 2, "dec": 1}


def test_statistics_are_those_of_whole_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "BLOCK", 100)
    monkeypatch.setattr(inspection, "SPAN", 256)
    generator = torch.Generator().manual_seed(0)
    state = {
        # Σx² − (Σx)²/N would lose all digits of this one's spread.
        "far": 1e8 + 1e-3 * torch.randn(1001, generator=generator, dtype=torch.float64),
        "half": torch.randn(30, 9, generator=generator).bfloat16(),
        "ids": torch.arange(300),
        "one": torch.tensor(-2.5),
        "none": torch.zeros(0, 3),
        "bad": torch.tensor([1.0, torch.nan, torch.inf, 3.0, -torch.inf, torch.nan]),
        "nan": torch.full((250,), torch.nan),
    }
    found = {
        tensor.name: tensor.moments
        for tensor in inspect(save(tmp_path / "m", state), statistics=True, progress=False).tensors
    }
    for name, tensor in state.items():
        values = tensor.double().numpy().ravel()
        finite = values[np.isfinite(values)]
        moments = found[name]
        assert moments.num_finite == finite.size
        assert (moments.num_nan, moments.num_inf) == (np.isnan(values).sum(), np.isinf(values).sum())
        if finite.size:
            assert moments.mean == pytest.approx(finite.mean(), rel=1e-12, abs=1e-15)
            assert moments.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-15)
            assert (moments.min, moments.max) == (finite.min(), finite.max())
        else:
            assert np.isnan([moments.mean, moments.std, moments.min, moments.max]).all()
    assert inspect(tmp_path / "m").num_parameters == 1001 + 270 + 1 + 0 + 6 + 250  # ids are none
    printed = inspect(tmp_path / "m", statistics=True, progress=False).render(tensors=True)
    assert re.search(r"^bad +float32 +6 +2 +1 +1 +3 +2 +2$", printed, re.M)
    assert re.search(r"^nan +float32 +250 +- +- +- +- +250 +0$", printed, re.M)
    json.dumps(inspect(tmp_path / "m", statistics=True, progress=False).to_dict(), allow_nan=False)


RECORD = {
    "soupkit": "9.9",
    "recipe": {
        "method": "ties",
        "base": "runs/pretrained",
        "models": [{"model": "org/model", "weight": 2.0}, {"model": "runs/sft 1", "weight": 0.25}],
        "parameters": {"density": [0.5, 1.0]},
        "dtype": "bfloat16",
    },
    "ingredients": [],
    "dtype": "bfloat16",
    "files": {},
}


def test_inspect_tells_how_a_soup_was_made(tmp_path):
    folder = save(tmp_path / "soup", {"w": torch.ones(1)})
    (folder / "soup.json").write_text(json.dumps(RECORD))
    assert inspect(folder).making == (
        "ties, by soupkit 9.9",
        "density = [0.5, 1.0]",
        "base runs/pretrained",
        "ingredient org/model with weight = 2.0",
        "ingredient runs/sft 1 with weight = 0.25",
    )
    assert "ingredient runs/sft 1 with weight = 0.25" in str(inspect(folder))
    unlike = "is not as soupkit writes it"
    forged = json.dumps(RECORD | {"fallback": {"tensors": "all", "of": 3, "rule": "a line"}})
    for content, note in (("{", "soup.json is not valid JSON"), ('{"recipe": 3}', unlike), (forged, unlike)):
        (folder / "soup.json").write_text(content)
        found = inspect(folder)
        assert found.making == ()
        assert note in found.notes[0]
        assert note in str(found)


def test_inspect_adds_up_shards(tmp_path):
    folder = save(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(3)}, shards=2)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    printed = str(inspect(folder, progress=False))
    assert re.search(rf"\nfiles +2 shards, {num_bytes} B\nfile +.*1-of.*\nfile +.*2-of", printed)


def test_inspect_refuses_a_damaged_tokenizer_and_prints_no_control_characters(tmp_path):
    folder = save(tmp_path / "m", {"evil\x1b[2Jname": torch.ones(1)}, architectures=["A\nB"])
    printed = inspect(folder).render(tensors=True)
    assert "evil\\x1b[2Jname" in printed
    assert "A\\nB" in printed
    assert "\x1b" not in printed
    (folder / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(MergeError, match=r"tokenizer\.json is damaged"):
        inspect(folder)


# --- verify ---


def entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_record(folder: Path, files: dict[str, Any], ingredients: Any = ()) -> None:
    (folder / "soup.json").write_text(json.dumps(RECORD | {"files": files, "ingredients": ingredients}))


@pytest.fixture
def soup(tmp_path: Path) -> Path:
    """A folder with files and their record; two ingredients beside it."""
    folders = {}
    for name in ("soup", "a", "b"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "model.safetensors").write_bytes(name.encode() * 1000)
    (folders["soup"] / "config.json").write_text("{}")
    files = {name: entry(folders["soup"] / name) for name in ("model.safetensors", "config.json")}
    ingredients = [
        {
            "folder": str(folders[name]),
            "role": role,
            "files": {"model.safetensors": entry(folders[name] / "model.safetensors")},
        }
        for name, role in (("a", "ingredient"), ("b", "base"))
    ]
    write_record(folders["soup"], files, ingredients)
    (folders["soup"] / "README.md").write_text("edited")
    return folders["soup"]


def check(folder: Path, **options: Any) -> Any:
    return verify(folder, progress=False, **options)


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_an_intact_soup(soup, monkeypatch, chunk):
    monkeypatch.setattr(hashing, "CHUNK", chunk)
    (soup / ".gitattributes").write_text("hidden files are no part of a model")
    found = check(soup, ingredients=True)
    assert found.ok
    assert str(found).splitlines() == [
        f"soup {soup}: 2 of 2 files as recorded",
        f"ingredient {soup.parent / 'a'}: 1 of 1 files as recorded",
        f"base {soup.parent / 'b'}: 1 of 1 files as recorded",
        "ok",
    ]
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


def test_missing_changed_and_extra_files(soup):
    weights = soup / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"x")
    found = check(soup)
    assert not found.ok
    assert found.soup.problems == {"model.safetensors": "changed: same size, other content", "config.json": None}
    weights.write_bytes(good[:-1])
    assert check(soup).soup.problems["model.safetensors"] == "changed: 3,999 bytes instead of 4,000"
    weights.unlink()
    found = check(soup)
    assert found.soup.problems["model.safetensors"] == "missing"
    assert str(found).splitlines()[-3:] == [
        f"soup {soup}: 1 of 2 files as recorded",
        "  model.safetensors: missing",
        "NOT as recorded",
    ]
    weights.mkdir()
    assert check(soup).soup.problems["model.safetensors"] == "changed: not a regular file"
    weights.rmdir()
    os.mkfifo(weights)  # opening it would wait for ever
    assert check(soup).soup.problems["model.safetensors"] == "changed: not a regular file"
    weights.unlink()
    weights.write_bytes(good)
    assert check(soup).ok
    (soup / "pytorch_model.bin").write_bytes(b"")
    (soup / "more").mkdir()
    found = check(soup)
    assert not found.ok
    assert found.soup.extra == ("more/", "pytorch_model.bin")
    assert "  pytorch_model.bin: extra, not written by the merge" in str(found)


def test_a_file_of_another_size_is_not_read(soup, monkeypatch):
    (soup / "model.safetensors").write_bytes(b"short")
    read = []
    monkeypatch.setattr(verification, "hash_file", lambda path, *_: read.append(path.name) or "")
    check(soup)
    assert read == ["config.json"]


def test_ingredients_changed_and_moved_away(soup):
    (soup.parent / "a" / "model.safetensors").write_bytes(b"b" * 1000)
    (soup.parent / "b").rename(soup.parent / "elsewhere")
    assert check(soup).ok
    found = check(soup, ingredients=True)
    assert not found.ok
    assert found.soup.ok
    assert found.ingredients[0].problems == {"model.safetensors": "changed: same size, other content"}
    assert not found.ingredients[1].present
    assert not found.ingredients[1].ok
    assert f"base {soup.parent / 'b'}: absent, 1 files not checked" in str(found)
    assert str(found).splitlines()[-1] == "NOT as recorded, and 1 model is absent"
    assert (found.changed, found.num_absent) == (True, 1)


def test_absent_is_told_apart_from_changed(soup, capsys):
    def run(*options: str) -> tuple[int, str]:
        code = main(["verify", str(soup), "--quiet", *options])
        return code, capsys.readouterr().out.splitlines()[-1]

    assert run("--ingredients") == (0, "ok")
    (soup.parent / "b").rename(soup.parent / "elsewhere")
    found = check(soup, ingredients=True)
    assert (found.ok, found.changed, found.num_absent) == (False, False, 1)
    assert [(part["ok"], part["changed"]) for part in found.to_dict()["ingredients"]] == [(True, False), (False, False)]
    assert (found.to_dict()["changed"], found.to_dict()["num_absent"]) == (False, 1)
    assert run() == (0, "ok")
    assert run("--ingredients") == (3, "ok as far as it was checked: 1 model is absent")
    (soup.parent / "a" / "model.safetensors").unlink()
    assert run("--ingredients") == (1, "NOT as recorded, and 1 model is absent")
    (soup.parent / "a").rmdir()
    assert run("--ingredients") == (3, "ok as far as it was checked: 2 models are absent")
    (soup / "config.json").write_text("")
    assert run() == (1, "NOT as recorded")


def test_relative_ingredients_are_found_from_here_and_from_the_soup(soup, tmp_path_factory, monkeypatch):
    record = json.loads((soup / "soup.json").read_text())
    record["ingredients"][0]["folder"], record["ingredients"][1]["folder"] = "models/a", "../b"
    (soup / "soup.json").write_text(json.dumps(record))
    (soup.parent / "models").mkdir()
    (soup.parent / "a").rename(soup.parent / "models" / "a")
    (soup.parent / "runs").mkdir()
    soup = soup.rename(soup.parent / "runs" / "soup")
    (soup.parent.parent / "b").rename(soup.parent / "b")
    # Merged in the project's folder and in a folder of it, run from elsewhere, and moved all together.
    assert check(soup, ingredients=True).ok
    moved = soup.parent.parent.rename(tmp_path_factory.mktemp("new") / "project")
    soup = moved / "runs" / "soup"
    monkeypatch.chdir(soup)
    assert check(Path(), ingredients=True).ok
    # What is nearer counts, and the working directory first.
    (soup.parent / "models" / "a").mkdir(parents=True)
    (soup.parent / "models" / "a" / "model.safetensors").write_bytes(b"another")
    assert check(soup, ingredients=True).changed
    monkeypatch.chdir(moved)
    assert check("runs/soup", ingredients=True).ok
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for found in (soup.parent / "models", moved / "models"):
        found.rename(found.parent / "gone")
    assert not check(soup, ingredients=True).ingredients[0].present


def test_a_folded_adapter_is_looked_for_in_both_folders(soup):
    (soup.parent / "b" / "adapter_model.safetensors").write_bytes(b"adapter")
    files = {
        path.name: entry(path)
        for path in (soup.parent / "a" / "model.safetensors", soup.parent / "b" / "adapter_model.safetensors")
    }
    both = {"folder": f"{soup.parent / 'a'}+{soup.parent / 'b'}", "role": "ingredient", "files": files}
    write_record(soup, {name: entry(soup / name) for name in ("config.json", "model.safetensors")}, [both])
    assert check(soup, ingredients=True).ok
    (soup.parent / "b" / "adapter_model.safetensors").write_bytes(b"changed")
    assert check(soup, ingredients=True).ingredients[0].problems["adapter_model.safetensors"] is not None
    (soup.parent / "b").rename(soup.parent / "moved")
    assert not check(soup, ingredients=True).ingredients[0].present


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "a\\b", "c:x", "nul\0"])
@pytest.mark.parametrize("of_ingredient", [False, True])
def test_nothing_outside_the_folder_is_read(soup, monkeypatch, name, of_ingredient):
    secret = soup.parent / "secret"
    secret.write_text("secret")
    (soup / "sub").mkdir()
    (soup / "sub" / "file").write_text("secret")
    files = {name: entry(secret)}
    a = {"folder": str(soup.parent / "a"), "role": "ingredient", "files": files}
    if of_ingredient:
        write_record(soup, {"config.json": entry(soup / "config.json")}, [a])
    else:
        write_record(soup, files)
    monkeypatch.setattr(verification, "hash_file", lambda path, *_: pytest.fail(f"{path} was read"))
    with pytest.raises(MergeError, match="is no plain file name, so it is damaged or forged: get the"):
        check(soup, ingredients=of_ingredient)


def test_either_hash_is_checked_and_the_stronger_counts(soup):
    weights = soup / "model.safetensors"
    fast = {"bytes": 4000, "xxh3_tree": xxhash.xxh3_128_hexdigest(xxhash.xxh3_128_digest(weights.read_bytes()))}
    strong = entry(weights)
    config = {"config.json": entry(soup / "config.json")}
    for good, bad in (
        (fast, fast | {"xxh3_tree": "0" * 32}),
        (fast | strong, fast | {"sha256": "0" * 64}),
        ({"bytes": 4000, "xxh3_tree": "0" * 32} | strong, {"bytes": 4000, "sha256": "0" * 64}),
    ):
        write_record(soup, config | {"model.safetensors": good})
        assert check(soup).ok
        write_record(soup, config | {"model.safetensors": bad})
        assert check(soup).soup.problems["model.safetensors"] == "changed: same size, other content"


GOOD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no soup.json: only folders that soupkit merged can be verified"),
        ("{", "): get the soup again from where it came from, or merge again"),
        ("{", "soup.json is not valid JSON"),
        ("[" * 100_000, "soup.json is not valid JSON"),
        ("[]", "soup.json holds no JSON object"),
        ("{}", "soup.json lists no files"),
        ('{"files": {}}', "soup.json lists no files"),
        (json.dumps({"files": {"f": 3}}), "its entry of the file 'f' has no bytes and hash): get the soup again"),
        (json.dumps({"files": {"f": GOOD | {"bytes": True}}}), "its entry of the file 'f' has no bytes and hash"),
        (json.dumps({"files": {"f": GOOD | {"sha256": "0" * 63}}}), "its entry of the file 'f'"),
        (json.dumps({"files": {"f": GOOD | {"sha256": 0}}}), "its entry of the file 'f'"),
        (json.dumps({"files": {"f": GOOD}}), "its ingredients are not a list of folders with roles"),
        (json.dumps({"files": {"f": GOOD}, "ingredients": [{"folder": 3, "role": "base"}]}), "its ingredients are not"),
    ],
)
def test_damaged_records(tmp_path, content, message):
    if content is not None:
        (tmp_path / "soup.json").write_text(content)
    with pytest.raises(MergeError, match=re.escape(message)) as caught:
        check(tmp_path, ingredients=True)
    assert "\n" not in str(caught.value)


def test_verify_refuses_what_is_no_folder(tmp_path):
    with pytest.raises(MergeError, match="is no folder: give the folder of a soup"):
        check(tmp_path / "none")


def test_verify_shows_bytes(soup, capsys):
    verify(soup)
    assert "4.00k/4.00k" in capsys.readouterr().err


def test_a_soup_from_the_merge_to_its_verification(checkpoints, tmp_path):
    models = [str(checkpoints["first"]), str(checkpoints["second"])]
    out = soupkit.average(models, [3, 1], out=tmp_path / "soup", progress=False)
    found = check(out, ingredients=True)
    assert found.ok, str(found)
    assert [folder.role for folder in found.ingredients] == ["ingredient", "ingredient"]
    assert inspect(out).making[0].startswith("linear, by soupkit ")
    ((_, recipe),) = blocks((out / "README.md").read_text(encoding="utf-8"), "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    again = soupkit.merge(tmp_path / "recipe.yaml", out=tmp_path / "again", progress=False)
    assert quietly(out, again).same_weights
    assert (again / "README.md").read_bytes() == (out / "README.md").read_bytes()
    difference = quietly(out, models[0], base=models[1]).total
    assert difference.relative > 0.1
    assert difference.task_cosine == pytest.approx(1, abs=1e-9)  # the soup lies between the two


# --- model card ---


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.M | re.S)


def test_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    card = model_card(RECORD, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert front_matter(card) == {
        "library_name": "transformers",
        "tags": ["merge", "model-soup", "soupkit", "ties"],
        "base_model": ["org/model"],
        "base_model_relation": "merge",
    }
    row = METHODS["ties"]
    for text in (row.summary, row.formula, row.paper, row.departures, "soupkit 9.9", "stored in\nbfloat16"):
        assert text in card or text.replace("\n", " ") in card
    assert "| [org/model](https://huggingface.co/org/model) | ingredient | `weight = 2.0` |" in card
    assert "| `runs/pretrained` | base |  |" in card
    assert "| `runs/sft 1` | ingredient | `weight = 0.25` |" in card
    ((_, recipe),) = blocks(card, "yaml")
    assert load_recipe(yaml.safe_load(recipe)).to_dict() == RECORD["recipe"]
    assert "python -m soupkit merge recipe.yaml --out soup" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card
    assert model_card(RECORD, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) == card


def test_local_paths_are_never_base_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    labels = ["runs/sft1", "/abs/x", "../up", "./here", "a/b/c", "org/m@main", "org/n+org/lora", "org/m", "plain"]
    assert hub_ids_of(labels) == ["org/m", "org/n", "org/lora"]
    for models, bases in (
        (["runs/sft1", "/abs/x"], None),
        (["runs/sft1", "nowhere/x@refs/pr/1", "nowhere/x"], ["nowhere/x"]),
    ):
        record = RECORD | {"recipe": {"method": "linear", "models": models}}
        assert front_matter(model_card(record, {})).get("base_model") == bases


ODD = [
    "a|b", "`tick`", "``", "two\nlines", "a: b #c", "- x", "émoji 🍲", "</code><script>", "'\"", "\x1b[0m",
    "```\nx: 1\n```", "yes", "1e-4", "{x}", "@at", "%d", "\u2028", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("label", ODD)
def test_odd_paths_survive_markdown_and_yaml(label):
    record = RECORD | {"recipe": {"method": "linear", "models": [{"model": label, "weight": 2.0}, "b"]}}
    card = model_card(record, {})
    assert front_matter(card)["tags"][-1] == "linear"
    ((_, recipe),) = blocks(card, "yaml")
    assert yaml.safe_load(recipe) == record["recipe"]
    assert Recipe.from_dict(yaml.safe_load(recipe)).models == (label, "b")
    table = [line for line in card.split("\n") if line.startswith("|")]
    assert len(table) == 4
    assert all(len(re.split(r"(?<!\\)\|", line)) == 5 for line in table)
    card.encode("utf-8")


def test_code_spans_and_fences_hold_any_text():
    assert code("x") == "`x`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert code("a|b\nc") == r"`a\|b\nc`"
    assert fenced("x") == "```\nx\n```"
    assert fenced("````", "md") == "`````md\n````\n`````"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "load_file("),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM.from_pretrained("),
        ({"model_type": "x", "architectures": ["XForSequenceClassification"]}, "= XForSequenceClassification.from_"),
        ({"model_type": "x", "architectures": ["x; import os"]}, "AutoModelForCausalLM.from_pretrained("),
        ({"model_type": "x"}, "AutoModel.from_pretrained("),
    ],
)
def test_the_card_says_how_to_load(config, expected):
    card = model_card(RECORD, config)
    ((_, script),) = blocks(card, "python")
    assert expected in script
    compile(script, "card", "exec")
    assert ("library_name" in front_matter(card)) == bool(config)


def test_the_card_needs_a_known_method():
    with pytest.raises(MergeError, match="unknown method 'stew'"):
        model_card(RECORD | {"recipe": {"method": "stew", "models": ["a"]}}, {})


# --- page of methods ---


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_section_with_a_recipe_that_loads(name):
    page = method_page()
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    method = METHODS[name]
    for text in (method.summary[1:], method.formula, method.paper, method.departures):
        assert text in section
    for key, parameter in method.parameters.items():
        (line,) = [line for line in section.split("\n") if line.startswith(f"| `{key}` |")]
        assert parameter.meaning.replace("|", r"\|") in line
        assert line.endswith("| required |") == parameter.required
        assert ("one per model" in line) == parameter.per_ingredient
        assert len(re.split(r"(?<!\\)\|", line)) == 6
    ((_, recipe),) = blocks(section, "yaml")
    loaded = load_recipe(yaml.safe_load(recipe))
    assert loaded.method == name
    assert loaded.to_dict() == load_recipe(example_recipe(name, method)).to_dict()
    assert f"| [{name}](#{name}) |" in page


def test_bars_do_not_end_a_cell():
    row = Method(print, "keep |d|", "|d|", "none", parameters={"k": Parameter("of |d|", int, low=1)})
    page = method_page({"m": row})
    assert r"| [m](#m) | keep \|d\| | 1 or more | none |" in page
    assert r"| `k` | of \|d\| | whole number, at least 1 | none |" in page
    assert "```\n|d|\n```" in page


def test_the_page_is_printed_by_its_module():
    done = run_python(["-m", "soupkit.method_page"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == method_page()
    assert done.stderr == ""


# --- page of tools ---


def test_the_page_of_tools_explains_every_row_column_and_exit_code(checkpoints):
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8").replace(r"\|", "|")
    a = {"w": torch.tensor([1.0, 2.0]), "v": torch.ones(1), "u": torch.ones(1), "h": torch.ones(2)}
    b = {"w": torch.tensor([1.0, 3.0]), "v": torch.ones(2), "x": torch.ones(1), "h": torch.ones(2) * 2}
    rows, columns = set(), set()
    for base in (None, {"w": torch.zeros(2)}):
        _, total, table = str(quietly(a, b, base=base)).split("\n\n")[:3]
        rows |= {re.split(r" {2,}", line)[0] for line in total.splitlines()[1:]}
        columns |= set(re.split(r" {2,}", table.splitlines()[0])[1:])
    assert {"tensors left out", "tensors not in the base, left out", "cosine of a and b"} <= rows
    assert {"task cos", "same sign", "equal", "‖a−b‖/‖a‖"} <= columns
    in_other_words = {"cosine of a and b": "a·b / (‖a‖ ‖b‖)", "equal elements": "| equal |"}
    for text in rows | columns:
        assert in_other_words.get(text, text) in page, text
    for name in ("first", "gpt2"):
        for line in str(inspect(checkpoints[name])).splitlines()[1:]:
            row = re.split(r" {2,}", line)[0]
            assert row in page or row.replace(" ", "_") in KEYS_OF_SIZE, row
    for exit_code in (0, 1, 2, 3, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        assert f"| {int(exit_code)} |" in page
    for name in ("README.md", "docs/checkpoints.md"):
        assert "tools.md" in (ROOT / name).read_text(encoding="utf-8")


# --- tables ---


def test_numbers_in_tables():
    assert [number(x) for x in (0.0, 1.0, 12345.678, 1e-9, float("nan"), float("inf"))] == [
        "0", "1", "1.235e+04", "1e-09", "-", "inf",
    ]  # fmt: skip
    shares = (0.0, 1.0, 0.5, 1e-9, 1 - 1e-9, 0.12345, float("nan"))
    assert [percent(x) for x in shares] == ["0 %", "100 %", "50.00 %", "0.01 %", "99.99 %", "12.35 %", "-"]
    sizes = (0, 999, 1000, 150_000, 2_200_000_000, 10**18)
    assert [size(x) for x in sizes] == ["0 B", "999 B", "1.00 kB", "150.00 kB", "2.20 GB", "1000000.00 TB"]


def test_columns_are_aligned():
    assert text_table(("name", "n"), [("a", "10"), ("longer", "2")]) == "name     n\na       10\nlonger   2"
    assert printable("a\tb\udcff é") == "a\\tb\\udcff é"


def test_the_page_of_methods_is_up_to_date():
    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == method_page(), "run: python -m soupkit.method_page > docs/methods.md"
