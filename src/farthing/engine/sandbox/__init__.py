"""Work on untrusted input, in child processes with limits on time and memory.

Grammars, chat templates and long texts come from clients or from model files. Any of them can take seconds,
exhaust memory or overflow a native stack, so none is touched in the engine's process before a child has
survived it. `Sandbox` is what the engine and the server use. `turns` decides whose job is next, `pool` runs
it in a worker, and `child` is the process that forks the workers and what runs in them."""
