"""The work that benchmarks/ppo.py measures: rlhf.ppo, TRL's PPOTrainer, and the matrix products of an update alone.

    python benchmarks/ppo_work.py {ours,trl,floor} FOLDER ...    # children of ppo.py: the last line printed is JSON

FOLDER holds the models and prompts of a task, as :func:`make_task` writes them. TRL's side runs in TRL's environment
and loads nothing of ours.

Nothing ends a response: hidden dimension 0 is the same positive number everywhere in the models, and the rows of the
tied head for the end-of-sequence and the padding token hold a large negative number there, so that their probability is
0 in float32. Both sides therefore sample, score and train on exactly the same numbers of tokens, whatever they make of
an end of sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import Record, add_command, run_command, say
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS = 0, 1
LEVEL, SILENT = 0.02, -1000.0  # hidden dimension 0 of every token, and of those that are never sampled
TUNING_SPREAD = 0.002  # standard deviation of what a fine-tuning adds
LEARNING_RATE = 1e-6
PHASES = ("rollout", "scoring", "training")
POLLING_INTERVAL = 0.02  # seconds between two looks at a run's timings
FLOOR_REPEATS = 5  # the fastest counts


@dataclass(frozen=True)
class Task:
    """The sizes of a Llama with tied embeddings, and of one update: every episode is a prompt and a response."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    episodes: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 48
    epochs: int = 4
    minibatches: int = 4
    temperature: float = 0.7

    @property
    def length(self) -> int:
        """Tokens of an episode."""
        return self.prompt_tokens + self.new_tokens

    @classmethod
    def read(cls, folder: Path) -> Task:
        """The task that a folder was made for."""
        return cls(**json.loads((folder / "task.json").read_text(encoding="utf-8")))


FULL = (Task(8192), Task(131072))
QUICK = tuple(
    Task(size, 16, 32, 2, 2, 2, episodes=16, prompt_tokens=4, new_tokens=4, epochs=1, minibatches=2)
    for size in (40, 80)
)
SMOLLM2 = Task(49152, 576, 1536, 30, 9, 3, episodes=128, new_tokens=128)  # SmolLM2-135M


# --- models and prompts ---


def make_task(task: Task, folder: Path) -> None:
    """Write policy ``sft1``, ``sft2``, their average ``soup``, ``reward``, ``prompts.jsonl`` and ``task.json``."""
    import soupkit

    words = make_tokenizer(task)
    for seed in (1, 2):
        language_model(task, seed).save_pretrained(folder / f"sft{seed}")
        words.save_pretrained(folder / f"sft{seed}")
    soupkit.average([folder / "sft1", folder / "sft2"], out=folder / "soup")
    torch.manual_seed(3)
    LlamaForSequenceClassification(llama_config(task, num_labels=1)).save_pretrained(folder / "reward")
    words.save_pretrained(folder / "reward")
    rows = [{"prompt": words.decode(ids)} for ids in prompt_ids(task)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(asdict(task)) + "\n", encoding="utf-8")


def llama_config(task: Task, **settings: Any) -> LlamaConfig:
    """The task's Llama."""
    return LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=task.hidden_size,
        intermediate_size=task.intermediate_size,
        num_hidden_layers=task.num_layers,
        num_attention_heads=task.num_heads,
        num_key_value_heads=task.num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        **settings,
    )


@torch.no_grad()
def language_model(task: Task, seed: int) -> LlamaForCausalLM:
    """The same random base for every seed, plus a little of the seed's own; its responses never end."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(task)).eval()
    own = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += TUNING_SPREAD * torch.randn(parameter.shape, generator=own)
    model.model.embed_tokens.weight[:, 0] = LEVEL
    model.model.embed_tokens.weight[[PAD, EOS], 0] = SILENT
    for layer in model.model.layers:  # nothing else writes to dimension 0
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.model.norm.weight[0] = 1.0
    return model


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(2, task.vocab_size))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def prompt_ids(task: Task) -> list[list[int]]:
    """Four batches of random prompts."""
    generator = torch.Generator().manual_seed(4)
    shape = (4 * task.episodes, task.prompt_tokens)
    return torch.randint(2, task.vocab_size, shape, generator=generator).tolist()


# --- memory ---


def resident_bytes(key: str = "VmRSS") -> int:
    """Resident memory of this process: VmRSS now, VmHWM the most since it began or the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Meter:
    """Peak resident memory of the updates and of the whole process, and the processors' time of each update."""

    def __init__(self) -> None:
        self.before = self.updates = 0
        self.cpu_times: list[float] = []  # at the start, and at the end of every update

    def begin(self) -> None:
        """The first update starts here."""
        self.before = resident_bytes("VmHWM")
        with suppress(OSError):  # where it is not allowed, the updates have the process's peak
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self.note(0)

    def note(self, num_done: int) -> None:
        """So many updates are done. The last one counts until the next is noted."""
        self.updates = resident_bytes("VmHWM")
        if num_done >= len(self.cpu_times):
            self.cpu_times += [time.process_time()] * (num_done + 1 - len(self.cpu_times))

    def record(self, updates: Sequence[Record]) -> Record:
        """What was measured, beside the phases of every update."""
        cpu_seconds = [after - before for before, after in pairwise(self.cpu_times)]
        rows = [
            row | {"seconds": sum(row.values()), "cpu_seconds": cpu}
            for row, cpu in zip(updates, cpu_seconds, strict=True)
        ]
        peak = max(self.before, self.updates, resident_bytes("VmHWM"))  # of which each read is off by some pages
        threads = torch.get_num_threads()
        return {"updates": rows, "threads": threads, "peak_bytes": peak, "update_peak_bytes": self.updates}


@contextmanager
def metered_run(timings: Path, updates: int) -> Iterator[Meter]:
    """A run of ours, metered: its updates begin when ``timings`` is there, and each ends with a line in it."""
    meter, ended = Meter(), threading.Event()

    def watch() -> None:
        while not timings.exists() and not ended.wait(POLLING_INTERVAL):
            pass
        meter.begin()
        num_done = 0
        while num_done < updates and not ended.wait(POLLING_INTERVAL):
            num_done = timings.read_bytes().count(b"\n")
            meter.note(num_done)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield meter
    finally:
        ended.set()
        watcher.join()


# --- ours ---


def ours(options: argparse.Namespace) -> None:
    """Run rlhf.ppo: print what each update took, and its memory."""
    from rlhf import processor

    processor.prepare()  # as the command does
    print(json.dumps(load_ours(options) if options.only_load else run_ours(options)))


def load_ours(options: argparse.Namespace) -> Record:
    """The memory of a process that has loaded as many models as a run holds."""
    import rlhf.ppo  # noqa: F401
    from rlhf.models import load_causal_lm, load_scalar_head_model

    models: list[Any] = [load_causal_lm(options.folder / name) for name in ("sft1", "soup")]
    num_scalar_models = 2 if options.value_model == "separate" else 1
    models += [load_scalar_head_model(options.folder / "reward") for _ in range(num_scalar_models)]
    return {"loaded_bytes": resident_bytes(), "models": len(models)}


def run_ours(options: argparse.Namespace) -> Record:
    """One run of ``python -m rlhf.ppo`` in this process, with as little beside the updates as it allows."""
    from rlhf.config import PPOConfig
    from rlhf.ppo import main as run_ppo

    folder, task = options.folder, Task.read(options.folder)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        given = {
            "policy": folder / "sft1",
            "reference": [folder / "sft1", folder / "sft2"],
            "reward": folder / "reward",
            "prompts": folder / "prompts.jsonl",
            "test_prompts": folder / "prompts.jsonl",
            "output": run,
            "updates": options.updates,
            "batch_size": task.episodes,
            "ppo_epochs": task.epochs,
            "minibatch_size": task.episodes // task.minibatches,
            "micro_batch_size": task.episodes // task.minibatches // 2,
            "max_new_tokens": task.new_tokens,
            "temperature": task.temperature,
            "learning_rate": LEARNING_RATE,
            "value_learning_rate": LEARNING_RATE,
            "eval_episodes": 2,
            "num_samples": 0,
        }
        # A version without this setting has the separate model only.
        if "value_model" in {field.name for field in fields(PPOConfig)}:
            given["value_model"] = options.value_model
        with metered_run(run / "timings.jsonl", options.updates) as meter:
            run_ppo([part for name, value in given.items() for part in _flag(name, value)])
        timings, metrics = (_read_lines(run / f"{name}.jsonl") for name in ("timings", "metrics"))
    for row in metrics:
        _require_work(task, "ours", row["response_length"], row["optimizer_steps"])
    updates = [{phase: row[phase] for phase in PHASES} for row in timings]
    return meter.record(updates)


def _flag(name: str, value: Any) -> list[str]:
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _require_work(task: Task, side: str, response_tokens: float, optimizer_steps: float) -> None:
    """A side that samples fewer tokens or steps less often has not done the work."""
    expected = (task.new_tokens, task.epochs * task.minibatches)
    if (response_tokens, optimizer_steps) != expected:
        raise ValueError(
            f"{side}: an update had {response_tokens:g} tokens a response and {optimizer_steps:g} optimizer steps, not "
            f"{expected[0]} and {expected[1]}: nothing to compare"
        )


# --- TRL ---


def trl(options: argparse.Namespace) -> None:
    """Run TRL's PPOTrainer on the same task: print what each update took, and its memory."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.ppo import ppo_trainer
    except ImportError as error:
        raise ValueError(f"no PPOTrainer in this environment ({error}): pip install trl==1.12.0 into it") from None
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = options.folder
    models: Record = {
        "model": AutoModelForCausalLM.from_pretrained(folder / "sft1", dtype=torch.float32),
        "ref_model": AutoModelForCausalLM.from_pretrained(folder / "soup", dtype=torch.float32),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        "value_model": AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
    }
    if options.only_load:
        print(json.dumps({"loaded_bytes": resident_bytes(), "models": len(models)}))
        return
    words = AutoTokenizer.from_pretrained(folder / "sft1", padding_side="left")
    print(json.dumps(_run_trl(ppo_trainer, Task.read(folder), models, words, options.updates)))


def _run_trl(ppo_trainer: Any, task: Task, models: Record, words: Any, num_updates: int) -> Record:
    from transformers import TrainerCallback

    meter = Meter()
    times: dict[str, float] = {}
    updates: list[Record] = []

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """The phases of each update. What comes after the log, garbage collection above all, is ``other``."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()
            times["end"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.note(len(updates) + 1)
            ended = time.perf_counter()
            updates.append(
                {
                    "rollout": times["sampled"] - times["start"],
                    "scoring": times["scored"] - times["sampled"],
                    "training": ended - times.pop("scored"),
                    "other": times["start"] - times["end"],
                }
            )
            times["end"] = ended

    generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def timed_generation(*arguments: Any) -> Any:
        times["start"] = time.perf_counter()
        result = generate(*arguments)
        times["sampled"] = time.perf_counter()
        return result

    def timed_forward(*arguments: Any) -> Any:
        if torch.is_grad_enabled():  # the reference is read without
            times.setdefault("scored", time.perf_counter())
        return forward(*arguments)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
    data = [{"input_ids": ids} for ids in prompt_ids(task)]
    with tempfile.TemporaryDirectory() as output:
        settings = ppo_trainer.PPOConfig(
            output_dir=output,
            total_episodes=task.episodes * num_updates,
            per_device_train_batch_size=task.episodes,
            gradient_accumulation_steps=1,
            num_mini_batches=task.minibatches,
            num_ppo_epochs=task.epochs,
            response_length=task.new_tokens,
            temperature=task.temperature,
            learning_rate=LEARNING_RATE,
            num_sample_generations=0,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = ppo_trainer.PPOTrainer(
            args=settings, processing_class=words, train_dataset=data, eval_dataset=data, callbacks=[Clock()], **models
        )
        trainer.train()
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    ended = sum(row["val/num_eos_tokens"] for row in trainer.state.log_history if "val/num_eos_tokens" in row)
    _require_work(task, "TRL", task.new_tokens - ended, max(steps) / num_updates)
    return meter.record(updates)


# --- the floor ---

Operation = tuple[Any, ...]
Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]  # two matrices, and where torch puts their product


def torch_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A product as torch has it by default, into memory that is there."""
    return torch.mm(a, b, out=out)


def onednn_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """A product as rlhf's commands take it, which is new memory."""
    from rlhf import processor

    return processor.product(a, b)


def update_operations(task: Task) -> dict[str, Counter[Operation]]:
    """The matrix products and attentions of an update with a separate value model, by part: {part: {operation: times}}

    ("product", m, k, n)        [m, k] · [n, k]ᵀ, as a linear layer
    ("gradients", m, k, n)      its two gradients, [m, n] · [n, k] and [m, n]ᵀ · [m, k]
    ("causal", b, s)            attention of b sequences of s tokens, of a layer
    ("causal_gradients", b, s)  the same with its backward
    ("decode", b, s)            attention of one new token each to s

    The head is computed at response positions only, the log-probabilities of the policy are those of sampling, and the
    last token sampled is not read again.
    """
    wide, batch = task.hidden_size, task.episodes
    size = batch // task.minibatches

    def head(rows: int) -> Counter[Operation]:
        return Counter({("product", rows, wide, task.vocab_size): 1})

    def causal(num: int, length: int) -> Counter[Operation]:
        return _layers(task, num * length) + Counter({("causal", num, length): task.num_layers})

    def trained(operations: Counter[Operation]) -> Counter[Operation]:
        gradients: Counter[Operation] = Counter()
        for (kind, *sizes), count in operations.items():
            gradients["gradients" if kind == "product" else "causal_gradients", *sizes] += count
        products = Counter({key: count for key, count in operations.items() if key[0] == "product"})
        return _times(products + gradients, task.epochs * task.minibatches)

    decoding: Counter[Operation] = Counter()
    for length in range(task.prompt_tokens + 1, task.length):
        decoding += _layers(task, batch) + head(batch) + Counter({("decode", batch, length): task.num_layers})
    read = causal(batch, task.length)
    response_rows = size * task.new_tokens
    return {
        "prefill": causal(batch, task.prompt_tokens) + head(batch),
        "decoding": decoding,
        "reference": read + head(batch * task.new_tokens),
        "reward": read,
        "value": read,
        "policy_training": trained(causal(size, task.length) + head(response_rows)),
        "value_training": trained(causal(size, task.length)),
    }


def _layers(task: Task, tokens: int) -> Counter[Operation]:
    """The linear layers of the whole body on so many tokens."""
    wide, inner = task.hidden_size, task.intermediate_size
    keys = wide // task.num_heads * task.num_kv_heads
    products: Counter[Operation] = Counter()
    for shape, count in (((wide, wide), 2), ((wide, keys), 2), ((wide, inner), 2), ((inner, wide), 1)):
        products["product", tokens, *shape] += count * task.num_layers
    return products


def _times(operations: Counter[Operation], factor: int) -> Counter[Operation]:
    return Counter({key: factor * count for key, count in operations.items()})


def flops(task: Task, operation: Operation) -> float:
    """Floating-point operations: two for a multiplication with its addition; half the square of causal attention.

    The backward of attention counts 2.5 times its forward: the scores are computed again.
    """
    kind, *sizes = operation
    if kind in ("product", "gradients"):
        rows, inner, columns = sizes
        return 2.0 * rows * inner * columns * (1 if kind == "product" else 2)
    num, length = sizes
    if kind == "decode":
        return 4.0 * num * length * task.hidden_size
    return 2.0 * num * length**2 * task.hidden_size * (1 if kind == "causal" else 3.5)


def replay(task: Task, operation: Operation, multiply: Multiply = torch_product) -> tuple[float, float]:
    """Seconds that an operation takes, and of all processors: the least of a few, after one to warm up."""
    run = _prepare(task, operation, multiply)
    run()
    seconds, cpu_seconds = [], []
    for _ in range(FLOOR_REPEATS):
        started, cpu_started = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return min(seconds), min(cpu_seconds)


def _prepare(task: Task, operation: Operation, multiply: Multiply) -> Callable[[], object]:
    kind, *sizes = operation
    if kind in ("product", "gradients"):
        rows, inner, columns = sizes
        inputs, weight, outputs = (torch.randn(shape) for shape in ((rows, inner), (columns, inner), (rows, columns)))
        if kind == "product":
            return lambda: multiply(inputs, weight.T, outputs)
        of_inputs, of_weight = torch.empty_like(inputs), torch.empty_like(weight)
        return lambda: (multiply(outputs, weight, of_inputs), multiply(outputs.T, inputs, of_weight))
    num, length = sizes
    heads, size = task.num_heads, task.hidden_size // task.num_heads
    queries = torch.randn(num, heads, 1 if kind == "decode" else length, size)
    keys, values = torch.randn(2, num, heads, length, size)
    attention: Callable[[], Tensor] = lambda: nn.functional.scaled_dot_product_attention(  # noqa: E731
        queries, keys, values, is_causal=kind != "decode"
    )
    if kind != "causal_gradients":
        return attention
    tensors = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    upstream = torch.randn(num, heads, length, size)
    return lambda: torch.autograd.grad(attention(), tensors, upstream)


def floor(options: argparse.Namespace) -> None:
    """Replay the matrix products and attentions of an update: print what they take."""
    task = Task.read(options.folder)
    multiply = onednn_product if options.onednn else torch_product
    parts = update_operations(task)
    operations = dict.fromkeys(sum(parts.values(), Counter()))
    fastest = {operation: replay(task, operation, multiply) for operation in operations}
    seconds, cpu_seconds = (
        {part: sum(fastest[op][clock] * count for op, count in ops.items()) for part, ops in parts.items()}
        for clock in (0, 1)
    )
    gflop = {part: sum(flops(task, op) * count for op, count in ops.items()) / 1e9 for part, ops in parts.items()}
    record = {"parts": seconds, "cpu_parts": cpu_seconds, "gflop": gflop, "threads": torch.get_num_threads()}
    print(json.dumps(record))


# --- decoding ---


def time_decoding(
    task: Task, device: str, dtype: torch.dtype, rounds: int, engine: str = "decode"
) -> list[dict[str, float]]:
    """Seconds to sample a response to a batch of prompts, in turns: ours, and ``generate`` without and with scores."""
    from rlhf.data import Prompt
    from rlhf.rollout import sample

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no GPU; run it on a machine that has one")
    model, words = language_model(task, 1).to(device, dtype), make_tokenizer(task)
    ids = prompt_ids(task)[: task.episodes]
    prompts, tokens = [Prompt("", row) for row in ids], torch.tensor(ids, device=device)

    def run_ours() -> int:
        rollout = sample(
            model,
            words,
            prompts,
            max_new_tokens=task.new_tokens,
            generator=torch.Generator().manual_seed(0),
            temperature=task.temperature,
            engine=engine,
        )
        return int(rollout.response_mask.sum())

    def run_generate(**settings: Any) -> int:
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=task.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=task.new_tokens,
            return_dict_in_generate=True,
            **settings,
        )
        return output.sequences[:, task.prompt_tokens :].numel()

    runs = {"ours": run_ours, "generate": run_generate, "scores": lambda: run_generate(output_scores=True)}
    records: list[dict[str, float]] = []
    for index in range(-1, rounds):  # the first is to warm up
        seconds = {}
        for name in [*runs][index % 3 :] + [*runs][: index % 3]:
            started = time.perf_counter()
            num_tokens = runs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - started
            if num_tokens != task.episodes * task.new_tokens:
                raise ValueError(f"{name} sampled {num_tokens} tokens: nothing to compare")
        if index >= 0:
            records.append({name: seconds[name] for name in runs})
            say(f"decode round {index + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    return records


# --- the command line of a child ---


def settings(options: argparse.Namespace) -> None:
    """Print the names of PPOConfig's fields."""
    from rlhf.config import PPOConfig

    print(json.dumps([field.name for field in fields(PPOConfig)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in (("ours", ours), ("trl", trl)):
        command = add_command(commands, name, function, f"PPO: {name}")
        command.add_argument("folder", type=Path)
        command.add_argument("--updates", type=int, default=4)
        command.add_argument("--only-load", action="store_true", help="load the models and print the memory")
        command.add_argument("--value-model", choices=("separate", "shared"), default="separate")
    command = add_command(commands, "floor", floor, "the matrix products of an update")
    command.add_argument("folder", type=Path)
    command.add_argument("--onednn", action="store_true", help="the products as rlhf's commands take them")
    add_command(commands, "settings", settings, "names of the fields of PPOConfig")
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
