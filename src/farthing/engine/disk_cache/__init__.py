"""Cache blocks on local disk, so that prefixes outlive the process.

`segment.py` is the file format, `index.py` the directory that replicas share, `memory.py` the bytes of a
block in the cache, `store.py` the threads that read and write.
"""
