"""Ranks on the nodes of a Ray cluster, and replicas by Ray Serve: everything here needs the extra `ray`."""
