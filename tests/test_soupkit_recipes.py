"""Recipes: both file forms, the value every tensor gets, and what is refused. The values are worked by hand."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, run_python

from soupkit import METHODS, MergeError
from soupkit.layers import layer_positions
from soupkit.recipe import Recipe, check_names, load_recipe, resolve
from soupkit.recipe_forms import NOT_SUPPORTED

LINEAR = """
models:
  - model: alpha
    parameters:
      weight: 1.0
  - model: beta
    parameters:
      weight: 0.3
  - model: gamma
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""
GRADIENT_SLERP = """
slices:
  - sources:
      - model: alpha
        layer_range: [0, 4]
      - model: beta
        layer_range: [0, 4]
merge_method: slerp
base_model: alpha
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""
TIES = """
models:
  - model: alpha
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: beta
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: gamma
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]


def from_yaml(text: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return load_recipe(path)


def values_of(recipe: Recipe, key: str, part: str) -> list:
    """The parameter's value for every tensor with ``part`` in its name."""
    positions = layer_positions(NAMES)
    return [resolve(recipe, METHODS[recipe.method], name, positions[name])[key] for name in NAMES if part in name]


def ties(**parameters) -> Recipe:
    return Recipe("ties", ["a", "b"], base="base", parameters={"weight": 1} | parameters)


def at(recipe: Recipe, name: str = "w", position: float = 0.0) -> dict:
    return resolve(recipe, METHODS[recipe.method], name, position)


# --- layers ---


def test_layers_lie_evenly_between_0_and_1_and_everything_else_at_0():
    positions = layer_positions(NAMES)
    assert list(positions) == NAMES
    assert [positions[f"model.layers.{i}.norm.weight"] for i in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert {positions[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")} == {0}


@pytest.mark.parametrize(
    ("names", "positions"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], [0, 0.5, 1]),
        (["0.weight", "2.weight", "4.weight"], [0, 0.5, 1]),  # layers without tensors count
        (["layers.0.w"], [1]),
        (["encoder.0.w", "encoder.1.w", "decoder.0.w", "decoder.1.w", "decoder.2.w"], [0, 1, 0, 0.5, 1]),
        (["layers.0.experts.7.w", "layers.1.experts.0.w"], [0, 1]),  # the first number is the layer
        (["scales.0", "scales.1"], [0, 1]),
        (["layers.10.w", "layers.2.w"], [1, 0.2]),
        (["conv1.weight", "x2.bias", "fc"], [0, 0, 0]),  # a number within a word is none
        ([], []),
    ],
)
def test_layer_positions(names, positions):
    assert list(layer_positions(iter(names)).values()) == positions


# --- values ---


def test_gradient_slerp_by_hand(tmp_path):
    recipe = from_yaml(GRADIENT_SLERP, tmp_path)
    # Four layers on five points: layer 1 lies a third of the way from the second point to the third, and so on.
    assert values_of(recipe, "t", "self_attn") == pytest.approx([0, 13 / 30, 17 / 30, 1], abs=1e-15)
    assert values_of(recipe, "t", "mlp") == pytest.approx([1, 17 / 30, 13 / 30, 0], abs=1e-15)
    assert values_of(recipe, "t", "norm") == [0.5] * 5
    assert values_of(recipe, "t", "embed") == values_of(recipe, "t", "lm_head") == [0.5]
    assert recipe == Recipe(
        "slerp",
        ["alpha", "beta"],
        parameters={
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        dtype="bfloat16",
        num_layers=4,
    )


def test_ties_with_gradients_and_filters_by_hand(tmp_path):
    recipe = from_yaml(TIES, tmp_path)
    assert (recipe.models, recipe.base) == (("alpha", "beta", "gamma"), "base")
    densities = values_of(recipe, "density", "mlp")
    assert [density[0] for density in densities] == pytest.approx([1, 0.8, 0.5, 0.1], abs=1e-15)
    assert [density[1:] for density in densities] == [[0.5, 0.33]] * 4
    # Four layers on four points: each gets one.
    assert values_of(recipe, "weight", "mlp") == [[1, 0, 0.5], [1, 0.3, 0.5], [1, 0.7, 0.5], [1, 1, 0.5]]
    assert values_of(recipe, "weight", "self_attn") == [[1, 0, 0], [1, 0.3, 0], [1, 0.7, 0], [1, 1, 0]]
    assert values_of(recipe, "weight", "lm_head") == [[1, 0, 0]]
    assert values_of(recipe, "normalize", "lm_head") == [True]


def test_linear_by_hand(tmp_path):
    recipe = from_yaml(LINEAR, tmp_path)
    assert recipe == Recipe(
        "linear",
        ["alpha", "beta", "gamma"],
        model_parameters=[{"weight": 1.0}, {"weight": 0.3}, {"weight": 0.5}],
        dtype="float16",
    )
    assert at(recipe) == {"weight": [1, 0.3, 0.5], "normalize": True}


@pytest.mark.parametrize(
    ("position", "value"), [(0, 2), (0.125, 2.5), (0.25, 3), (0.5, 4), (0.75, 0), (0.875, -2), (1, -4)]
)
def test_gradient_is_a_broken_line(position, value):
    assert at(ties(**{"lambda": [2, 4, -4]}), position=position)["lambda"] == value


def test_gradient_of_one_value_is_that_value():
    assert [at(ties(density=[0.7]), position=p)["density"] for p in (0, 0.5, 1)] == [[0.7, 0.7]] * 3


def test_truth_values_are_not_interpolated():
    recipe = ties(normalize=[False, True, False])
    values = [at(recipe, position=p)["normalize"] for p in (0, 0.49, 0.5, 0.99, 1)]
    assert values == [False, False, True, True, False]


def test_first_fitting_filter_counts():
    weight = [{"filter": "mlp.up", "value": 2}, {"filter": "mlp", "value": 3}, {"filter": "*", "value": 4}]
    recipe = ties(weight=weight)
    found = [at(recipe, name)["weight"] for name in ("x.mlp.up.w", "x.mlp.down.w", "x.attn.w")]
    assert found == [[2, 2], [3, 3], [4, 4]]


def test_model_precedes_recipe_and_a_filter_that_does_not_fit_leaves_it_to_the_recipe():
    recipe = Recipe(
        "ties",
        ["a", "b"],
        base="base",
        parameters={"weight": [{"filter": "lm_head", "value": 7}], "density": 0.5},
        model_parameters=[{"weight": [{"filter": "mlp", "value": 2}], "density": 0.25}, {"weight": 3}],
    )
    recipe.validate()
    assert at(recipe, "mlp.w")["weight"] == [2, 3]
    assert at(recipe, "lm_head.w")["weight"] == [7, 3]
    assert at(recipe, "mlp.w")["density"] == [0.25, 0.5]
    with pytest.raises(MergeError, match=r"^parameter 'weight' has no value for tensor 'attn.w'"):
        at(recipe, "attn.w")


def test_default_where_no_filter_fits():
    recipe = ties(density=[{"filter": "mlp", "value": 0.5}])
    assert [at(recipe, name)["density"] for name in ("mlp", "attn")] == [[0.5, 0.5], [1, 1]]


def test_one_value_serves_all_models_and_defaults_are_filled_in():
    values = at(ties(density=0.5))
    assert values["density"] == [0.5, 0.5]
    assert list(values) == list(METHODS["ties"].parameters)
    for key in ("lambda", "normalize", "rescale"):
        assert values[key] == METHODS["ties"].parameters[key].default


def test_values_have_their_parameters_kind():
    values = at(Recipe("dare_ties", ["a"], base="base", parameters={"weight": 1, "seed": 3.0}))
    assert type(values["weight"][0]) is float
    assert type(values["seed"]) is int


@pytest.mark.parametrize("seed", [2**53 + 1, -(2**60) - 1, 10**400], ids=["2**53", "2**60", "10**400"])
def test_large_whole_numbers_keep_their_digits(seed, tmp_path):
    recipe = Recipe("dare_ties", ["a"], base="base", parameters={"weight": 1, "seed": seed})
    for same in (recipe, replace(recipe, parameters={"weight": 1, "seed": str(seed)})):
        same.validate()
        assert at(same)["seed"] == seed
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"seed": True}, "seed is True: it must be a finite number"),
        ({"seed": 0.5}, "seed is 0.5: it must be a whole number"),
        ({"seed": "inf"}, "seed is inf: it must be a finite number"),
        ({"lambda": True}, "lambda is True: it must be a finite number"),
        ({"lambda": 10**400}, f"lambda is {10**400}: it must be a finite number"),
    ],
)
def test_what_is_no_number_is_refused(parameters, message):
    with pytest.raises(MergeError) as error:
        Recipe("dare_ties", ["a"], base="base", parameters={"weight": 1} | parameters).validate()
    assert str(error.value) == message


def test_scientific_notation_is_a_number_though_yaml_reads_text(tmp_path):
    recipe = from_yaml(
        """
        method: nearswap
        base: a
        models: [b]
        parameters: {t: [1e-4, "2", 3e-4]}
        """,
        tmp_path,
    )
    assert recipe.parameters == {"t": [0.0001, 2, 0.0003]}
    assert at(recipe, position=1)["t"] == 3e-4


def test_missing_value_names_the_tensor():
    recipe = Recipe("slerp", ["a", "b"], parameters={"t": [{"filter": "mlp", "value": 0.5}]})
    recipe.validate()
    assert at(recipe, "mlp.w") == {"t": 0.5}
    with pytest.raises(MergeError) as error:
        at(recipe, "attn.w")
    assert str(error.value) == "parameter 't' has no value for tensor 'attn.w': add an entry without a filter"


def test_resolve_changes_nothing():
    recipe = ties(weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 2}])
    before = json.dumps(recipe.to_dict())
    first = at(recipe, "mlp", 0.25)
    first["weight"].append(0)
    assert at(recipe, "mlp", 0.25)["weight"] == [0.25, 0.25]
    assert json.dumps(recipe.to_dict()) == before


# --- the two forms ---


def test_both_forms_give_the_same_recipe(tmp_path):
    ours = from_yaml(
        """
        method: ties
        base: base
        models:
          - {model: alpha, density: [1, 0.7, 0.1], weight: 1.0}
          - {model: beta, density: 0.5, weight: [0, 0.3, 0.7, 1]}
          - model: gamma
            density: 0.33
            weight: [{filter: mlp, value: 0.5}, {value: 0}]
        parameters: {normalize: true, int8_mask: true}
        dtype: float16
        """,
        tmp_path,
    )
    assert ours == from_yaml(TIES, tmp_path)


def test_slices_of_whole_models_are_models(tmp_path):
    models = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a", "parameters": {"weight": 2}}, {"model": "b"}],
        "parameters": {"weight": 0.5},
    }
    sources = [entry | {"layer_range": [0, 32]} for entry in models["models"]]
    part = {"sources": sources, "base_model": "base", "parameters": {"weight": 0.5}}
    sliced = load_recipe({"merge_method": "ties", "slices": [part]})
    assert sliced.num_layers == 32
    whole = load_recipe(models)
    assert whole.num_layers is None
    assert whole == Recipe.from_dict({key: value for key, value in sliced.to_dict().items() if key != "num_layers"})
    assert whole.models == ("a", "b")


def test_slice_precedes_recipe_filter_by_filter():
    sources = [{"model": "a", "layer_range": [0, 2], "parameters": {"weight": [{"filter": "mlp", "value": 9}]}}]
    part = {
        "sources": [*sources, {"model": "b", "layer_range": [0, 2]}],
        "parameters": {"weight": {"filter": "attn", "value": 8}, "density": 0.5},
    }
    recipe = load_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "slices": [part],
            "parameters": {"weight": [0, 1], "density": 0.25, "lambda": 3},
        }
    )
    found = [at(recipe, name, 0.5)["weight"] for name in ("mlp", "attn", "norm")]
    assert found == [[9, 0.5], [8, 8], [0.5, 0.5]]
    assert (at(recipe)["density"], at(recipe)["lambda"]) == ([0.5, 0.5], 3)


def test_slice_filters_fall_through_to_the_recipes_filters_in_order():
    part = {"sources": [{"model": m, "layer_range": [0, 2]} for m in "ab"]}
    part["parameters"] = {"t": [{"filter": "mlp", "value": 0.1}]}
    general = {"t": [{"filter": "mlp", "value": 0.2}, {"filter": "attn", "value": 0.3}, {"value": 0.4}]}
    recipe = load_recipe({"merge_method": "slerp", "base_model": "a", "slices": [part], "parameters": general})
    assert [at(recipe, name)["t"] for name in ("mlp", "attn", "norm")] == [0.1, 0.3, 0.4]
    part["parameters"]["t"].append({"value": 0.5})
    recipe = load_recipe({"merge_method": "slerp", "base_model": "a", "slices": [part], "parameters": general})
    assert [at(recipe, name)["t"] for name in ("mlp", "attn", "norm")] == [0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("method", "models", "base_model", "expected"),
    [
        ("slerp", ["a", "b"], "a", (["a", "b"], None)),
        ("slerp", ["a", "b"], "b", (["b", "a"], None)),  # the base is the side of t = 0
        ("slerp", ["a"], "b", (["b", "a"], None)),
        ("karcher", ["a", "b"], "c", (["c", "a", "b"], None)),
        ("karcher", ["a", "b"], "b", (["b", "a"], None)),
        ("linear", ["a", "b", "c"], "c", (["c", "a", "b"], None)),
        ("passthrough", ["a"], "a", (["a"], None)),
        ("linear", ["a", "b"], None, (["a", "b"], None)),
        ("nearswap", ["a", "b"], "b", (["a"], "b")),
        ("arcee_fusion", ["a", "b"], "a", (["b"], "a")),
        ("arcee_fusion", ["b"], "a", (["b"], "a")),
        ("nuslerp", ["a", "b", "c"], "b", (["a", "c"], "b")),
        ("multislerp", ["a", "b"], None, (["a", "b"], None)),
        ("model_stock", ["a", "b", "c"], "a", (["b", "c"], "a")),
        ("sce", ["a"], "c", (["a"], "c")),
    ],
)
def test_role_of_mergekits_base(method, models, base_model, expected):
    content = {"merge_method": method, "models": [{"model": model} for model in models]}
    needed = {key: 0.5 for key, parameter in METHODS[method].parameters.items() if parameter.required}
    content["parameters"] = needed
    recipe = load_recipe(content if base_model is None else content | {"base_model": base_model})
    assert (list(recipe.models), recipe.base) == expected


def test_weights_stay_with_their_models_when_the_base_comes_first():
    entries = [{"model": model, "parameters": {"weight": weight}} for model, weight in (("a", 1), ("b", 2), ("c", 3))]
    recipe = load_recipe({"merge_method": "linear", "base_model": "b", "models": entries})
    assert (recipe.models, at(recipe)["weight"]) == (("b", "a", "c"), [2, 1, 3])


def test_unlisted_base_of_linear_needs_a_weight():
    content = {"merge_method": "linear", "base_model": "c", "models": [{"model": "a"}], "parameters": {"weight": 2}}
    assert load_recipe(content).models == ("c", "a")
    with pytest.raises(MergeError, match=r"^recipe: base_model c is not among the models: list it there"):
        load_recipe(content | {"parameters": {}})


def test_parameters_of_a_listed_base_are_checked_and_then_unused():
    entries = [{"model": "base", "parameters": {"weight": 0.5, "int8_mask": True}}, {"model": "a"}]
    content = {"merge_method": "ties", "base_model": "base", "models": entries, "parameters": {"weight": 2}}
    with pytest.warns(UserWarning, match=r"^ties uses no parameters of the base base, as mergekit: weight$"):
        assert load_recipe(content).model_parameters == ({},)
    entries[0]["parameters"] = {"int8_mask": True}
    load_recipe(content)
    entries[0]["parameters"] = {"wieght": 1}
    with pytest.raises(MergeError, match=r"^recipe: base base: unknown parameter 'wieght'"):
        load_recipe(content)


def test_dtype_of_the_soup():
    content = {"merge_method": "linear", "models": [{"model": "a"}]}
    assert load_recipe(content).dtype is None
    assert load_recipe(content | {"dtype": "float32"}).dtype == "float32"
    assert load_recipe(content | {"dtype": "float32", "out_dtype": "torch.bfloat16"}).dtype == "bfloat16"
    assert load_recipe(content | {"out_dtype": "float16"}).dtype == "float16"


@pytest.mark.parametrize(
    ("keys", "tokenizer"),
    [
        ({}, None),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "org/model"}, "org/model"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {}}, "union"),  # mergekit's default of the longer form
        ({"tokenizer": {"source": "union", "tokens": None}}, "union"),
    ],
)
def test_tokenizer(keys, tokenizer):
    content = {"merge_method": "linear", "models": [{"model": "a"}]}
    assert load_recipe(content | keys).tokenizer == tokenizer


def test_models_written_as_mappings_and_adapters():
    entries = [
        {"model": {"model": {"path": "org/model", "revision": "v1"}, "lora": {"path": "org/adapter"}}},
        {"model": {"model": {"path": "org/other", "revision": None}}},
        {"model": "org/third+org/adapter"},
    ]
    recipe = load_recipe({"merge_method": "karcher", "models": entries})
    assert recipe.models == ("org/model@v1+org/adapter", "org/other", "org/third+org/adapter")


def test_paths_as_given_else_beside_the_recipe(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "both", there / "both", there / "only", there / "lora", there / "fisher", there / "tokens"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    path = there / "recipe.yml"
    path.write_text(
        "method: fisher\nmodels:\n- {model: both, fisher: fisher}\n- {model: only+lora, fisher: fisher}\n"
        "- {model: org/hub+lora, fisher: fisher}\ntokenizer: tokens\n"
    )
    recipe = load_recipe(path)
    assert recipe.models == ("both", f"{there}/only+{there}/lora", f"org/hub+{there}/lora")
    assert recipe.fishers == (f"{there}/fisher",) * 3
    assert recipe.tokenizer == f"{there}/tokens"
    path.write_text("merge_method: sce\nbase_model: only\nmodels: [{model: only}, {model: nowhere}]\n")
    assert (load_recipe(path).base, load_recipe(path).models) == (f"{there}/only", ("nowhere",))
    (there / "union").mkdir()
    path.write_text("method: linear\nmodels: [only]\ntokenizer: union\n")
    assert load_recipe(path).tokenizer == "union"


def test_json_files_and_path_texts(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"method": "linear",\n\t"models": ["a", {"model": "b", "weight": 1e-4}]}')
    assert load_recipe(str(path)) == Recipe("linear", ["a", "b"], model_parameters=[{}, {"weight": 1e-4}])


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("linear", ["a"]),
        Recipe("linear", [Path("a"), "b"], dtype=torch.bfloat16, model_parameters=[{"weight": [0, 1]}, {}]),
        Recipe("fisher", ["a", "b"], fishers=["fa", "fb"], model_parameters=[{"weight": 2}, {}]),
        ties(weight=[{"filter": "mlp", "value": [0, 1]}, {"value": 2}], normalize=False),
        Recipe("slerp", ["a", "b"], parameters={"t": 0.5}, tokenizer="union", num_layers=12, dtype="float32"),
    ],
    ids=lambda recipe: recipe.method,
)
def test_round_trip(recipe, tmp_path):
    recipe.validate()
    content = json.loads(json.dumps(recipe.to_dict()))
    again = Recipe.from_dict(content)
    assert again.to_dict() == load_recipe(content).to_dict() == content
    assert [str(model) for model in again.models] == [str(model) for model in recipe.models]
    for field in ("method", "base", "parameters", "model_parameters", "fishers", "tokenizer", "num_layers"):
        assert getattr(again, field) == getattr(recipe, field)
    assert again.dtype == (None if recipe.dtype is None else str(recipe.dtype).removeprefix("torch."))
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    assert load_recipe(tmp_path / "recipe.json") == again


def test_to_dict_is_short():
    assert Recipe("linear", ["a", Path("b")]).to_dict() == {"method": "linear", "models": ["a", "b"]}
    with pytest.raises(MergeError, match=r"^a Tensor cannot be written down in a recipe: save the model in a folder$"):
        Recipe("linear", [torch.zeros(1)]).to_dict()


# --- names ---


def test_names_are_compared_with_the_recipe():
    whole = Recipe("slerp", ["a", "b"], parameters={"t": 0.5}, num_layers=4)
    check_names(whole, iter([*NAMES, "head.0.weight"]))  # the longest stack is what counts
    check_names(Recipe("linear", ["a"]), NAMES)
    with pytest.raises(MergeError) as error:
        check_names(Recipe("slerp", ["a", "b"], num_layers=3), NAMES)
    assert str(error.value) == (
        "the recipe's models have 3 layers, and these have 4: soupkit merges whole models, so write "
        "layer_range: [0, 4] (num_layers: 4 in our form)"
    )
    filters = [{"filter": "mlp", "value": 1}, {"filter": "self_atn", "value": 1}, {"value": 0}]
    with pytest.warns(UserWarning, match=r"^filter 'self_atn' of parameter 'weight' is in no tensor's name$"):
        check_names(Recipe("linear", ["a"], model_parameters=[{"weight": filters}]), NAMES)


# --- what is refused ---

TWO = [{"model": "a"}, {"model": "b"}]
SOURCES = [{"model": "a", "layer_range": [0, 8]}, {"model": "b", "layer_range": [0, 8]}]


def mergekit(**keys) -> dict:
    return {"merge_method": "ties", "base_model": "base", "models": TWO, "parameters": {"weight": 1}} | keys


def sliced(sources=SOURCES, **keys) -> dict:
    return {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources} | keys]}


def ours(**keys) -> dict:
    return {"method": "ties", "base": "base", "models": ["a", "b"]} | keys


OUR_KEYS = "method, base, models, parameters, dtype, tokenizer, num_layers"
MERGEKITS_KEYS = "merge_method, models, slices, base_model, parameters, dtype, out_dtype, tokenizer_source, tokenizer"
TIES_PARAMETERS = ", ".join(METHODS["ties"].parameters)
WHOLE = "soupkit merges whole models, so "
REFUSED = {
    # which form
    "no keys": (["ties"], "found no keys: write method (our form) or merge_method (mergekit's), models and so on"),
    "no method": ({"models": ["a"]}, "found neither of 'method' (our form) and 'merge_method' (mergekit's): give one"),
    "both methods": (
        mergekit(method="ties"),
        "found both of 'method' (our form) and 'merge_method' (mergekit's): give one",
    ),
    # ours
    "our unknown key": (ours(base_model="a"), f"unknown key 'base_model' of recipe: choose from {OUR_KEYS}"),
    "no models": (ours(models=[]), "'models' is []: give a list with at least one entry"),
    "one model": (ours(models="a"), "'models' is 'a': give a list with at least one entry"),
    "model is a number": (ours(models=["a", 3]), "model 2 is 3: give a folder or a hub id"),
    "entry without model": (ours(models=[{"weight": 3}]), "model 1 is None: give a folder or a hub id"),
    "base is a list": (ours(base=["a"]), "base is ['a']: give a folder or a hub id"),
    "parameters": (ours(parameters=[1]), "'parameters' is [1]: write name: value pairs"),
    "layers": (ours(num_layers="8"), "'num_layers' is '8': give a number of layers"),
    "no layers": (ours(num_layers=0), "'num_layers' is 0: give a number of layers"),
    "our dtype": (ours(dtype=16), "'dtype' is 16: give its name"),
    "our method": (ours(method=["ties"]), "'method' is ['ties']: give its name"),
    "a fisher missing": (
        {"method": "fisher", "models": [{"model": "a", "fisher": "f"}, "b"]},
        "model b has no fisher, and others have one: give one each",
    ),
    "chat_template in ours": (
        ours(chat_template="auto"),
        "key 'chat_template' of recipe is not supported: set it on the soup's tokenizer afterwards",
    ),
    # mergekit's keys
    "unknown key": (mergekit(layers=3), f"unknown key 'layers' of recipe: choose from {MERGEKITS_KEYS}"),
    "modules": (
        mergekit(modules={"text": {"models": TWO}}),
        "key 'modules' of recipe is not supported: merge one module at a time, with 'models'",
    ),
    "chat_template": (
        mergekit(chat_template="auto"),
        "key 'chat_template' of recipe is not supported: set it on the soup's tokenizer afterwards",
    ),
    "random_seed": (
        mergekit(random_seed=1),
        "key 'random_seed' of recipe is not supported: write parameters: {seed: NUMBER}",
    ),
    "model key": (
        mergekit(models=[{"model": "a", "layer_range": [0, 8]}]),
        "unknown key 'layer_range' of model 1: choose from model, parameters",
    ),
    "model text": (mergekit(models=["a"]), "model 1 is 'a': write model: a"),
    "model architecture": (
        mergekit(models=[{"model": {"model": "a", "override_architecture": "X"}}]),
        "key 'override_architecture' of model 1 is not supported: soupkit goes by tensor names: remove it",
    ),
    "neither models nor slices": (
        {"merge_method": "linear"},
        "'models' is None: give a list with at least one entry",
    ),
    "models and slices": (sliced() | {"models": TWO}, "found both 'models' and 'slices': give one"),
    # slices
    "two slices": (
        sliced() | {"slices": [{"sources": SOURCES}, {"sources": SOURCES}]},
        "'slices' has 2 slices: stacking layers is not supported; merge whole models, in one slice",
    ),
    "slice text": (sliced() | {"slices": ["a"]}, "slice 1 has no keys: write sources"),
    "residual_weight": (
        sliced(residual_weight=0.5),
        "key 'residual_weight' of slice 1 is not supported: mergekit does not use it either: remove it",
    ),
    "slice key": (sliced(weight=1), "unknown key 'weight' of slice 1: choose from sources, base_model, parameters"),
    "slice base": (
        sliced(base_model="other"),
        "base_model is other in slice 1 and base for the recipe: give one",
    ),
    "partial range": (
        sliced([{"model": "a", "layer_range": [4, 8]}]),
        f"layer_range is [4, 8]: {WHOLE}write [0, number of layers]",
    ),
    "empty range": (
        sliced([{"model": "a", "layer_range": [0, 0]}]),
        f"layer_range is [0, 0]: {WHOLE}write [0, number of layers]",
    ),
    "no range": (sliced(TWO), f"layer_range is None: {WHOLE}write [0, number of layers]"),
    "ranges": (
        sliced([SOURCES[0], {"model": "b", "layer_range": [0, 4]}]),
        f"layer_range is [0, 8] for a and [0, 4] for b: {WHOLE}give all the same",
    ),
    "range not a pair": (
        sliced([{"model": "a", "layer_range": [0, 4, 8]}]),
        f"layer_range is [0, 4, 8]: {WHOLE}write [0, number of layers]",
    ),
    "slice without the base of slerp": (
        sliced(parameters={"t": 0.5}) | {"merge_method": "slerp"},
        "base_model base is not among the models: list it there (with its weight), or remove it",
    ),
    # tokenizer
    "two tokenizers": (
        mergekit(tokenizer_source="base", tokenizer={"source": "base"}),
        "found both 'tokenizer_source' and 'tokenizer': give one",
    ),
    "tokens": (
        mergekit(tokenizer={"source": "base", "tokens": {"<s>": {"source": "a"}}}),
        "key 'tokens' of tokenizer is not supported: the soup's tokens come from 'source' alone: remove it",
    ),
    "padding": (
        mergekit(tokenizer={"pad_to_multiple_of": 8}),
        "key 'pad_to_multiple_of' of tokenizer is not supported: resize the soup's embeddings afterwards",
    ),
    "tokenizer key": (mergekit(tokenizer={"from": "a"}), "unknown key 'from' of tokenizer: choose from source"),
    "tokenizer text": (mergekit(tokenizer="base"), "tokenizer is 'base': write tokenizer: {source: base}"),
    "tokenizer_source": (mergekit(tokenizer_source=3), "tokenizer_source is 3: give a folder or a hub id"),
    # parameters
    "mistyped": (
        ours(parameters={"densty": 0.5}),
        f"unknown parameter 'densty': the parameters of ties are {TIES_PARAMETERS}",
    ),
    "mistyped for a model": (
        mergekit(models=[{"model": "a", "parameters": {"wieght": 1}}]),
        f"model a: unknown parameter 'wieght': the parameters of ties are {TIES_PARAMETERS}",
    ),
    "a method without parameters": (
        {"method": "arcee_fusion", "base": "a", "models": ["b"], "parameters": {"t": 1}},
        "unknown parameter 't': the parameters of arcee_fusion are none",
    ),
    "parameter missing": (
        {"method": "slerp", "models": ["a", "b"]},
        f"slerp needs the parameter 't' ({METHODS['slerp'].parameters['t'].meaning})",
    ),
    "parameter of a model missing": (
        ours(models=[{"model": "a", "weight": 1}, "b"]),
        f"model b: ties needs the parameter 'weight' ({METHODS['ties'].parameters['weight'].meaning})",
    ),
    "shared parameter of a model": (
        ours(models=[{"model": "a", "normalize": True}]),
        "model a: 'normalize' is no parameter of a single model: move it to the recipe's parameters",
    ),
    "text": (
        ours(parameters={"weight": "much"}),
        "parameter 'weight' is 'much': give a number, a list of numbers over the layers, or filters",
    ),
    "nothing": (
        ours(parameters={"weight": None}),
        "parameter 'weight' is None: give a number, a list of numbers over the layers, or filters",
    ),
    "list of lists": (
        ours(parameters={"weight": [[1, 2]]}),
        "parameter 'weight' is [1, 2]: give a number, a list of numbers over the layers, or filters",
    ),
    "empty list": (
        ours(parameters={"weight": []}),
        "parameter 'weight' is an empty list: give a value, or a list of values over the layers",
    ),
    "mixed": (
        ours(parameters={"weight": [1, {"filter": "mlp", "value": 1}]}),
        "parameter 'weight' mixes values and filters: give each value a filter",
    ),
    "default first": (
        ours(parameters={"weight": [{"value": 1}, {"filter": "mlp", "value": 1}]}),
        "parameter 'weight' has filters after the entry for all tensors: put that entry last",
    ),
    "filter without value": (
        ours(parameters={"weight": [{"filter": "mlp"}]}),
        "parameter 'weight' has the entry {'filter': 'mlp'}: write {filter: TEXT, value: NUMBER}",
    ),
    "filter key": (
        ours(parameters={"weight": {"name": "mlp", "value": 1}}),
        "parameter 'weight' has the entry {'name': 'mlp', 'value': 1}: write {filter: TEXT, value: NUMBER}",
    ),
    "filter is a number": (
        ours(parameters={"weight": {"filter": 3, "value": 1}}),
        "parameter 'weight' has the entry {'filter': 3, 'value': 1}: write {filter: TEXT, value: NUMBER}",
    ),
    "filters in filters": (
        ours(parameters={"weight": {"filter": "mlp", "value": [{"value": 1}]}}),
        "parameter 'weight' has filters within filter 'mlp': one level is all there is",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(content, message, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(content))
    with pytest.raises(MergeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path}: {message}"


def test_values_out_of_range_are_refused_wherever_they_stand():
    for weight in (2, [0.5, 2], [{"filter": "mlp", "value": [1, 2]}], [{"filter": "mlp", "value": 1}, {"value": 2}]):
        for content in (
            ours(parameters={"density": weight, "weight": 1}),
            ours(models=[{"model": "a", "weight": 1}, {"model": "b", "weight": 1, "density": weight}]),
        ):
            with pytest.raises(MergeError, match=r"^recipe: (model b: )?density is 2: it must be from 0 to 1$"):
                load_recipe(content)
    with pytest.raises(MergeError, match=r"^recipe: normalize is 3: it must be true or false$"):
        load_recipe(ours(parameters={"normalize": 3}))
    with pytest.raises(MergeError, match=r"^recipe: weight is nan: it must be a finite number$"):
        load_recipe(ours(parameters={"weight": "nan"}))


def test_models_that_do_not_fit_the_method_are_refused():
    with pytest.raises(MergeError, match=r"^unknown method 'ram'"):
        Recipe("ram", ["a"]).validate()
    with pytest.raises(MergeError, match=r"^recipe: unknown method 'ram'"):
        load_recipe(mergekit(merge_method="ram"))
    for recipe in (
        Recipe("slerp", ["a"], parameters={"t": 0.5}),
        Recipe("ties", ["a", "b"], parameters={"weight": 1}),
        Recipe("linear", ["a"], base="b"),
        Recipe("fisher", ["a"]),
        Recipe("linear", ["a"], fishers=["f"]),
    ):
        with pytest.raises(MergeError, match=recipe.method):
            recipe.validate()
    with pytest.raises(MergeError, match=r"^found parameters of 1 models for 2 models: give one mapping per model"):
        Recipe("linear", ["a", "b"], model_parameters=[{}]).validate()
    for last in (3, [1, 3], [{"filter": "mlp", "value": 3}]):
        with pytest.raises(MergeError, match=r"^last is 3, and there are 2 models: choose at most 2$"):
            Recipe("lawa", ["a", "b"], parameters={"last": last}).validate()
    Recipe("lawa", ["a", "b"], parameters={"last": 2}).validate()
    with pytest.raises(MergeError, match=r"^models is one str: give a list of models$"):
        Recipe("linear", "a")
    with pytest.raises(MergeError, match=r"^parameters are \[1\]: write name: value pairs$"):
        Recipe("linear", ["a"], parameters=[1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.yaml", "method: linear\nmodels: [a]\nmodels: [b]\n", "{path}: key 'models' occurs twice: keep one"),
        ("r.yaml", "method: ties\nparameters: {t: 1, t: 2}\n", "{path}: key 't' occurs twice: keep one"),
        ("r.json", '{"method": "linear", "models": ["a"], "models": ["b"]}', "{path}: key 'models' occurs twice"),
        ("r.yaml", "method: [linear\n", "{path}: not valid YAML"),
        ("r.yaml", "method: linear\n---\nmethod: linear\n", "{path}: not valid YAML"),
        ("r.yaml", "method: !!python/object/apply:os.system [echo]\n", "{path}: not valid YAML"),
        ("r.yaml", "", "{path}: found no keys"),
        ("r.yaml", "? [a]\n: b\n", "{path}: not valid YAML"),
        ("r.json", "{", "{path} is not valid JSON"),
        ("r.yaml", b"\xff\xfe\x00", "{path} cannot be read as text"),
    ],
)
def test_files_that_cannot_be_read(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MergeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(MergeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path} does not exist: give a recipe file"


def test_yaml_merge_keys_are_no_duplicates(tmp_path):
    recipe = from_yaml(
        """
        method: linear
        models:
          - &first {model: a, weight: 0.5}
          - {<<: *first, model: b}
        """,
        tmp_path,
    )
    assert recipe == Recipe("linear", ["a", "b"], model_parameters=[{"weight": 0.5}] * 2)


def test_int8_mask_changes_nothing():
    plain, masked = load_recipe(mergekit()), load_recipe(mergekit(parameters={"weight": 1, "int8_mask": True}))
    without = [{key: value for key, value in at(r).items() if key != "int8_mask"} for r in (plain, masked)]
    assert without[0] == without[1]
    assert load_recipe({"merge_method": "linear", "models": TWO, "parameters": {"int8_mask": False}})


def test_reading_recipes_imports_yaml_and_soupkit_alone_does_not():
    script = (
        "import sys, soupkit.recipe_forms as r; assert 'yaml' not in sys.modules; "
        "r.parse_yaml('a: 1'); assert 'yaml' in sys.modules"
    )
    process = run_python(["-c", script])
    assert process.returncode == 0, process.stderr


def test_the_page_of_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = [load_recipe(yaml.safe_load(text)) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert [recipe.method for recipe in recipes] == ["ties", "slerp", "ties", "slerp"]
    assert [at(recipes[1], f"layers.{i}.self_attn", i / 3)["t"] for i in range(4)] == pytest.approx(
        [0, 0.5 + (0.3 - 0.5) / 3, 0.3 + (0.7 - 0.3) * 2 / 3, 1]
    )
    for key in (*OUR_KEYS.split(", "), *MERGEKITS_KEYS.split(", "), *NOT_SUPPORTED):
        assert f"`{key}`" in page, key
