"""Trains the tiny model that `qpaged` bundles: a byte-level decoder of Python's standard library.

    pip install "qpaged[train]"
    python benchmarks/train_tiny.py --minutes 75

The learning rate falls with the time spent and not with the steps, so that a run ends well trained on a
machine of any speed. After an interruption the same command resumes from `--state`.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from qpaged.models.checkpoint import load_checkpoint, save_checkpoint
from qpaged.models.config import DecoderConfig
from qpaged.models.decoder import Params, forward, init_params
from qpaged.models.text import standard_library_text

CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)
QUERY_BLOCK = 128
"""Queries that attend together. A block reads no key past its own end, which halves the work."""

BATCH_TOKENS = 4096
PRINT_EVERY = 20
GOLDEN = (5**0.5 - 1) / 2
RESULTS = Path(__file__).parent / "results" / "train_tiny.json"
MODEL = Path(__file__).parents[1] / "qpaged" / "models" / "tiny"


class State(NamedTuple):
    """Everything that a run needs to resume."""

    params: Params
    optimizer: Any
    step: int
    tokens: int
    samples: int
    seconds: float


def causal_attention(
    layer: int, query: jax.Array, key: jax.Array, value: jax.Array, *, sequence_length: int
) -> jax.Array:
    """Attend within sequences of one length that are concatenated; shapes are those of `Attend`."""
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[2]
    query = query.reshape(-1, sequence_length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    key = key.reshape(-1, sequence_length, kv_heads, head_dim)
    value = value.reshape(-1, sequence_length, kv_heads, head_dim)
    blocks = [
        _attend_block(query[:, start : start + QUERY_BLOCK], key, value, start)
        for start in range(0, sequence_length, QUERY_BLOCK)
    ]
    return jnp.concatenate(blocks, axis=1).reshape(-1, heads, head_dim)


def _attend_block(query: jax.Array, key: jax.Array, value: jax.Array, start: int) -> jax.Array:
    end = start + query.shape[1]
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key[:, :end])
    visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, value[:, :end])


def bits_per_byte(params: Params, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Return the mean of -log2 p over the tokens [batch, length + 1] that have a context, a scalar."""
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    batch, length = inputs.shape
    attend = partial(causal_attention, sequence_length=length)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    logits = forward(params, config, inputs.reshape(-1), positions, attend)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1))
    return losses.mean() / np.log(2)


def make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Return Muon (Jordan 2024) for the layers' matrices, with Adam for the embedding and the norms."""

    def dimensions(params: Any) -> Any:
        # Weights are [out, in], while muon expects [in, out].
        matrix = MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        return {name: matrix if "proj" in name else None for name in params}

    optimizer = muon(
        learning_rate,
        weight_decay=0.1,
        consistent_rms=0.2,
        adam_b2=0.98,
        adam_learning_rate=learning_rate,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def make_train_step(config: DecoderConfig, optimizer: optax.GradientTransformation) -> Any:
    """Return the jitted step: (params, state, tokens, fraction of learning rate) -> (params, state, loss)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params: Params, state: Any, tokens: jax.Array, fraction: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(bits_per_byte)(params, config, tokens)
        updates, state = optimizer.update(gradients, state, params)
        updates = jax.tree.map(lambda update: fraction * update, updates)
        return optax.apply_updates(params, updates), state, loss

    return train_step


def draw_batch(text: np.ndarray, first_sample: int, batch: int, length: int) -> np.ndarray:
    """Return windows [batch, length + 1] int32 whose starts walk the text in steps of the golden ratio.

    Consecutive windows lie far apart, and however many are drawn, they cover the text evenly.
    """
    sample = np.arange(first_sample, first_sample + batch)
    start = ((sample * GOLDEN) % 1 * (len(text) - length)).astype(int)
    return text[start[:, None] + np.arange(length + 1)].astype(np.int32)


def schedule(progress: float, warmup: float = 0.02) -> float:
    """Return the fraction of the peak learning rate: a short rise, then a straight line to zero."""
    return min(progress / warmup, 1.0) * max(1.0 - progress, 0.0)


def sequence_length(progress: float) -> int:
    """Return the length to train at: short sequences first, which are cheaper, then the full context."""
    if progress < 0.15:
        return 256
    if progress < 0.3:
        return 512
    return CONFIG.max_position_embeddings


def advance(state: State, train_step: Any, text: np.ndarray, budget: float) -> tuple[State, float]:
    """Take one step; return the new state and the step's loss."""
    began = time.perf_counter()
    progress = state.seconds / budget
    length = sequence_length(progress)
    tokens = draw_batch(text, state.samples, BATCH_TOKENS // length, length)
    rate = np.float32(schedule(progress))
    params, optimizer, loss = train_step(state.params, state.optimizer, tokens, rate)
    # Reading the loss waits for the step, so that the clock below covers all of it.
    loss = float(loss)
    return State(
        params,
        optimizer,
        step=state.step + 1,
        tokens=state.tokens + BATCH_TOKENS,
        samples=state.samples + len(tokens),
        seconds=state.seconds + time.perf_counter() - began,
    ), loss


def train(
    state: State, optimizer: optax.GradientTransformation, text: np.ndarray, budget: float
) -> Iterator[State]:
    """Yield the state after every step until `budget` seconds are spent, with a line every `PRINT_EVERY`."""
    train_step = make_train_step(CONFIG, optimizer)
    losses: list[float] = []
    printed = state
    while state.seconds < budget:
        state, loss = advance(state, train_step, text, budget)
        losses.append(loss)
        if len(losses) == PRINT_EVERY:
            print_progress(state, printed, losses, budget)
            losses, printed = [], state
        yield state


def print_progress(state: State, since: State, losses: list[float], budget: float) -> None:
    speed = (state.tokens - since.tokens) / (state.seconds - since.seconds)
    print(
        f"step {state.step}  loss {np.mean(losses):.3f} bits per byte  "
        f"length {sequence_length(state.seconds / budget)}  {speed:.0f} tokens/s  "
        f"{(budget - state.seconds) / 60:.1f} min left",
        flush=True,
    )


def save_state(path: Path, state: State) -> None:
    """Write a state atomically: an interruption leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(state)))
    partial.replace(path)


def save(options: argparse.Namespace, state: State) -> None:
    """Save the state to resume from, and the checkpoint."""
    save_state(options.state, state)
    save_checkpoint(options.output, CONFIG, state.params)


def load_state(path: Path, like: State) -> State:
    """Read a state with the structure of `like`."""
    with np.load(path) as file:
        leaves = [file[f"arr_{index}"] for index in range(len(file.files))]
    state = State(*jax.tree.unflatten(jax.tree.structure(like), leaves))
    return state._replace(
        step=int(state.step),
        tokens=int(state.tokens),
        samples=int(state.samples),
        seconds=float(state.seconds),
    )


def start_state(optimizer: optax.GradientTransformation, seed: int) -> State:
    """Return the state before the first step."""
    params = init_params(CONFIG, jax.random.key(seed))
    return State(params, optimizer.init(params), step=0, tokens=0, samples=0, seconds=0.0)


def evaluate(directory: Path, text: np.ndarray, batch: int = 4) -> float:
    """Return the bits per byte of the checkpoint on disk, over consecutive windows of its full context."""
    config, params = load_checkpoint(directory, jnp.float32)
    length = config.max_position_embeddings
    starts = np.arange(0, len(text) - length, length)
    batches = starts[: len(starts) // batch * batch].reshape(-1, batch)
    measure = jax.jit(bits_per_byte, static_argnums=1)
    windows = (text[start[:, None] + np.arange(length + 1)].astype(np.int32) for start in batches)
    return float(np.mean([measure(params, config, window) for window in windows]))


def report(state: State, held_out_bits: float, train_bytes: int, held_out_bytes: int) -> dict[str, Any]:
    """Return the figures of the run as JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "parameters": sum(weight.size for weight in state.params.values()),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds),
        "train_bytes": train_bytes,
        "held_out_bytes": held_out_bytes,
        "context": CONFIG.max_position_embeddings,
        "held_out_bits_per_byte": round(held_out_bits, 4),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=75, help="time to train for, over all resumed runs")
    parser.add_argument("--learning-rate", type=float, default=0.01, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights")
    parser.add_argument("--save-minutes", type=float, default=3, help="time between saves")
    parser.add_argument(
        "--state", type=Path, default=Path("build/train_tiny.npz"), help="where a run resumes from"
    )
    parser.add_argument("--output", type=Path, default=MODEL, help="directory of the trained checkpoint")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of the figures")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    text = np.frombuffer(standard_library_text("train"), np.uint8)
    held_out = np.frombuffer(standard_library_text("held_out"), np.uint8)
    optimizer = make_optimizer(options.learning_rate)
    state = start_state(optimizer, options.seed)
    if options.state.exists():
        state = load_state(options.state, state)
        print(f"resuming from {options.state} at step {state.step}")
    saved = state.seconds
    for reached in train(state, optimizer, text, 60 * options.minutes):
        state = reached
        if state.seconds - saved > 60 * options.save_minutes:
            save(options, state)
            saved = state.seconds
    save(options, state)
    results = report(state, evaluate(options.output, held_out), len(text), len(held_out))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
