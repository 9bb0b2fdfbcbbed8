"""Train the demo checkpoints: `python -m serverless_llm.demo.train [TASK...] [--out DIR]`.

Half an hour on two CPU cores for all three. Needs transformers (a development dependency), whose reference models
are trained here, so that a checkpoint's answers are right by somebody else's arithmetic too. Each checkpoint is an
ordinary Hugging Face directory with float32 weights (rounded to bfloat16's numbers); it is scored as stored, in float32
and in bfloat16, on held-out prompts, and the scores go to `scores.json`.
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from serverless_llm.demo.examples import IGNORED, batch, padded, whole_row
from serverless_llm.demo.tasks import ADD, COUNT, NAMES, REVERSE, TASKS, Task
from serverless_llm.demo.tokenizer import VOCABULARY, write_configs, write_tokenizer

CONTEXT = 1024
SCORED_PROMPTS = 1000
WARM_UP = 50  # steps of rising learning rate
Model = Any  # a transformers causal model
Models: Any = AutoModelForCausalLM  # typed or not by transformers' release


@dataclass(frozen=True, slots=True)
class Phase:
    """Some steps of training at one batch size; `whole` trains counts at full length instead of in windows."""

    steps: int
    rows: int
    peak_rate: float
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train for one task: the shape's `config.json` keys and the phases."""

    shape: dict[str, Any]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """A line of `scores.json`; the accuracies are shares of `prompts` held-out prompts answered exactly.

    `cpu_seconds` is what training took on all cores together; on two cores half of it passes.
    """

    parameters: int
    cpu_seconds: int
    prompts: int
    float32: float
    bfloat16: float


def _shape(architecture: str, **sizes: Any) -> dict[str, Any]:
    model_type = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}[architecture]
    common = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    return {"architectures": [architecture], "model_type": model_type} | common | sizes


RECIPES = {
    COUNT.name: Recipe(
        _shape(
            "LlamaForCausalLM",
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            mlp_bias=False,
            tie_word_embeddings=False,
        ),
        (Phase(1600, 128, 2e-3, whole=False), Phase(100, 12, 5e-4)),
    ),
    ADD.name: Recipe(
        _shape(
            "Qwen3ForCausalLM",
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        (Phase(2000, 256, 2e-3),),
    ),
    REVERSE.name: Recipe(
        _shape(
            "LlamaForCausalLM",
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            mlp_bias=False,
            tie_word_embeddings=True,
        ),
        (Phase(1500, 256, 2e-3),),
    ),
}


def _run_phase(model: Model, task: Task, phase: Phase, rng: random.Random) -> None:
    """Train with AdamW: a linear warm-up, then a cosine down to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak_rate, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / phase.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(phase.steps):
        tokens, positions, labels = batch(task, rng, phase.rows, whole=phase.whole)
        # An explicit mask keeps transformers from reading a window's jump in position as a packed sequence.
        logits = model(
            input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == phase.steps - 1:
            print(f"{task.name} step {step} loss {loss.item():.6f}", flush=True)


def train(task: Task, recipe: Recipe, seed: int = 0) -> Model:
    """A float32 model trained on the task's training side, its weights rounded to bfloat16 at the end."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**recipe.shape)
    model = Models.from_config(config, dtype=torch.float32)
    rng = random.Random(seed)
    for phase in recipe.phases:
        _run_phase(model, task, phase, rng)
    return model.to(torch.bfloat16).to(torch.float32).eval()


def save(model: Model, shape: dict[str, Any], directory: Path) -> None:
    """Write an ordinary Hugging Face directory with float32 weights; a tied head is stored once."""
    directory.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if shape["tie_word_embeddings"] else set()
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    path = directory / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone, which would travel into the wheel
    write_configs(directory, shape)
    write_tokenizer(directory, CONTEXT)


@torch.no_grad()
def accuracy(model: Model, task: Task, prompts: list[str], rows: int = 50) -> float:
    """The share of prompts that the model, decoding greedily under the chat template, answers exactly.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest one after those before it, so that
    one pass over the right answers tells: seconds instead of an hour for a thousand long counts.
    """
    right = 0
    for start in range(0, len(prompts), rows):
        asked = prompts[start : start + rows]
        tokens, _, labels = padded([whole_row(task, prompt) for prompt in asked])
        likeliest = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.argmax(-1)
        wrong = ((likeliest != labels) & (labels != IGNORED)).any(dim=1)
        right += len(asked) - int(wrong.sum())
        for index in wrong.nonzero().flatten().tolist():
            print(f"{task.name} wrong: {asked[index]!r}", flush=True)
    return right / len(prompts)


def score(directory: Path, task: Task, cpu_seconds: float, count: int) -> Score:
    """Score a written checkpoint in both dtypes."""
    prompts = task.held_out(count)
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Models.from_pretrained(directory, dtype=dtype)
        shares.append(accuracy(model.eval(), task, prompts))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Score(parameters, round(cpu_seconds), count, *shares)


def _record(out: Path, name: str, result: Score) -> None:
    path = out / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(scores | {name: asdict(result)}, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Train, save and score the tasks named on the command line, or all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="*", help=f"which of {', '.join(NAMES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.task or NAMES:
        start = time.process_time()
        model = train(TASKS[name], RECIPES[name])
        seconds = time.process_time() - start
        save(model, RECIPES[name].shape, arguments.out / name)
        result = score(arguments.out / name, TASKS[name], seconds, SCORED_PROMPTS)
        _record(arguments.out, name, result)
        print(name, result, flush=True)


if __name__ == "__main__":
    main()
