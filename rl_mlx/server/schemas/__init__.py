"""The bodies of requests, one file an API. What a schema does not have is a 400 that names it."""
