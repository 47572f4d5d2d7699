"""vLLM's side of bench/decode.py, run by vLLM's own interpreter: see peer_loop.py.

python bench/peer/peer_vllm.py MODEL THREADS
"""

import os
import random
import sys
import time

from peer_loop import answer


def main() -> None:
    """Load and answer."""
    model, threads = sys.argv[1], int(sys.argv[2])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=16, disable_log_stats=True)
    numbers = random.Random(0)

    def seconds(batch: int, prompt: int, new: int) -> float:
        prompts = [
            {"prompt_token_ids": [numbers.randrange(3, 32000) for _ in range(prompt)]} for _ in range(batch)
        ]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    answer(seconds)


if __name__ == "__main__":
    main()
