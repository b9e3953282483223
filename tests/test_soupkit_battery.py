"""What every merge method must do, over every row of METHODS: a row without a setting or an end point here fails."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_python
from oracles import DROPPING, ORACLES, SETTINGS, Group, Setting, State, make_states, make_tensors, merge, raw
from safetensors.torch import load_file, save_file

from soupkit import METHODS, MergeError

# Settings of a method with its base and without, where it can do both.
TYPICAL = [pytest.param(name, SETTINGS[name][0], id=name) for name in METHODS] + [
    pytest.param(name, next(setting for setting in SETTINGS[name] if setting.base), id=f"{name}-base")
    for name, row in METHODS.items()
    if row.base == "optional"
]


def inputs(arguments: Group) -> list[tuple[str, Any]]:
    """Every input with what a message may call it."""
    named = [(f"ingredient {i}", model) for i, model in enumerate(arguments["models"], start=1)]
    named += [("base", arguments["base"])] if arguments["base"] is not None else []
    return named + [("fisher", fisher) for fisher in arguments["fishers"]]


def assert_same_bits(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert raw(a[name]) == raw(b[name]), name


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12 * scale)


# Copies, ends, order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_copies_of_one_model_give_that_model(name, setting, dtype):
    for shape in ((1,), (40, 30)):
        arguments = make_tensors(setting, shape, dtype)
        model = arguments["models"][0]
        arguments["models"] = [model.clone() for _ in arguments["models"]]
        if setting.base:
            arguments["base"] = model.clone()
        if name == "passthrough":
            arguments["parameters"] = {"scale": [1.0]}
        result = merge(name, **arguments)
        if dtype == torch.float64:
            assert_close(result, model)
        else:  # in a wider precision and rounded once, it is the same bits
            assert_same_bits({"": result}, {"": model})


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if (row.max_ingredients or 5) > 4])
def test_any_number_of_copies(name):
    for count in {METHODS[name].min_ingredients, 2, 5}:
        parameters = {
            key: [value[0]] * count if isinstance(value, list) else value
            for key, value in SETTINGS[name][0].parameters.items()
        }
        first = SETTINGS[name][0]
        arguments = make_tensors(Setting(count, first.base, first.fishers, parameters), (30, 20))
        model = arguments["models"][0]
        arguments |= {"models": [model] * count, "base": model if first.base else None}
        assert_close(merge(name, **arguments), model)


FIRST, SECOND, LAST, BASE, MEAN, ZERO = "first", "second", "last", "base", "mean", "zero"
ALL = {"density": [1.0, 1.0]}
NONE = {"density": [0.0, 0.0]}
ONLY_FIRST = {"weight": [1.0, 0.0]}
BOTH = {"weight": [0.7, 0.7]}
GAMMA = {"gamma": [0.1, 0.1]}
CROPPED = {"gamma": [0.0, 0.0]}

# (parameters, what the result is): a word above, or another method and its parameters, which must give the same.
ENDS: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "linear": [
        (ONLY_FIRST, FIRST), ({"weight": [0.0, 3.0]}, SECOND), (BOTH, MEAN),
        ({"weight": [1.0, 0.0], "normalize": False}, FIRST), ({"weight": [0.0, 0.0], "normalize": False}, ZERO),
    ],
    "slerp": [({"t": 0.0}, FIRST), ({"t": 1.0}, SECOND), ({"t": 0.4}, ("nuslerp", {"weight": [0.6, 0.4]}))],
    "nuslerp": [
        (ONLY_FIRST, FIRST), ({"weight": [0.0, 0.2]}, SECOND),
        ({"weight": [1.0, 0.0], "nuslerp_flatten": False}, FIRST),
        ({"weight": [0.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}, SECOND),
    ],
    "multislerp": [(ONLY_FIRST, FIRST), ({"weight": [0.0, 2.0]}, SECOND)],
    # One step from the normalised sum of two directions moves nothing: it is their middle already.
    "karcher": [({"max_iter": 1}, ("karcher", {"max_iter": 50}))],
    "task_arithmetic": [
        (ONLY_FIRST, FIRST), ({"weight": [0.0, 1.0]}, SECOND), (BOTH | {"normalize": True}, MEAN),
        (BOTH | {"lambda": 0.0}, BASE), ({"weight": [0.0, 0.0]}, BASE),
    ],
    "ties": [
        (ONLY_FIRST | ALL, FIRST), (BOTH | NONE, BASE), (BOTH | ALL | {"lambda": 0.0}, BASE),
        (ONLY_FIRST | ALL | {"rescale": True}, FIRST),
    ],
    "dare_linear": [
        (ONLY_FIRST | ALL, FIRST), (BOTH | ALL, ("task_arithmetic", BOTH)), (BOTH | NONE, BASE),
        (BOTH | {"density": [0.5, 0.5], "lambda": 0.0}, BASE),
    ],
    "dare_ties": [
        (ONLY_FIRST | ALL, FIRST), (BOTH | ALL, ("ties", BOTH | ALL | {"normalize": False})), (BOTH | NONE, BASE),
    ],
    "della": [(ONLY_FIRST | ALL, FIRST), (BOTH | ALL, ("ties", BOTH | ALL))],
    "della_linear": [(ONLY_FIRST | ALL, FIRST), (BOTH | ALL, ("task_arithmetic", BOTH))],
    "breadcrumbs": [
        (ONLY_FIRST | ALL | GAMMA, FIRST), (BOTH | ALL | GAMMA, ("task_arithmetic", BOTH)),
        (BOTH | NONE | GAMMA, BASE),
    ],
    "breadcrumbs_ties": [
        (ONLY_FIRST | ALL | GAMMA, FIRST), (BOTH | NONE | GAMMA, BASE),
        (BOTH | ALL | GAMMA, ("ties", BOTH | ALL | {"normalize": False})),
        # Nothing cut from above: what is left is trimmed as by TIES.
        (BOTH | {"density": [0.3, 0.6]} | CROPPED, ("ties", BOTH | {"density": [0.3, 0.6], "normalize": False})),
    ],
    "sce": [({"select_topk": 0.0}, BASE)],
    "model_stock": [],
    "nearswap": [({"t": 0.0}, BASE), ({"t": 1e9}, FIRST)],
    "arcee_fusion": [],
    "passthrough": [({"scale": [1.0]}, FIRST), ({"scale": [0.0]}, ZERO)],
    "fisher": [(ONLY_FIRST, FIRST), ({"weight": [0.0, 2.0]}, SECOND)],
    "ema": [({"decay": 0.0}, LAST), ({"decay": 0.5}, MEAN)],
    "lawa": [({"last": 1}, LAST), ({}, MEAN), ({"last": 2}, MEAN)],
}  # fmt: skip


def test_every_method_has_end_points():
    assert set(ENDS) == set(METHODS)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, ends in ENDS.items() for case in range(len(ends))])
def test_end_points(name, case):
    parameters, end = ENDS[name][case]
    setting = Setting(METHODS[name].max_ingredients or 2, METHODS[name].base != "none", name == "fisher", parameters)
    arguments = make_tensors(setting, (30, 20))
    models, base = arguments["models"], arguments["base"]
    result = merge(name, **arguments)
    if isinstance(end, tuple):
        other, settings = end
        assert_close(result, merge(other, models, base if METHODS[other].base != "none" else None, (), settings))
        return
    ends = {"first": models[0], "last": models[-1], "base": base, "mean": sum(models) / len(models)}
    ends |= {"second": models[1 % len(models)], "zero": torch.zeros_like(models[0])}
    assert_close(result, ends[end])


def test_more_end_points():
    base, shift, across = torch.tensor([[1.0, 1.0], [5.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert_close(merge("model_stock", [base + shift, base + across], base), base)  # at a right angle
    assert_close(merge("model_stock", [base + shift, base + 3 * shift], base), base + 2 * shift)  # parallel
    assert_close(merge("karcher", [shift]), shift)
    assert_close(merge("sce", [shift], base), shift)  # alone, it is all there is to select
    assert_close(merge("arcee_fusion", [base], base), base)
    fishers = [torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    half = {"weight": [0.5, 0.5]}
    assert_close(merge("fisher", [shift, across], None, fishers, half), shift)
    assert_close(merge("fisher", [shift, across], None, fishers[:1] * 2, half), (shift + across) / 2)
    assert_close(merge("fisher", [shift, across], None, fishers[1:] * 2, half), (shift + across) / 2)


# Order, one model, or chance decide here; all others treat their ingredients alike.
TRIMMING = ("ties", "breadcrumbs", "breadcrumbs_ties")
IN_ORDER = {"slerp", "ema", "lawa", "nearswap", "arcee_fusion", "passthrough", *DROPPING}


@pytest.mark.parametrize(
    ("name", "setting"), [(name, s) for name in METHODS if name not in IN_ORDER for s in SETTINGS[name]]
)
def test_the_order_of_the_ingredients_does_not_matter(name, setting):
    arguments = make_tensors(setting, (40, 30))
    expected = merge(name, **arguments)
    order = [*range(1, setting.num_models), 0]
    permuted = arguments | {
        "models": [arguments["models"][i] for i in order],
        "fishers": [arguments["fishers"][i] for i in order] if setting.fishers else [],
        "parameters": {
            key: [value[i] for i in order] if isinstance(value, list) else value
            for key, value in setting.parameters.items()
        },
    }
    assert_close(merge(name, **permuted), expected)


def test_slerp_backwards():
    a, b = (make_tensors(Setting(2), (40, 30))["models"][i] for i in (0, 1))
    assert_close(merge("slerp", [b, a], parameters={"t": 0.7}), merge("slerp", [a, b], parameters={"t": 0.3}))


# t is a distance, eps is added to norms, and a softmax knows the size of its arguments; all else is homogeneous.
NOT_HOMOGENEOUS = {"nearswap", "multislerp", "arcee_fusion"}


@pytest.mark.parametrize(("name", "setting"), [row.values for row in TYPICAL if row.values[0] not in NOT_HOMOGENEOUS])
def test_the_scale_of_the_values_does_not_matter(name, setting):
    arguments = make_tensors(setting, (40, 30))
    expected = merge(name, **arguments)
    for scale in (2.0**-40, 2.0**40):
        scaled = {"models": [scale * model for model in arguments["models"]], "fishers": arguments["fishers"]}
        scaled["base"] = scale * arguments["base"] if setting.base else None
        assert_close(merge(name, **arguments | scaled) / scale, expected)


# Inputs


@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_inputs_stay_as_they_were(name, setting):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        arguments = make_tensors(setting, (40, 30), dtype)
        before = [raw(tensor) for _, tensor in inputs(arguments)]
        result = merge(name, **arguments)
        assert [raw(tensor) for _, tensor in inputs(arguments)] == before
        assert result.dtype == dtype
        result.fill_(7.0)  # nor does the result share memory with them
        assert [raw(tensor) for _, tensor in inputs(arguments)] == before


ANY_SHAPES = [(), (1,), (0,), (1, 1), (3, 0), (0, 3), (1, 5), (5, 1), (2, 3, 4), (2, 1, 2, 3)]


@pytest.mark.parametrize("shape", ANY_SHAPES, ids=str)
@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_any_shape(name, setting, shape):
    for dtype in (torch.float32, torch.bfloat16):
        result = merge(name, **make_tensors(setting, shape, dtype))
        assert result.shape == shape
        assert result.dtype == dtype
        assert result.isfinite().all()


@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_zeros(name, setting):
    for shape in ((1,), (6, 4)):
        arguments = make_tensors(setting, shape)
        zero = torch.zeros(shape, dtype=torch.float64)
        everywhere = arguments | {"models": [zero] * setting.num_models, "base": zero if setting.base else None}
        assert torch.equal(merge(name, **everywhere), zero)
        one_zero = [arguments | {"models": [zero, *arguments["models"][1:]]}]
        for some in one_zero + ([arguments | {"base": zero}] if setting.base else []):
            result = merge(name, **some)
            assert result.isfinite().all()
            if name in ORACLES and (shape != (1,) or name not in ("karcher", "multislerp")):
                group = [None if x is None else [y.numpy() for y in x] for x in (some["models"], some["fishers"])]
                extra = {"fishers": group[1]} if setting.fishers else {}
                base = None if some["base"] is None else some["base"].numpy()
                expected = ORACLES[name](group[0], base, **setting.parameters, **extra)
                assert_close(result, torch.from_numpy(np.asarray(expected)))


@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_non_contiguous_tensors(name, setting):
    arguments = make_tensors(setting, (30, 40), torch.float32)
    expected = merge(name, **arguments)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, -x], dim=-1)[..., 0]

    for index, change in enumerate((transposed, strided, transposed)):
        changed = dict(arguments)
        for key in ("models", "fishers"):
            changed[key] = [change(x) if i != index else x for i, x in enumerate(arguments[key])]
        if setting.base:
            changed["base"] = strided(arguments["base"]) if index else transposed(arguments["base"])
        assert not all(x.is_contiguous() for _, x in inputs(changed)) or index == 0
        assert_same_bits({"": merge(name, **changed)}, {"": expected})


# The same bits whatever the circumstances


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_threads_change_nothing(name, setting, monkeypatch):
    monkeypatch.setattr("soupkit.blocks.BLOCK", 2**15)  # several blocks, each large enough for torch to share out
    arguments = make_states(setting, {"a": (400, 250), "b": (7, 3), "c": (1000,)})
    results = []
    for torch_count, own_count in ((1, 1), (2, 2), (4, 3), (1, 3)):
        torch.set_num_threads(torch_count)
        results.append(merge(name, **arguments, num_threads=own_count))
        assert torch.get_num_threads() == torch_count
    for result in results[1:]:
        assert_same_bits(result, results[0])


DIGESTS = """
import hashlib
from oracles import SETTINGS, make_states, merge, raw
for name, settings in SETTINGS.items():
    soup = merge(name, **make_states(settings[0], {"z": (20, 10), "a": (33,), "m": ()}))
    print(name, hashlib.sha256(b"".join(key.encode() + raw(soup[key]) for key in soup)).hexdigest())
"""


def test_hash_seeds_change_nothing():
    runs = [run_python(["-c", DIGESTS], PYTHONHASHSEED=seed) for seed in ("0", "12345")]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.splitlines()) == len(METHODS)
    for line in runs[0].stdout.splitlines():  # and a process of its own changes nothing either
        name, digest = line.split()
        soup = merge(name, **make_states(SETTINGS[name][0], {"z": (20, 10), "a": (33,), "m": ()}))
        assert digest == hashlib.sha256(b"".join(key.encode() + raw(soup[key]) for key in soup)).hexdigest(), name


# Tensors, state dicts, folders


def save(folder: Path, state: State, num_shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    names = list(state)
    for i, file in enumerate(files):
        save_file({name: state[name] for name in names[i::num_shards]}, folder / file, metadata={"format": "pt"})
    weight_map = {name: files[i % num_shards] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    return folder


def load(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def in_folders(root: Path, arguments: Group, layouts: tuple[int, ...]) -> Group:
    """The same arguments, on disk."""

    def saved(label: str, states: list[State]) -> list[Path]:
        return [save(root / f"{label}{i}", state, layouts[i % len(layouts)]) for i, state in enumerate(states)]

    base = save(root / "base", arguments["base"], layouts[-1]) if arguments["base"] is not None else None
    models, fishers = saved("model", arguments["models"]), saved("fisher", arguments["fishers"])
    return arguments | {"models": models, "fishers": fishers, "base": base}


def of_one_tensor(arguments: Group, name: str) -> Group:
    """What each state dict holds under a name."""
    picked = {key: [state[name] for state in arguments[key]] for key in ("models", "fishers")}
    return arguments | picked | {"base": None if arguments["base"] is None else arguments["base"][name]}


SHAPES = {"embed.weight": (11, 7), "layers.0.weight": (60, 50), "layers.1.weight": (7, 7), "one": (), "no": (0, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_three_levels_agree_for_every_layout(tmp_path, monkeypatch, name, setting, dtype):
    monkeypatch.setattr("soupkit.blocks.BLOCK", 512)
    arguments = make_states(setting, SHAPES | {"tensor": (40, 30)}, dtype)  # a tensor given alone is called "tensor"
    expected = merge(name, **arguments)
    assert {key: tensor.shape for key, tensor in expected.items()} == SHAPES | {"tensor": (40, 30)}
    assert_same_bits({"tensor": merge(name, **of_one_tensor(arguments, "tensor"))}, {"tensor": expected["tensor"]})
    if name not in DROPPING:
        alone = {key: merge(name, **of_one_tensor(arguments, key)) for key in SHAPES}
        assert_same_bits(alone | {"tensor": expected["tensor"]}, expected)
    for layouts in ((1,), (3, 1, 2)):
        folders = in_folders(tmp_path / str(len(layouts)), arguments, layouts)
        assert_same_bits(merge(name, **folders), expected)
        out = merge(name, **folders, out=tmp_path / f"soup{len(layouts)}", num_threads=2)
        assert_same_bits(load(out), expected)
        small = merge(name, **folders, out=tmp_path / f"small{len(layouts)}", max_shard_size=4000)
        assert_same_bits(load(small), expected)
        assert len(list(small.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_three_levels_agree_beyond_one_block(tmp_path, name, setting):
    arguments = make_states(setting, {"tensor": (1000, 600)}, torch.bfloat16)
    expected = merge(name, **arguments)
    assert_same_bits({"tensor": merge(name, **of_one_tensor(arguments, "tensor"))}, expected)
    assert_same_bits(load(merge(name, **in_folders(tmp_path, arguments, (1,)), out=tmp_path / "soup")), expected)


# Methods in which every element depends on its own place alone, or on a selection, an exact thing: where tensors are
# cut into blocks cannot show. Sums over whole tensors can: their last bits depend on the order of addition.
SUMMING = {"slerp", "nuslerp", "multislerp", "karcher", "sce", "model_stock", "arcee_fusion"}


# Random numbers are drawn block by block: for the methods that drop, the size of a block is part of what a seed means.
@pytest.mark.parametrize(("name", "setting"), [row.values for row in TYPICAL if row.values[0] not in DROPPING])
def test_block_sizes_do_not_show(name, setting, monkeypatch):
    for shape, blocks in (((3, 5), (1, 7)), ((60, 50), (333, 2999))):
        monkeypatch.undo()
        arguments = make_tensors(setting, shape)
        whole = merge(name, **arguments)
        for block in blocks:
            monkeypatch.setattr("soupkit.blocks.BLOCK", block)
            result = merge(name, **arguments)
            if name in SUMMING:
                assert_close(result, whole)
            else:
                assert_same_bits({"": result}, {"": whole})


# Seeds


@pytest.mark.parametrize("name", DROPPING)
def test_seeds(name):
    setting = SETTINGS[name][0]
    arguments = make_states(setting, {"w": (40, 30), "v": (20, 20)})
    parameters = setting.parameters
    soup = merge(name, **arguments)
    assert_same_bits(merge(name, **arguments), soup)
    assert_same_bits(merge(name, **arguments | {"parameters": parameters | {"seed": 0}}), soup)
    for seed in (1, 2**31):
        other = merge(name, **arguments | {"parameters": parameters | {"seed": seed}})
        assert raw(other["w"]) != raw(soup["w"])
        assert raw(other["v"]) != raw(soup["v"])
    torch.manual_seed(5)  # not torch's seed, and torch's generator goes on where it was
    state = torch.random.get_rng_state()
    assert_same_bits(merge(name, **arguments), soup)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_depends_on_no_other_tensor(name):
    setting = SETTINGS[name][0]
    arguments = make_states(setting, {"w": (40, 30), "v": (20, 20)})
    soup = merge(name, **arguments)

    def changed(change: Any) -> State:
        states = {"models": [change(state) for state in arguments["models"]], "base": change(arguments["base"])}
        return merge(name, **arguments | states)

    assert raw(changed(lambda state: {"extra": state["v"] + 1} | state)["w"]) == raw(soup["w"])
    assert raw(changed(lambda state: {"renamed": state["v"], "w": state["w"]})["w"]) == raw(soup["w"])
    assert raw(changed(lambda state: {"w": state["w"]})["w"]) == raw(soup["w"])
    assert raw(changed(lambda state: {"v": state["v"], "w": state["w"]})["w"]) == raw(soup["w"])
    assert raw(changed(lambda state: {"another": state["w"], "v": state["v"]})["another"]) != raw(soup["w"])


def test_two_models_that_are_equal_are_not_dropped_alike():
    base = torch.zeros(1000, dtype=torch.float64)
    parameters = {"weight": [1.0, 1.0], "density": [0.5, 0.5]}
    result = merge("dare_linear", [base + 1, base + 1], base, parameters=parameters)
    assert set(result.unique().tolist()) == {0.0, 2.0, 4.0}


# What is not a number


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_values_that_are_not_finite_are_refused_by_name(name, setting, bad, monkeypatch):
    monkeypatch.setattr("soupkit.blocks.BLOCK", 512)
    for dtype in (torch.float32, torch.bfloat16):
        for index, (label, _) in enumerate(inputs(make_states(setting, {"fine": (3,), "layers.3.w": ()}))):
            arguments = make_states(setting, {"fine": (3,), "layers.3.w": (40, 30)}, dtype)
            inputs(arguments)[index][1]["layers.3.w"][39, 28] = bad
            with pytest.raises(MergeError) as caught:
                merge(name, **arguments)
            assert "'layers.3.w'" in str(caught.value)
            assert label in str(caught.value).lower()
            assert "'fine'" not in str(caught.value)
            assert "\n" not in str(caught.value)


NOT_COUNTING = {
    "weight": ["linear", "nuslerp", "multislerp", "task_arithmetic", "fisher", *DROPPING, *TRIMMING],
    "density": ["dare_linear", "dare_ties", *TRIMMING],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for key, names in NOT_COUNTING.items() for name in names])
def test_values_that_do_not_count_must_be_finite_too(name, key):
    typical = SETTINGS[name][0]
    silent = typical.parameters | {key: [*typical.parameters[key][:-1], 0.0]}
    setting = Setting(typical.num_models, typical.base, typical.fishers, silent)
    for bad in (math.nan, math.inf, -math.inf):
        arguments = make_states(setting, {"w": (40, 30)})
        arguments["models"][-1]["w"][20, 10] = bad
        with pytest.raises(MergeError, match=f"'w' of ingredient {setting.num_models} "):
            merge(name, **arguments)
        if setting.fishers:
            arguments = make_states(setting, {"w": (40, 30)})
            arguments["fishers"][-1]["w"][20, 10] = bad
            with pytest.raises(MergeError, match="'w' of Fisher estimate"):
                merge(name, **arguments)


@pytest.mark.parametrize(("name", "setting"), TYPICAL)
def test_values_that_are_not_finite_can_be_allowed(name, setting):
    for bad in (math.nan, math.inf):
        arguments = make_states(setting, {"fine": (30,), "w": (40, 30)})
        expected = merge(name, **arguments)
        arguments["models"][-1]["w"][20, 10] = bad
        with pytest.warns(UserWarning, match="'w'") as caught:
            result = merge(name, **arguments, allow_nonfinite=True)
        assert len(caught) == 1
        assert "'fine'" not in str(caught[0].message)
        assert_same_bits({"fine": result["fine"]}, {"fine": expected["fine"]})
        assert result["w"].shape == (40, 30)
        if name in ("linear", "task_arithmetic", "passthrough", "fisher", "ema", "lawa"):
            assert result["w"].isfinite().logical_not().nonzero().tolist() == [[20, 10]]


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "slerp"])
def test_a_folder_s_value_that_is_not_finite_is_refused_with_its_name(tmp_path, name):
    setting = SETTINGS[name][0]
    arguments = make_states(setting, {"fine": (3,), "layers.3.w": (40, 30)})
    arguments["models"][1]["layers.3.w"][39, 29] = math.nan
    folders = in_folders(tmp_path, arguments, (2, 1))
    with pytest.raises(MergeError) as caught:
        merge(name, **folders, out=tmp_path / "soup")
    assert "'layers.3.w'" in str(caught.value)
    assert "model1" in str(caught.value)
    assert not (tmp_path / "soup").exists()
    assert not list(tmp_path.glob(".soup*"))


def test_values_that_are_only_large_are_finite():
    huge = torch.full((1000,), torch.finfo(torch.float32).max)  # their sum overflows, they do not
    assert torch.equal(merge("linear", [huge, huge], parameters={"weight": [1.0, 1.0]}), huge)
    assert torch.equal(merge("ties", [huge], -huge * 0, parameters={"weight": [1.0], "density": [1.0]}), huge)
