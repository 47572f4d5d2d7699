"""Cache blocks on local disk, so that prefixes outlive the process.

`files.py` is the file format, `files.py` the directory that replicas share, `store.py` the bytes of a
block in the cache, `store.py` the threads that read and write.
"""
