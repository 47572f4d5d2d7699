"""transformers' side of bench/decode.py: "BATCH PROMPT NEW" a line -> "seconds S". Eager, bf16.

python bench/peer_transformers.py MODEL THREADS
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    """Load, print "ready", and answer until the input ends."""
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

    seconds(1, 32, 4)
    print("ready", flush=True)
    for line in sys.stdin:
        print("seconds", seconds(*map(int, line.split())), flush=True)


if __name__ == "__main__":
    main()
