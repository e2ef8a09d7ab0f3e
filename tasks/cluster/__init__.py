"""Acceptance of a cluster: probes that ranks run, findings, verdict."""
