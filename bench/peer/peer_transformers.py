"""transformers' side of bench/decode.py: see peer_loop.py. Eager, bf16.

python bench/peer/peer_transformers.py MODEL THREADS
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from peer_loop import answer


def main() -> None:
    """Load and answer."""
    path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def seconds(batch: int, prompt: int, new: int) -> float:
        ids = torch.randint(3, model.config.vocab_size, (batch, prompt))
        cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        for _ in range(new):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - start

    answer(seconds)


if __name__ == "__main__":
    main()
