"""The side of llama.cpp's or ik_llama.cpp's Python bindings in bench/decode.py: "BATCH PROMPT NEW" a line
-> "seconds S".

python bench/peer/peer_llama.py FILE.gguf THREADS CONTEXT SEQUENCES [repack]

Every sequence is fed random tokens of its own, and nothing is sampled, so only steps count. `repack` lets
ik_llama.cpp rearrange the weights at load, as its -rtr does; llama.cpp always does.
"""

import random
import sys
import time
from typing import Any

try:
    import ik_llama_cpp._ctypes_api as api
except ImportError:
    import llama_cpp as api

CHUNK = 2048  # tokens of a call at most


def open_context(file: str, threads: int, tokens: int, sequences: int, repack: bool) -> Any:
    """A context for `sequences` with `tokens` together. SystemExit if the file or the size is refused."""
    api.llama_backend_init()
    how = api.llama_model_default_params()
    if hasattr(how, "repack_tensors"):
        how.repack_tensors, how.use_mmap = repack, not repack
    model = api.llama_model_load_from_file(file.encode(), how)
    if not model:
        raise SystemExit(f"{file}: the bindings cannot load it")
    shape = api.llama_context_default_params()
    shape.n_ctx, shape.n_batch, shape.n_ubatch, shape.n_seq_max = tokens, CHUNK, 512, sequences
    shape.n_threads = shape.n_threads_batch = threads
    if hasattr(shape, "kv_unified"):
        shape.kv_unified = True
    if hasattr(shape, "flash_attn"):
        shape.flash_attn = True
    context = api.llama_init_from_model(model, shape)
    if not context:
        raise SystemExit(f"no context for {tokens} tokens in {sequences} sequences")
    return context


def forget(context: Any) -> None:
    """Empty the caches of all sequences."""
    if hasattr(api, "llama_kv_cache_clear"):
        api.llama_kv_cache_clear(context)
    else:
        api.llama_memory_clear(api.llama_get_memory(context), True)


def feed(context: Any, items: list[tuple[int, int, bool]], numbers: random.Random) -> None:
    """Compute (sequence, position, whether logits are wanted), each with a random token."""
    for start in range(0, len(items), CHUNK):
        some = items[start : start + CHUNK]
        batch = api.llama_batch_init(len(some), 0, 1)
        for i, (sequence, position, wanted) in enumerate(some):
            batch.token[i], batch.pos[i] = numbers.randrange(3, 32000), position
            batch.n_seq_id[i], batch.logits[i] = 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(some)
        status = api.llama_decode(context, batch)
        api.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode returned {status}")
    api.llama_get_logits_ith(context, -1)  # waits for the result


def main() -> None:
    """Load and answer."""
    file, threads, tokens, sequences = sys.argv[1], *map(int, sys.argv[2:5])
    context, numbers = (
        open_context(file, threads, tokens, sequences, "repack" in sys.argv[5:]),
        random.Random(0),
    )

    def seconds(batch: int, prompt: int, new: int) -> float:
        forget(context)
        start = time.perf_counter()
        for sequence in range(batch):
            feed(context, [(sequence, at, at == prompt - 1) for at in range(prompt)], numbers)
        for step in range(new - 1):
            feed(context, [(sequence, prompt + step, True) for sequence in range(batch)], numbers)
        return time.perf_counter() - start

    seconds(1, 32, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        print("seconds", seconds(*map(int, line.split())), flush=True)


if __name__ == "__main__":
    main()
