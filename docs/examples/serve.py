"""Serves prompts, one a line, on a quantized paged cache: a whole engine to read, and to begin with.

    python docs/examples/serve.py                 # the bundled tiny model; prompts come from stdin
    python docs/examples/serve.py SmolLM2-135M --prompts prompts.txt --format int4:token+rotate+exact128

Batches are continuous: every step takes a token of each sequence that decodes, and pieces of prompts as far
as it has room. Prompts that begin alike share pages. Where pages run out, the sequence that came last goes to
the host, and comes back when others are done. What is sampled is the likeliest token.
"""

import argparse
import functools
import json
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged import models

TINY = Path(models.__file__).parent / "tiny"

# What is done to a layer is compiled once for all that are alike.
change = jax.jit(qpaged.PagedAttentionCacheView.apply_changes, donate_argnums=0)
take = jax.jit(qpaged.PagedAttentionCacheView.take_pages)
put = jax.jit(qpaged.PagedAttentionCacheView.put_pages, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="options")
def write_and_attend(view, query, key, value, metadata, options):
    """Write the keys and values of a step to a layer's pages, and attend to what is there then."""
    view = view.write_to_cache(key, value, metadata)
    return view, qpaged.paged_attention(query, view, metadata, **vars(options))


def forward(params, config, views, tokens, metadata):
    """Run the model on the tokens of a step [n], and return the likeliest next token of each row.

    The views of the cache are replaced by those with the tokens written.
    """

    def attend(layer, query, key, value):
        options = config.attention(layer)
        views[layer], out = write_and_attend(views[layer], query, key, value, metadata, options)
        return out

    hidden = models.final_hidden(params, config, tokens, metadata.ragged_position, attend)
    last = hidden[metadata.ragged_starts[1:] - 1]  # of each row; of those without a token, any
    return jnp.argmax(models.output_logits(params, config, last), axis=-1)


@dataclass(eq=False)
class Request:
    """A prompt, and what came after it.

    Attributes:
        tokens: those of the prompt, then those that were sampled.
        prompt: how many are of the prompt.
        most: how many there may be.
        written: how many of them are in the cache.
        on_host: its pages of each layer, while it is swapped out.
    """

    tokens: list[int]
    prompt: int
    most: int
    written: int = 0
    on_host: list[qpaged.PagedAttentionCacheView] | None = None
    is_done: bool = False


class Engine:
    """Serves requests of one model.

    Args:
        config, params: of a decoder.
        quantizer: the format of the cache; None for plain pages.
        memory: bytes of the cache.
        rows: sequences in a step, at most.
        context: tokens of a sequence, at most.
        budget: tokens of a step, at most.
        stop: tokens after which a sequence ends.
    """

    def __init__(self, config, params, quantizer, memory, rows, context, budget=128, page_size=16, stop=()):
        self.config, self.params, self.stop = config, params, set(stop)
        self.rows, self.budget = rows, max(rows, budget)
        self.metadata = cache_metadata(config, quantizer, memory, rows, context, page_size)
        cache = qpaged.PagedAttentionCache.init_cache(None, "bfloat16", self.metadata, None, quantizer)
        self.views = cache.with_layer_leaves().views  # with leaves, layers that are alike have one type
        self.allocator = qpaged.PageAllocator(self.metadata)
        self.waiting = deque()
        self.running = []
        self.steps = self.swaps = 0

    def submit(self, tokens, most):
        """Queue a prompt for at most so many more tokens, and return its request."""
        room = self.metadata.max_sequences - most
        if not 0 < len(tokens) <= room:
            raise ValueError(f"A prompt must have 1 to {room} tokens, but has {len(tokens)}.")
        request = Request(list(tokens), len(tokens), len(tokens) + most)
        self.waiting.append(request)
        return request

    def compile(self):
        """Compile both programs, by steps without tokens."""
        for size in (self.rows, self.budget):
            self._forward([], [], size)

    def step(self):
        """Give each running sequence a token, or a piece of its prompt; begin those there is room for."""
        self._start_waiting()
        counts = self._reserve()
        size = self.rows if sum(counts) <= self.rows else self.budget
        sampled = self._forward(self.running, counts, size)
        self.steps += 1
        for request, count, token in zip(list(self.running), counts, sampled, strict=False):
            request.written += count
            if request.written == len(request.tokens):
                self._append(request, int(token))

    def _forward(self, requests, counts, size):
        """Write the next tokens of each request, and return what comes after them; in a step of ``size``."""
        tokens, position = [], []
        for request, count in zip(requests, counts, strict=True):
            tokens += request.tokens[request.written : request.written + count]
            position += range(request.written, request.written + count)
        padding = size - len(tokens)
        rows = self.rows - len(requests)
        metadata = qpaged.PagedAttentionMetadata.ragged(
            position=np.asarray(position + [-1] * padding, np.int32),
            page_tables=self.allocator.page_table([*requests, *[None] * rows]),
            starts=np.cumsum([0, *counts, *[0] * rows], dtype=np.int32),
        )
        self._make_changes()
        tokens = np.asarray(tokens + [0] * padding, np.int32)
        return np.asarray(forward(self.params, self.config, self.views, tokens, metadata))

    def _start_waiting(self):
        """Bring sequences into rows that are free: from the host, or with what is cached of their prompts."""
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting[0]
            pages = len(request.tokens) // self.metadata.page_size + 1
            if pages + len(self.running) > self.allocator.num_free:
                if self.running:
                    return  # it would leave again, as soon as each of the others needs a page
                if self._forget_one():
                    continue
            if request.on_host is None:
                request.written = self.allocator.match_prefix(request, request.tokens)
            else:
                pages = self.allocator.swap_in(request)
                self._make_changes()
                back = zip(self.views, request.on_host, strict=True)
                self.views = [put(view, pages, on_host) for view, on_host in back]
                request.on_host = None
            self.running.append(self.waiting.popleft())

    def _reserve(self):
        """Return how many tokens each running sequence has in the step, once there are pages for them."""
        while True:
            left, counts = self.budget - len(self.running), []
            for request in self.running:
                count = min(len(request.tokens) - request.written, 1 + left)
                left -= count - 1
                counts.append(count)
            lengths = [r.written + count for r, count in zip(self.running, counts, strict=True)]
            try:
                self.allocator.extend(self.running, lengths)
                return counts
            except qpaged.AllocationError:
                if len(self.running) > 1:
                    self._swap_out(self.running.pop())
                elif not self._forget_one():
                    raise

    def _forget_one(self):
        """Free a sequence on the host, which holds on to pages that it shares; it is computed anew later."""
        for request in self.waiting:
            if request.on_host is not None:
                self.allocator.free(request)
                request.written, request.on_host = 0, None
                return True
        return False

    def _swap_out(self, request):
        pages = self.allocator.swap_out(request)
        self._make_changes()
        request.on_host = jax.device_get([take(view, pages) for view in self.views])
        self.allocator.release(pages)
        self.waiting.appendleft(request)
        self.swaps += 1

    def _append(self, request, token):
        if len(request.tokens) == request.prompt:  # its pages are written: others may begin with them
            self.allocator.share_prefix(request, request.tokens)
        request.tokens.append(token)
        if token in self.stop or len(request.tokens) == request.most:
            request.is_done = True
            self.running.remove(request)
            self.allocator.free(request)

    def _make_changes(self):
        changes = self.allocator.take_changes()
        if changes:
            self.views = [change(view, changes) for view in self.views]


def cache_metadata(config, quantizer, memory, rows, context, page_size=16):
    """Return the configuration of a cache of so many bytes."""
    return qpaged.PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=rows,
        num_hidden_layers=config.num_hidden_layers,
        max_sequences=context,
        page_size=page_size,
        num_kv_heads=config.num_key_value_heads,
        kv_head_dim_size=config.head_dim,
        hbm_utilization=0.999,
        quantizer=quantizer,
        memory_bytes=memory,
    )


def stream(engine, requests, tokenizer):
    """Run the engine, and print the texts in the order of the prompts, each as it comes."""
    for request in requests:
        print(f"\n> {tokenizer.decode(request.tokens[: request.prompt])}")
        shown = ""
        while True:
            text = tokenizer.decode(request.tokens[request.prompt :])
            if not request.is_done:
                text = text.rstrip("\ufffd")  # the first bytes of a character
            print(text[len(shown) :], end="", flush=True)
            shown = max(shown, text, key=len)
            if request.is_done:
                break
            engine.step()
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="a checkpoint; the bundled tiny model without")
    parser.add_argument("--prompts", type=Path, help="a file with one a line; stdin without")
    parser.add_argument("--format", default="int4:token+rotate+exact128", help="of the cache; or plain")
    parser.add_argument("--memory", type=int, default=16, help="MiB of the cache")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence, at most")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a step, at most")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after a prompt, at most")
    arguments = parser.parse_args()

    path = arguments.model or TINY
    config, params = models.load_checkpoint(path, "float32")  # what CPUs are fastest in
    tokenizer = models.load_tokenizer("bytes" if arguments.model is None else path)
    stop = json.loads((path / "config.json").read_text()).get("eos_token_id") or []
    sizes = {"memory": arguments.memory * 2**20, "rows": arguments.rows, "context": arguments.context}
    engine = Engine(config, params, arguments.format, **sizes, stop=[stop] if isinstance(stop, int) else stop)
    for name, metadata in (
        (arguments.format, engine.metadata),
        ("plain", cache_metadata(config, None, **sizes)),
    ):
        fits = metadata.num_pages_per_layer / metadata.num_pages_per_sequence
        print(f"{name}: {fits:.1f} sequences of {arguments.context} tokens fit in {arguments.memory} MiB")

    requests = []
    text = sys.stdin.read() if arguments.prompts is None else arguments.prompts.read_text()
    for line in filter(None, text.splitlines()):
        prompt = [*tokenizer.prefix, *tokenizer.encode(line.encode()).ids.tolist()]
        requests.append(engine.submit(prompt, arguments.tokens))
    start = time.perf_counter()
    engine.compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    stream(engine, requests, tokenizer)
    seconds = time.perf_counter() - start
    tokens = sum(len(request.tokens) - request.prompt for request in requests)
    counts = engine.allocator.counts()
    print(
        f"\n{tokens} tokens of {len(requests)} prompts in {seconds:.1f} s, {tokens / seconds:.1f} a second; "
        f"{engine.steps} steps, {counts.hit_rate:.0%} of the prompts' tokens found, {engine.swaps} swaps"
    )


if __name__ == "__main__":
    main()
