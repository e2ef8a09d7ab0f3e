"""What each node's agent leaves in the attempt's folder; ``{node}`` is the node's rank among the job's."""

FAILURES = "node-{node}.failures.json"
"""How its ranks ended, where they did not end well."""
HOST = "node-{node}.host"
"""On which machine it runs; there as soon as it does."""
