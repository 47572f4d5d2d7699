"""The engine: requests in, tokens out, from a thread of its own.

What a server (or `farthing.LLM`) uses:

    engine = Engine.from_config(EngineConfig(model="reference", max_num_seqs=64))   # loads; see farthing.config
    stream = engine.submit(prompt, SamplingParams(max_tokens=32), priority=0, cache_salt="", kind="delta")
        # prompt: str or token ids. Thread-safe, never blocks on the model. Raises ValueError (names the
        # field), QueueFull (429), EngineStopped (503). kind "delta": each output holds what is new;
        # "final": one output at the end.
    for output in stream: ...            # RequestOutput; from any thread
    async for output in stream: ...      # the same from an event loop
        # both raise EngineError if the request failed
    stream.cancel()                      # thread-safe; blocks are free within one step; finish_reason "abort"
    stream.result()                      # blocks; all deltas merged to one RequestOutput
    await stream.aresult()

    engine.chat_prompt(messages, tools=None, add_generation_prompt=True, **template_kwargs) -> str
    engine.tokenizer                     # farthing.engine.tokenizer.Tokenizer | None (skip_tokenizer_init)
        .encode(text, add_special_tokens=True) -> list[int];  .decode(ids, skip_special_tokens=True) -> str
        .eos_token_ids, .vocab_size
    engine.model_config                  # farthing.model.config.ModelConfig
    engine.config                        # the resolved EngineConfig (max_model_len, num_blocks, … filled in)
    engine.default_sampling -> dict      # temperature, top_p, … from generation_config.json
    engine.stats.snapshot() -> Snapshot  # farthing.engine.stats: counters, gauges, histograms, experts
    engine.health() -> None              # raises EngineError if the loop has died
    engine.drain(timeout) -> bool        # take no more, finish what runs; False: the rest was aborted
    engine.shutdown()                    # end now; running requests end with "abort"
"""
