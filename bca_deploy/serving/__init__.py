"""The KServe protocol around a session: server and client."""
