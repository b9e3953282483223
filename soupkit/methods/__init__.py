"""Merge methods: pure functions of tensors, and the one table that lists them."""

from __future__ import annotations

from soupkit.errors import MergeError
from soupkit.methods import averages, spherical, task_vectors
from soupkit.methods.row import Blocks, Fallback, Method, Parameter, Whole

__all__ = ["METHODS", "Blocks", "Fallback", "Method", "Parameter", "Whole", "find_method"]

_T = Parameter("0 gives the first model, 1 the second; beyond them it extrapolates", required=True)
_WEIGHT = Parameter("of each model", required=True, per_ingredient=True)
_EQUAL_WEIGHT = Parameter("of each model", default=1.0, per_ingredient=True)
_LAMBDA = Parameter("scale of the merged task vector", default=1.0)
_DENSITY = Parameter("share of each task vector that is kept", default=1.0, per_ingredient=True, low=0, high=1)
_SEED = Parameter("of the random masks, which depend on it, the tensor's name and the model's position", int, 0)
_INT8_MASK = Parameter("accepted for mergekit's recipes; it changes nothing here", bool, False)


def _normalize(default: bool) -> Parameter:
    return Parameter("divide by the sum of the weights (of those that agree, with sign election)", bool, default)


def _rescale(default: bool, how: str) -> Parameter:
    return Parameter(how, bool, default)


_TASK = {"weight": _WEIGHT, "lambda": _LAMBDA}
_L1 = "scale what is kept to the L1 norm of the whole task vector"
_UNBIASED = "divide what is kept by the probability of keeping it, so that the mean is the task vector"
_TRIM = _TASK | {"density": _DENSITY, "rescale": _rescale(False, _L1), "int8_mask": _INT8_MASK}
_DROP = _TASK | {"density": _DENSITY, "rescale": _rescale(True, _UNBIASED), "seed": _SEED, "int8_mask": _INT8_MASK}
_GAMMA = Parameter("share of the largest values that is dropped", default=0.01, per_ingredient=True, low=0, high=1)
_EPSILON = Parameter(
    "half the range of keep probabilities; density ± epsilon must lie in [0, 1]",
    default=0.15,
    per_ingredient=True,
    low=0,
    high=0.5,
)

_SOUPS = "Wortsman et al. 2022, Model soups, https://arxiv.org/abs/2203.05482"
_DARE = "Yu et al. 2023, Language models are super Mario (DARE), https://arxiv.org/abs/2311.03099"
_TIES = "Yadav et al. 2023, TIES-Merging, https://arxiv.org/abs/2306.01708"
_DELLA = "Deep et al. 2024, DELLA-Merging, https://arxiv.org/abs/2406.11617"
_BREADCRUMBS = "Davari & Belilovsky 2023, Model breadcrumbs, https://arxiv.org/abs/2312.06795"
_RANDOM = (
    "the keep probability is a multiple of 2⁻¹⁶; random numbers are a function of seed, tensor name, model and position"
)
_RANKS = "; ranks are by magnitudes to 5 bits down to 2⁻¹⁶ of a row's largest (equal ones share the mean rank)"
_SIGNS = (
    "; the sign is elected by the weighted sum, + where it is 0; a model of negative weight votes for −dᵢ and adds it, "
    "and with normalize its weight is negative in the divisor Σ_A wᵢ too, which near 0 makes values large (where it is "
    "0, nothing is divided)"
)

METHODS: dict[str, Method] = {
    "linear": Method(
        averages.linear,
        summary="weighted average; the uniform model soup with equal weights",
        formula="Σ wᵢ xᵢ / Σ wᵢ",
        paper=_SOUPS,
        departures="none; the paper's running sum in the checkpoints' precision is replaced by a wider one",
        parameters={"weight": _EQUAL_WEIGHT, "normalize": _normalize(True)},
        check=averages.check_linear,
    ),
    "slerp": Method(
        spherical.slerp,
        summary="point on the great circle between two models, tensor by tensor",
        formula="(sin((1−t)θ) a + sin(tθ) b) / sin θ, with cos θ = a·b / (‖a‖ ‖b‖)",
        paper="Shoemake 1985, Animating rotation with quaternion curves, https://doi.org/10.1145/325334.325242",
        departures="vectors keep their length; the straight line is taken for zeros and for |cos θ| > 0.9995, as "
        "between most fine-tunings of one model: there arc and line are about 1/8000 of the length apart, or less; "
        "soup.json and the command line say for how many tensors",
        parameters={"t": _T},
        min_ingredients=2,
        max_ingredients=2,
        survey=spherical.survey_gram,
        fallback=Fallback("the straight line, for |cos θ| > 0.9995 and zeros", spherical.is_straight),
    ),
    "nuslerp": Method(
        spherical.nuslerp,
        summary="slerp by weights, of models or task vectors, for whole tensors, rows or columns",
        formula="slerp with t = w₂ / (w₁ + w₂); with a base, of x − base, and the base added",
        paper="mergekit, https://github.com/arcee-ai/mergekit",
        departures="the straight line is taken where 1 − cos² θ ≤ 10⁻¹², so that, unlike slerp, it goes along the arc "
        "between fine-tunings of one model too; their task vectors, with a base, have the larger angles",
        parameters={
            "weight": _WEIGHT,
            "nuslerp_flatten": Parameter("one angle for the whole tensor", bool, True),
            "nuslerp_row_wise": Parameter(
                "without flatten: an angle per vector along the first dimension instead of the last", bool, False
            ),
        },
        base="optional",
        min_ingredients=2,
        max_ingredients=2,
        survey=spherical.survey_nuslerp,
        whole_rows=lambda parameters: not parameters["nuslerp_flatten"],
    ),
    "multislerp": Method(
        spherical.multislerp,
        summary="weighted mean of the directions of any number of models, with their weighted mean norm",
        formula="m Σ wᵢ ‖xᵢ‖ / ‖m‖, with m = Σ wᵢ xᵢ / ‖xᵢ‖; with a base, of x − base, and the base added",
        paper="Goddard 2025, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        departures="the step in the tangent space, which is 0, is left out; where directions cancel: the sum",
        parameters={
            "weight": _WEIGHT,
            "normalize_weights": Parameter("divide the weights by their sum", bool, True),
            "eps": Parameter("added to norms against division by zero", default=1e-8, low=0),
        },
        base="optional",
        survey=spherical.survey_gram,
        check=averages.check_multislerp,
    ),
    "karcher": Method(
        spherical.karcher,
        summary="Karcher (Riemannian) mean of the directions, with the mean norm",
        formula="mean ‖xᵢ‖ times the point of the sphere with the least Σ angle(·, xᵢ)²",
        paper="Karcher 1977, https://doi.org/10.1002/cpa.3160300502; for models https://arxiv.org/abs/2603.04972",
        departures="iterated on the coefficients of the models, through their dot products: the same numbers",
        parameters={
            "max_iter": Parameter("most iterations", int, 10, low=1),
            "tol": Parameter("length of the step at which to stop", default=1e-5, low=0),
        },
        survey=spherical.survey_gram,
    ),
    "task_arithmetic": Method(
        task_vectors.task_arithmetic,
        summary="add weighted task vectors to the base",
        formula="base + λ Σ wᵢ dᵢ, with dᵢ = xᵢ − base",
        paper="Ilharco et al. 2022, Editing models with task arithmetic, https://arxiv.org/abs/2212.04089",
        parameters=_TASK | {"normalize": _normalize(False), "int8_mask": _INT8_MASK},
        base="required",
    ),
    "ties": Method(
        task_vectors.ties,
        summary="trim task vectors by magnitude, elect signs, average those that agree",
        formula="base + λ Σ_A wᵢ dᵢ / Σ_A wᵢ, over the models A whose trimmed dᵢ has the elected sign",
        paper=_TIES,
        departures="weights; values that equal the threshold are all kept" + _SIGNS,
        parameters=_TRIM | {"normalize": _normalize(True)},
        base="required",
        shows_non_finite=False,
        survey=task_vectors.survey_magnitudes,
    ),
    "dare_linear": Method(
        task_vectors.dare_linear,
        summary="drop task vectors' values at random, rescale, and add",
        formula="base + λ Σ wᵢ mᵢ dᵢ / p, with P(mᵢ = 1) = p = density",
        paper=_DARE,
        departures=_RANDOM,
        parameters=_DROP | {"normalize": _normalize(False)},
        base="required",
    ),
    "dare_ties": Method(
        task_vectors.dare_ties,
        summary="drop task vectors' values at random, rescale, elect signs, add those that agree",
        formula="base + λ Σ_A wᵢ mᵢ dᵢ / p, with P(mᵢ = 1) = p = density",
        paper=f"{_DARE}; {_TIES}",
        departures=_RANDOM + _SIGNS,
        parameters=_DROP | {"normalize": _normalize(False)},
        base="required",
    ),
    "della": Method(
        task_vectors.della,
        summary="drop small values with a higher probability than large ones, rescale, elect signs, average",
        formula="base + λ Σ_A wᵢ mᵢ dᵢ / pᵢ / Σ_A wᵢ, with pᵢ = density − ε + 2 ε rank / (C − 1) in a row of C",
        paper=_DELLA,
        departures=_RANDOM + _SIGNS + _RANKS,
        parameters=_DROP | {"epsilon": _EPSILON, "normalize": _normalize(True)},
        base="required",
        whole_rows=lambda parameters: True,
        check=task_vectors.check_della,
    ),
    "della_linear": Method(
        task_vectors.della_linear,
        summary="drop small values with a higher probability than large ones, rescale, and add",
        formula="base + λ Σ wᵢ mᵢ dᵢ / pᵢ, with pᵢ = density − ε + 2 ε rank / (C − 1) in a row of C",
        paper=_DELLA,
        departures=_RANDOM + _RANKS,
        parameters=_DROP | {"epsilon": _EPSILON, "normalize": _normalize(False)},
        base="required",
        whole_rows=lambda parameters: True,
        check=task_vectors.check_della,
    ),
    "breadcrumbs": Method(
        task_vectors.breadcrumbs,
        summary="drop the largest and the smallest values of the task vectors, and add",
        formula="base + λ Σ wᵢ dᵢ, over values between two quantiles of |dᵢ|",
        paper=_BREADCRUMBS,
        departures="weights; values that equal a threshold are all kept; fewer outliers go where density asks for more",
        parameters=_TRIM | {"gamma": _GAMMA, "normalize": _normalize(False)},
        base="required",
        shows_non_finite=False,
        survey=task_vectors.survey_breadcrumbs,
    ),
    "breadcrumbs_ties": Method(
        task_vectors.ties,
        summary="drop the largest and the smallest values of the task vectors, elect signs, add those that agree",
        formula="base + λ Σ_A wᵢ dᵢ, over values between two quantiles of |dᵢ|",
        paper=f"{_BREADCRUMBS}; {_TIES}",
        departures="as breadcrumbs" + _SIGNS,
        parameters=_TRIM | {"gamma": _GAMMA, "normalize": _normalize(False)},
        base="required",
        shows_non_finite=False,
        survey=task_vectors.survey_breadcrumbs,
    ),
    "sce": Method(
        task_vectors.sce,
        summary="select positions that vary most between models, weigh models by energy, erase minority signs",
        formula="base + Σ_A wᵢ dᵢ / Σ_A wᵢ, with wᵢ ∝ Σ dᵢ² over the selected positions",
        paper="Wan et al. 2024, FuseChat (SCE), https://arxiv.org/abs/2408.07990",
        departures="variances that equal the threshold are all selected; the sign is + where the sum is 0",
        parameters={
            "select_topk": Parameter("share of the positions that vary that is selected", default=1.0, low=0, high=1),
            "int8_mask": _INT8_MASK,
        },
        base="required",
        survey=task_vectors.survey_sce,
    ),
    "model_stock": Method(
        task_vectors.model_stock,
        summary="between the base and the average, by the angle between the task vectors",
        formula="t mean(x) + (1 − t) base, with t = n c / (1 + (n − 1) c), c = mean cos(dᵢ, dⱼ)",
        paper="Jang et al. 2024, Model Stock, https://arxiv.org/abs/2403.19522",
        departures="the cosine is the mean over pairs, and t is kept in [0, 1]: opposed task vectors give the base",
        parameters={"filter_wise": Parameter("an angle, and so a t, for each row", bool, False)},
        base="required",
        min_ingredients=2,
        survey=task_vectors.survey_model_stock,
        whole_rows=lambda parameters: parameters["filter_wise"],
    ),
    "nearswap": Method(
        task_vectors.nearswap,
        summary="move the base towards a model, each value by at most t",
        formula="(1 − w) base + w x, with w = min(1, t / |x − base|)",
        paper="alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        parameters={"t": Parameter("the largest change of a value", required=True, low=0)},
        base="required",
        max_ingredients=1,
        shows_non_finite=False,
    ),
    "arcee_fusion": Method(
        task_vectors.arcee_fusion,
        summary="take over only the changes that matter most to the rows' softmax",
        formula="base + d where |d| KL(softmax(x row) ‖ softmax(base row)) ≥ median + 1.5 (Q₃ − Q₁)",
        paper="Arcee AI 2024, Arcee Fusion, https://www.arcee.ai",
        departures="quartiles of all values, not of a sample; with allow_nonfinite, one NaN or +∞ makes the KL of "
        "its row NaN, so that the base's whole row stays",
        base="required",
        max_ingredients=1,
        survey=task_vectors.survey_arcee_fusion,
        whole_rows=lambda parameters: True,
    ),
    "passthrough": Method(
        averages.passthrough,
        summary="one model, as it is or scaled",
        formula="s x",
        paper="mergekit, https://github.com/arcee-ai/mergekit",
        parameters={"scale": Parameter("factor", default=1.0, per_ingredient=True)},
        max_ingredients=1,
    ),
    "fisher": Method(
        averages.fisher,
        summary="average weighted by how much each parameter matters to each model",
        formula="Σ wᵢ Fᵢ xᵢ / Σ wᵢ Fᵢ, with Fᵢ the diagonal of the Fisher information",
        paper="Matena & Raffel 2022, Merging models with Fisher-weighted averaging, https://arxiv.org/abs/2111.09832",
        departures="the weighted average where no model has any information",
        parameters={"weight": Parameter("of each model", default=1.0, per_ingredient=True, low=0)},
        needs_fishers=True,
        shows_non_finite=False,
        check=averages.check_fisher,
    ),
    "ema": Method(
        averages.ema,
        summary="exponential moving average over a run's checkpoints, the oldest first",
        formula="a₁ = x₁, aᵢ = decay aᵢ₋₁ + (1 − decay) xᵢ",
        paper="Polyak & Juditsky 1992; Morales-Brotons et al. 2024, https://arxiv.org/abs/2411.18704",
        departures="an average of saved checkpoints, not of every step",
        parameters={"decay": Parameter("share of the old average at each checkpoint", required=True, low=0, high=1)},
    ),
    "lawa": Method(
        averages.lawa,
        summary="latest weight averaging: the uniform average of a run's last checkpoints, the oldest first",
        formula="Σ xᵢ / k, over the last k",
        paper="Kaddour 2022, Stop wasting my time!, https://arxiv.org/abs/2209.14981",
        parameters={"last": Parameter("how many checkpoints; all by default", int, low=1, counts_models=True)},
        shows_non_finite=False,
    ),
}


def find_method(name: str) -> Method:
    """The row of METHODS. Raises MergeError for an unknown name."""
    if name not in METHODS:
        raise MergeError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
